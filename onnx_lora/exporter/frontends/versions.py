"""The versions of the libraries that made a package, for its manifest: what modules are called depends on them."""

from __future__ import annotations

from importlib import metadata

__all__ = ["versions_of"]


def versions_of(*distributions: str) -> dict[str, str]:
    """By the name of each distribution its version, where it is installed."""
    found: dict[str, str] = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
