"""The interface between a block and the hardware that runs it.

A backend computes a block's norms, attention's projections with their exchange over sp, and
attention. It works on one device, inside shard_map, on b samples. The device holds s of the S
tokens outside attention, and R = heads x D rows (some heads) of all S tokens inside it.

Layouts, for every backend:

| array | layout |
|---|---|
| residual, and what `project_out` returns | tokens first, [b, s, E] |
| modulated, the operand of all first products | tokens last, [b, E, s] |
| q, k, v and the output between `project` and `project_out` | the backend's own; its class says |
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax

from cogvideox.transformer.norms import Rotary


class Bounds(NamedTuple):
    """Upper bounds on magnitudes; kernels use them to skip overflow checks."""

    scores: jax.Array  # [] float32, for all heads
    values: jax.Array  # [b, R], for each row of v


@dataclasses.dataclass(frozen=True)
class Backend(abc.ABC):
    """Runs the parts of a block that differ between kinds of hardware.

    Attributes:
        name: of its attention kernel, as --attention has it.
        token_multiple: the tokens of a device must be a multiple of this.
    """

    name: ClassVar[str]
    token_multiple: ClassVar[int] = 1

    @abc.abstractmethod
    def norm_and_modulate(
        self, x: jax.Array, scale: jax.Array, shift: jax.Array, text_rows: jax.Array, eps: float
    ) -> jax.Array:
        """Norms x [b, s, E] to modulated [b, E, s]; see `norms.norm_and_modulate`."""

    @abc.abstractmethod
    def project(self, modulated: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Projects to q, k or v: from this device's tokens to all tokens of its heads.

        Args:
            modulated: [b, E, s].
            weight: [shards x R, E], of all heads.
            bias: [shards x R].
        """

    @abc.abstractmethod
    def queries(
        self, q: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        """Norms and rotates what `project` made of q.

        Args:
            weight, bias: of the norm, [D] float32.
            rotary: cos and sin [D / 2, S] float32.
        """

    @abc.abstractmethod
    def keys(
        self, k: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        """Norms and rotates what `project` made of k."""

    @abc.abstractmethod
    def values(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lays out what `project` made of v; also the largest magnitude of each row, [b, R]."""

    @abc.abstractmethod
    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int, keys: int, bounds: Bounds
    ) -> jax.Array:
        """Computes softmax attention; keys from index `keys` on take no part."""

    @abc.abstractmethod
    def project_out(self, out: jax.Array, weight: jax.Array) -> jax.Array:
        """Projects attention's output: from all tokens of some heads to this device's tokens.

        Args:
            weight: [E, shards x R].

        Returns:
            [b, s, E].
        """

    def query_scale(self, head_dim: int) -> float:
        """Factor on q before it is rounded, which `attend` expects."""
        return 1.0

    def block_sizes(self, head_dim: int, queries: int, keys: int, dtype: str) -> dict[str, int]:
        """Tile sizes of the attention kernel by name; they are part of a program's fingerprint."""
        return {}

    def padded_tokens(self, tokens: int, shards: int) -> int:
        """Returns the sequence length that splits into `shards` of `token_multiple`."""
        multiple = self.token_multiple * shards
        return -(-tokens // multiple) * multiple
