"""Attention over a mesh: batch, heads and tokens split over its axes.

Axis letters: B batch, N heads, S query tokens, K key tokens, D head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
AttentionPart = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Stands for the denominator of no keys. Finite, so that differences are never NaN.
_NOTHING = -3e38


def sharded_attention(
    attention: Attention,
    mesh: Mesh | AbstractMesh,
    *,
    batch_axis: str | None = "dp",
    head_axis: str | None = "tp",
    sequence_axis: str | None = None,
) -> Attention:
    """`attention` on global arrays, with batch, heads and tokens each split over a mesh axis.

    Tokens meet by an all-to-all: every device trades its tokens of all its heads for all tokens of
    some of its heads (DeepSpeed Ulysses, arXiv 2309.14509). Each query so sees every key, whatever
    part of the sequence it belongs to.

    Args:
        attention: function of q [B, N, S, D], k and v [B, N, K, D] of one device.
        mesh: the devices; an axis it does not have counts as one of size 1.
        batch_axis: mesh axis that shards B.
        head_axis: mesh axis that shards N.
        sequence_axis: mesh axis that shards S and K, which it need not divide: they are padded, and
            the padding is cut off before `attention` sees it. It divides N / head_axis; where there
            are more shards than heads, use `ring_attention`.

    Returns:
        A function of global q [B, N, S, D], k and v [B, N, K, D], for use inside an outer `jax.jit`
        on a mesh of Auto axes. It raises ValueError when a mesh axis does not divide what it
        shards.
    """
    axes = _Axes(mesh, batch_axis, head_axis, sequence_axis)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        axes.check(q, "sequence_axis needs heads to trade for tokens", axes.tokens)
        q_len, kv_len = q.shape[2], k.shape[2]

        def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            if axes.sequence is not None:
                q, k, v = (
                    jax.lax.all_to_all(x, axes.sequence, 1, 2, tiled=True) for x in (q, k, v)
                )
            out = attention(q, k[:, :, :kv_len], v[:, :, :kv_len])
            if axes.sequence is None:
                return out
            return jax.lax.all_to_all(out, axes.sequence, 2, 1, tiled=True)

        return axes.run(local, q, k, v)[:, :, :q_len]

    return attend


def ring_attention(
    attention_part: AttentionPart,
    mesh: Mesh | AbstractMesh,
    *,
    batch_axis: str | None = "dp",
    head_axis: str | None = "tp",
    sequence_axis: str = "sp",
) -> Attention:
    """Attention with tokens split over more devices than there are heads.

    Every device keeps its queries. Keys and values go round the ring of devices, and what each
    part of them gives is merged by its softmax denominator (Ring Attention, arXiv 2310.01889). The
    next part travels while the kernel works on the one that is here.

    Args:
        attention_part: what `splash_attention.attention_part` is: a function of q [B, N, S, D], k
            and v [B, N, K, D] of one device and the int32 number of keys that count, to the output
            and log2 of the denominators [B, N, S, 1], both float32.
        mesh, batch_axis, head_axis: as in `sharded_attention`.
        sequence_axis: mesh axis that shards S and K, which it need not divide: padding is added,
            and masked in the parts that hold it.

    Returns:
        As `sharded_attention`.
    """
    axes = _Axes(mesh, batch_axis, head_axis, sequence_axis)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        axes.check(q, "", 1)
        q_len, kv_len = q.shape[2], k.shape[2]

        def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys = k.shape[2]
            here = jax.lax.axis_index(axes.sequence) if axes.tokens > 1 else 0
            forward = [(i, (i + 1) % axes.tokens) for i in range(axes.tokens)]
            out = jnp.zeros(q.shape, jnp.float32)
            log_total = jnp.full((*q.shape[:3], 1), _NOTHING)
            for step in range(axes.tokens):
                # Which shard's keys are here, and how many of them are not padding.
                shard = (here - step) % axes.tokens
                count = jnp.clip(kv_len - shard * keys, 0, keys).astype(jnp.int32)
                following = (k, v)
                if step + 1 < axes.tokens:
                    following = jax.lax.ppermute((k, v), axes.sequence, forward)
                part, log_part = attention_part(q, k, v, count)
                merged = jnp.logaddexp2(log_total, log_part)
                # A part without keys has weight 0 and no value.
                part = jnp.where(count > 0, part * jnp.exp2(log_part - merged), 0.0)
                out = out * jnp.exp2(log_total - merged) + part
                log_total = merged
                k, v = following
            return out.astype(q.dtype)

        return axes.run(local, q, k, v)[:, :, :q_len]

    return attend


class _Axes:
    """The mesh axes that shard batch, heads and tokens; None where there is none."""

    def __init__(
        self, mesh: Mesh | AbstractMesh, batch: str | None, heads: str | None, sequence: str | None
    ) -> None:
        present = [a if a in mesh.axis_names else None for a in (batch, heads, sequence)]
        self.mesh = mesh
        self.batch, self.heads, self.sequence = present
        self.tokens = 1 if self.sequence is None else mesh.shape[self.sequence]

    def check(self, q: jax.Array, why: str, shards_of_heads: int) -> None:
        """ValueError unless the axes divide batch and heads, and heads per device the tokens'."""
        for size, axis, what in (
            (q.shape[0], self.batch, "batch"),
            (q.shape[1], self.heads, "heads"),
        ):
            if axis is not None and size % self.mesh.shape[axis]:
                raise ValueError(
                    f"{what} of {size} cannot be split over mesh axis {axis!r} of size "
                    f"{self.mesh.shape[axis]}"
                )
        heads = q.shape[1] // (1 if self.heads is None else self.mesh.shape[self.heads])
        if heads % shards_of_heads:
            raise ValueError(
                f"{why}: {heads} heads a device cannot be split over mesh axis {self.sequence!r} "
                f"of size {shards_of_heads}; use ring_attention"
            )

    def run(self, local: Attention, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """`local` on every device's part; tokens are padded with zeros to split evenly."""
        spec = P(self.batch, self.heads, self.sequence, None)
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.tokens), (0, 0))) for x in (q, k, v)
        )
        # check_vma: pallas_call does not say over which mesh axes its outputs vary.
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
        )(q, k, v)
