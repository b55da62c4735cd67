"""Backend for TPU: Pallas kernels for attention, norms and the exchange over sp."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cogvideox.transformer.backends.base import (
    Backend,
    Bounds,
    Listed,
    Norm,
    QuantizedQueries,
    Queries,
)
from cogvideox.transformer.backends.tpu.int8_heads import quantize_heads
from cogvideox.transformer.backends.tpu.modulated_norm import norm_and_modulate
from cogvideox.transformer.backends.tpu.token_shards import (
    join_values,
    norm_and_rotate,
    part_tokens,
)
from cogvideox.transformer.linear import linear_to_tokens_first, linear_tokens_last
from cogvideox.transformer.norms import Rotary
from cogvideox.transformer.precision import ATTENTION
from splash_attention import (
    BlockSizes,
    quantized_attention,
    query_scale,
    sequence_minor_attention,
)
from splash_attention.block_sizes import chip_named, choose_block_sizes, current_chip


@dataclasses.dataclass(frozen=True)
class TpuBackend(Backend):
    """Runs splash attention on a TPU core (`--attention splash`).

    Layout: tokens last, in sequence order, [b, R, S] for q, v and the output; [b, S, R] for k. The
    kernel multiplies these without a transpose. With D = 64 last, a TPU would pad every row to 128
    lanes. `project` returns the all-to-all's layout, [b, shards, R, s], with the tokens of each
    shard separate; `queries`, `keys` and `values` join the shards.

    Attributes:
        interpret: run all kernels in TPU interpret mode, on any hardware.
        chip: v5e, v5p or v6e; selects the tiles. None selects the chip compiled for.
    """

    interpret: bool = False
    chip: str | None = None

    name = "splash"
    token_multiple = 128  # lanes; a shorter last tile would be padded in every array
    takes_lists = True
    attention_precisions = ATTENTION
    tokens_last = True

    def norm_and_modulate(
        self, x: jax.Array, scale: jax.Array, shift: jax.Array, text_rows: jax.Array, eps: float
    ) -> jax.Array:
        return norm_and_modulate(x, scale, shift, text_rows, eps, interpret=self.interpret)

    def project(self, modulated: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        out = linear_tokens_last(modulated, weight)
        out = out if bias is None else out + bias[:, None]
        return _all_to_all(out.reshape(out.shape[0], jax.lax.axis_size("sp"), -1, out.shape[-1]))

    def queries(
        self, q: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        return norm_and_rotate(q, weight, bias, rotary, interpret=self.interpret)

    def keys(
        self, k: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary | None
    ) -> jax.Array:
        return norm_and_rotate(k, weight, bias, rotary, transposed=True, interpret=self.interpret)

    def queries_and_keys(
        self, q: jax.Array, k: jax.Array, norm_q: Norm, norm_k: Norm, rotary: Rotary | None,
        keys: int | Listed,
    ) -> tuple[Queries, jax.Array]:  # fmt: skip
        if self.precision.attention != "int8_qk":
            return super().queries_and_keys(q, k, norm_q, norm_k, rotary, keys)
        tokens = k.shape[1] * k.shape[3]
        if isinstance(keys, Listed):
            valid = keys.lists.valid_keys()[:tokens]
        else:
            valid = jnp.arange(tokens) < keys
        q8, k8, scale = quantize_heads(
            *(q, k, norm_q, norm_k, rotary, valid), interpret=self.interpret
        )
        return QuantizedQueries(q8, scale), k8

    def values(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        if v.shape[1] > 1:
            return join_values(v, interpret=self.interpret)
        return v[:, 0], jnp.abs(v[:, 0]).max(-1)

    def attend(
        self,
        q: Queries,
        k: jax.Array,
        v: jax.Array,
        head_dim: int,
        keys: int | Listed,
        bounds: Bounds,
    ) -> jax.Array:
        v = v.reshape(v.shape[0], -1, head_dim, v.shape[-1])
        heads = v.shape[:2]
        options: dict[str, Any] = {
            "largest_score": jnp.broadcast_to(bounds.scores, heads),
            "largest_value": bounds.values.reshape(*heads, head_dim).max(-1),
            "interpret": self.interpret,
        }
        if isinstance(keys, Listed):
            rule = jnp.broadcast_to(keys.rule, heads)
            options |= {"block_lists": keys.lists, "rule": rule}
        else:
            options["kv_len"] = keys
            if self.chip is not None:
                sizes = self._block_sizes(head_dim, v.shape[-1], keys, v.dtype)
                options["block_sizes"] = sizes
        if isinstance(q, QuantizedQueries):
            q, scale = q
            options["largest_score"] *= 2  # of smoothed keys: |q.mean| is at most that of |q.k|
            out = quantized_attention(q.reshape(*heads, -1, q.shape[-1]), k, v, scale, **options)
        else:
            q = q.reshape(*heads, head_dim, q.shape[-1])
            out = sequence_minor_attention(q, k, v, **options)
        return out.reshape(out.shape[0], -1, out.shape[-1])

    def project_out(self, out: jax.Array, weight: jax.Array) -> jax.Array:
        shards = jax.lax.axis_size("sp")
        if shards == 1:
            parts = out[:, None]
        else:
            parts = part_tokens(out, shards, interpret=self.interpret)
        parts = _all_to_all(parts)
        return linear_to_tokens_first(parts.reshape(parts.shape[0], -1, parts.shape[-1]), weight)

    def query_scale(self, head_dim: int) -> float:
        return query_scale(head_dim)

    def block_sizes(self, head_dim: int, queries: int, keys: int, dtype: str) -> dict[str, int]:
        return dataclasses.asdict(self._block_sizes(head_dim, queries, keys, jnp.dtype(dtype)))

    def _block_sizes(self, head_dim: int, queries: int, keys: int, dtype: jnp.dtype) -> BlockSizes:
        chip = chip_named(self.chip) if self.chip else current_chip(interpret=self.interpret)
        if self.precision.attention == "int8_qk":
            dtype = jnp.dtype("int8")
        return choose_block_sizes(chip, head_dim, queries, keys, dtype)


def _all_to_all(x: jax.Array) -> jax.Array:
    """Runs an all-to-all over sp along axis 1, which has one entry per shard."""
    # XLA's CPU backend keeps a collective of a single device as a copy.
    return x if jax.lax.axis_size("sp") == 1 else jax.lax.all_to_all(x, "sp", 1, 1, tiled=True)
