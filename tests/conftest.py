"""Shapes in annotations are checked by beartype in every test, where the contract allows it.

Not in modules whose functions promise a ValueError (InputError) on tensors of the wrong shape or dtype: there the hook
would answer with its own TypeCheckError first.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from forks import Forks

HOOKED = (
    "certificate",
    "models",
    "report",
    "relation",
    "testing",
    "training",
    "views",
)

if workers := os.environ.get(
    "PYTEST_XDIST_WORKER_COUNT"
):  # they and their children share the cores, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

install_import_hook([f"certipatch.{name}" for name in HOOKED], "beartype.beartype")


@pytest.fixture(scope="session")
def forks() -> Iterator["Forks"]:
    """A server that forks real processes, to be killed."""
    from forks import Forks

    server = Forks()
    yield server
    server.close()
