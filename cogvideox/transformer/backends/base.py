"""The interface between a block and the hardware that runs it.

A backend computes a block's norms, attention's projections with their exchange over sp, and
attention. It runs on one device, inside shard_map, on b samples. Outside attention, the device has
s of the S tokens. Inside attention, it has all S tokens of its own heads: R = heads x D rows.

Layouts, for every backend:

| array | layout |
|---|---|
| residual, and the result of `project_out` | tokens first, [b, s, E] |
| modulated, the input of q, k, v and the MLP | tokens last, [b, E, s] |
| q, k, v and the output of `attend` | the backend's own; see its class |
"""

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax

from cogvideox.transformer.norms import Rotary
from cogvideox.transformer.precision import Precision
from splash_attention import BlockLists

Norm = tuple[jax.Array, jax.Array]  # weight and bias of a norm, [D] float32


class QuantizedQueries(NamedTuple):
    """q for int8 products; see `splash_attention.quantized_attention`."""

    values: jax.Array
    scale: jax.Array


Queries = jax.Array | QuantizedQueries


class Listed(NamedTuple):
    """Which keys the queries see in a sparse step."""

    lists: BlockLists
    rule: jax.Array  # [N] int32, of this device's heads


class Bounds(NamedTuple):
    """Upper bounds on magnitudes; kernels use them to skip overflow checks."""

    scores: jax.Array  # [] float32, for all heads
    values: jax.Array  # [b, R], for each row of v


@dataclasses.dataclass(frozen=True)
class Backend(abc.ABC):
    """Runs the parts of a block that differ between kinds of hardware.

    Attributes:
        precision: of the matrix products.
        name: name of its attention kernel, as in --attention.
        token_multiple: the number of tokens on a device must be a multiple of this.
        takes_lists: whether `attend` can be sparse.
        attention_precisions: those that `attend` has.
        tokens_last: whether the output of `attend` is [b, R, S]; else it is [b, S, R].
    """

    precision: Precision = Precision()

    name: ClassVar[str]
    token_multiple: ClassVar[int] = 1
    takes_lists: ClassVar[bool] = False
    attention_precisions: ClassVar[tuple[str, ...]] = ("bf16",)
    tokens_last: ClassVar[bool] = False

    @abc.abstractmethod
    def norm_and_modulate(
        self, x: jax.Array, scale: jax.Array, shift: jax.Array, text_rows: jax.Array, eps: float
    ) -> jax.Array:
        """Norms x [b, s, E] to modulated [b, E, s]; see `norms.norm_and_modulate`."""

    @abc.abstractmethod
    def project(self, modulated: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Projects this device's tokens to q, k or v, and exchanges: all tokens of its heads.

        Args:
            modulated: [b, E, s].
            weight: [shards x R, E], for all heads.
            bias: [shards x R].
        """

    @abc.abstractmethod
    def queries(
        self, q: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        """Applies norm and rotation to the q of `project`.

        Args:
            weight, bias: of the norm, [D] float32.
            rotary: cos and sin [D / 2, S] float32.
        """

    @abc.abstractmethod
    def keys(
        self, k: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        """Applies norm and rotation to the k of `project`."""

    def queries_and_keys(
        self, q: jax.Array, k: jax.Array, norm_q: Norm, norm_k: Norm, rotary: Rotary | None,
        keys: int | Listed,
    ) -> tuple[Queries, jax.Array]:  # fmt: skip
        """Applies norm and rotation to the q and k of `project`, as `attend` takes them.

        Args:
            keys: which are not padding, as in `attend`.
        """
        return self.queries(q, *norm_q, rotary), self.keys(k, *norm_k, rotary)

    @abc.abstractmethod
    def values(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Lays out the v of `project`; also returns the largest magnitude of each row, [b, R]."""

    @abc.abstractmethod
    def attend(
        self,
        q: Queries,
        k: jax.Array,
        v: jax.Array,
        head_dim: int,
        keys: int | Listed,
        bounds: Bounds,
    ) -> jax.Array:
        """Computes softmax attention over the first `keys` keys, or over the listed ones.

        The other keys are masked.

        Args:
            q, k: results of `queries_and_keys`.
        """

    @abc.abstractmethod
    def project_out(self, out: jax.Array, weight: jax.Array) -> jax.Array:
        """Projects attention's output and exchanges: this device's tokens of all heads.

        Args:
            weight: [E, shards x R].

        Returns:
            [b, s, E].
        """

    def query_scale(self, head_dim: int) -> float:
        """Returns the factor that `attend` expects on q before q is rounded."""
        return 1.0

    def block_sizes(self, head_dim: int, queries: int, keys: int, dtype: str) -> dict[str, int]:
        """Returns the attention kernel's tile sizes by name, for the program's fingerprint."""
        return {}

    def padded_tokens(self, tokens: int, shards: int) -> int:
        """Returns `tokens` rounded up to a multiple of `shards` x `token_multiple`."""
        multiple = self.token_multiple * shards
        return -(-tokens // multiple) * multiple
