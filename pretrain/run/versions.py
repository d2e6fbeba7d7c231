"""The versions that a run's record names."""

import importlib.metadata
import sys

PACKAGES = ("megatron-ladder", "megatron-core", "torch", "transformer-engine")


def versions() -> dict[str, str]:
    """Of Python and of what computes, for the record."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
