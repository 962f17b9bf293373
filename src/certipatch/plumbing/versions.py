"""Versions of the software behind a result."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of certipatch, Python, torch and NumPy."""
    installed = {"python": platform.python_version()}
    for package in ("certipatch", "torch", "numpy"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed
