"""Shapes in annotations are checked by beartype in every test, where the contract allows it.

Not in modules whose functions promise a ValueError (InputError) on tensors of the wrong shape or dtype: there the hook
would answer with its own TypeCheckError first.
"""

from jaxtyping import install_import_hook

HOOKED = (
    "certificate",
    "models",
    "report",
    "relation",
    "testing",
    "training",
    "views",
)

install_import_hook([f"certipatch.{name}" for name in HOOKED], "beartype.beartype")
