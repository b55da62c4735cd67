"""Types of JAX objects that JAX itself leaves untyped."""

from typing import Protocol


class _Client(Protocol):
    platform_version: str


class Device(Protocol):
    """The parts of a `jax.Device` that are used here.

    jaxlib ships no types for its compiled modules, so type checkers take `jax.Device` for a
    variable.
    """

    id: int
    process_index: int
    platform: str
    device_kind: str
    client: _Client
    compute_capability: str  # of a GPU; other devices lack it

    def memory_stats(self) -> dict[str, int] | None:
        """Bytes by kind; None where the backend does not report them."""
