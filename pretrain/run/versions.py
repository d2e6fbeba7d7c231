"""The versions of Python and of packages, for a run's records."""

import importlib.metadata
import sys

PACKAGES = ("megatron-ladder", "megatron-core", "torch", "transformer-engine")


def versions() -> dict[str, str]:
    """The versions of Python and of the installed PACKAGES, by name."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
