"""Versions of the installed libraries."""

from importlib import metadata

_LIBRARIES = ("torch", "jax", "jaxlib", "torchax", "diffusers", "transformers", "flax")


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that influence a result."""
    return {name: metadata.version(name) for name in _LIBRARIES}
