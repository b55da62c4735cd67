"""Attention over a mesh whose axes shard batch, heads and tokens.

Axis letters: B batch, N heads, S query tokens, K key tokens, D head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
AttentionPart = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# log2 of the denominator of no keys. Finite, so that differences are never NaN.
_NOTHING = -3e38


def sharded_attention(
    attention: Attention,
    mesh: Mesh | AbstractMesh,
    *,
    batch_axis: str | None = "dp",
    head_axis: str | None = "tp",
    sequence_axis: str | None = None,
) -> Attention:
    """Shard `attention` over a mesh: batch, heads and, by an all-to-all, tokens.

    Along `sequence_axis` an all-to-all turns token shards of all heads into head shards of all
    tokens, so `attention` sees whole sequences. A second one turns the output back.

    Source: DeepSpeed Ulysses (arXiv 2309.14509).

    Args:
        attention: function of q [B, N, S, D], k and v [B, N, K, D] on one device.
        mesh: the devices. Axes that it lacks count as size 1.
        batch_axis: mesh axis that shards B; must divide B.
        head_axis: mesh axis that shards N; must divide N.
        sequence_axis: mesh axis that shards S and K; must divide the heads of a device. It need not
            divide S and K: they are padded, and the padding is removed before `attention` is
            called. For more token shards than heads use `ring_attention`.

    Returns:
        A function of global q [B, N, S, D], k and v [B, N, K, D] for use inside `jax.jit`, on a
        mesh of Auto axes. It raises ValueError if a mesh axis does not divide what it shards.
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
    """Shard attention over a mesh with keys and values passed round a ring of devices.

    Works with more token shards than heads. Every device keeps its queries. In each step it attends
    to the shard of keys it holds, merges the result by its softmax denominator, and has meanwhile
    sent that shard to the next device.

    Source: Ring Attention (arXiv 2310.01889).

    Args:
        attention_part: function of q [B, N, S, D], k and v [B, N, K, D] on one device and the int32
            number of valid keys. Returns the output and log2 of the denominators [B, N, S, 1], both
            float32, as `splash_attention.attention_part` does.
        mesh, batch_axis, head_axis: as in `sharded_attention`.
        sequence_axis: mesh axis that shards S and K. It need not divide them: padding is added and
            masked.

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
                # The shard whose keys this device holds now, and how many of them are valid.
                shard = (here - step) % axes.tokens
                count = jnp.clip(kv_len - shard * keys, 0, keys).astype(jnp.int32)
                following = (k, v)
                if step + 1 < axes.tokens:
                    following = jax.lax.ppermute((k, v), axes.sequence, forward)
                part, log_part = attention_part(q, k, v, count)
                merged = jnp.logaddexp2(log_total, log_part)
                # A part without keys has weight 0, and its output is NaN.
                part = jnp.where(count > 0, part * jnp.exp2(log_part - merged), 0.0)
                out = out * jnp.exp2(log_total - merged) + part
                log_total = merged
                k, v = following
            return out.astype(q.dtype)

        return axes.run(local, q, k, v)[:, :, :q_len]

    return attend


class _Axes:
    """Names of the mesh axes that shard batch, heads and tokens; None for an absent axis."""

    def __init__(
        self, mesh: Mesh | AbstractMesh, batch: str | None, heads: str | None, sequence: str | None
    ) -> None:
        present = [a if a in mesh.axis_names else None for a in (batch, heads, sequence)]
        self.mesh = mesh
        self.batch, self.heads, self.sequence = present
        self.tokens = 1 if self.sequence is None else mesh.shape[self.sequence]

    def check(self, q: jax.Array, why: str, shards_of_heads: int) -> None:
        """Check that the axes divide the batch and the heads, and `shards_of_heads` the rest.

        Raises:
            ValueError: they do not; the message names the axis.
        """
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
        """Run `local` on every device's shard, with tokens padded with zeros to equal shards."""
        spec = P(self.batch, self.heads, self.sequence, None)
        q, k, v = (
            jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.tokens), (0, 0))) for x in (q, k, v)
        )
        # check_vma=False: pallas_call does not declare over which mesh axes its outputs vary.
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
        )(q, k, v)
