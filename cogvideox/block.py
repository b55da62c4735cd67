"""The transformer block in JAX: what diffusers' CogVideoXBlock computes, laid out for a mesh.

All blocks run as one `lax.scan` inside one `shard_map`, so every collective is written here:

- dp splits the batch (classifier-free guidance doubles it);
- sp splits the tokens; an all-to-all turns token shards into head shards around attention, where
  each device sees all tokens, text included, for its heads (DeepSpeed Ulysses, arXiv 2309.14509);
- tp splits the heads and the MLP's columns; norms and residuals are split by tokens over it, so
  none of that work is repeated (Megatron sequence parallelism, arXiv 2205.05198).

Text and video stay one sequence, told apart by position: splitting and joining them would cost a
copy of all tokens each time, and lose the sharding.

q, k and v are made with the sequence as the last axis, [B, N, D, S]: with D = 64 last, TPUs would
pad every row to 128 lanes. Rotary pairs lie half a head apart instead of side by side
(`rotary_halves`, applied to the weights when they are loaded), so that rotating moves no lanes.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# q, k, v [B, N, D, S] and the number of real keys -> [B, N, D, S]; see cogvideox/attention.py.
Attend = Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
Weights = Mapping[str, jax.Array]

ACTIVATIONS = {
    "gelu-approximate": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """The static facts of a block; the weights are arguments.

    Attributes:
        num_heads: N of the whole model.
        head_dim: D.
        norm_eps: of the two LayerNorms; the q/k norms have 1e-6, as in diffusers.
        activation: of the MLP, a key of ACTIVATIONS.
        text_tokens: the first tokens of the sequence are text.
        tokens: text and video tokens, without the padding at the end.
        query_scale: multiplied into q before its only rounding.
        attend: the attention kernel of one device.
    """

    num_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    text_tokens: int
    tokens: int
    query_scale: float
    attend: Attend

    def __call__(
        self,
        x: jax.Array,
        weights: Weights,
        temb: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        """One block on one device.

        Args:
            x: [b, s, E], this device's batch and tokens (split over sp, then tp).
            weights: of one layer, by diffusers' names inside the block, split over tp.
            temb: [b, time_embed_dim], the time embedding.
            rotary: cos and sin [D / 2, S / sp] float32 for the tokens of this sp shard.

        Returns:
            [b, s, E].
        """
        shift, gate = self._modulation(weights, "norm1", x, temb)
        x = x + gate * self._attention(weights, shift, rotary)
        shift, gate = self._modulation(weights, "norm2", x, temb)
        return x + gate * self._mlp(weights, shift)

    def _modulation(
        self, weights: Weights, norm: str, x: jax.Array, temb: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """CogVideoXLayerNormZero: x normed and modulated [b, s, E], and the gate [b, s, E]."""
        six = jax.nn.silu(temb) @ weights[f"{norm}.linear.weight"].T
        six = six + weights[f"{norm}.linear.bias"]
        six = jax.lax.all_gather(six, "tp", axis=1, tiled=True).astype(jnp.float32)
        video, text = jnp.split(six[:, None, :], 2, axis=-1)
        scale = weights.get(f"{norm}.norm.weight", 1.0)
        bias = weights.get(f"{norm}.norm.bias", 0.0)

        def affine(part: jax.Array) -> list[jax.Array]:
            """shift, scale, gate with the norm's own scale and bias folded in, [b, 1, E] each."""
            shift, factor, gate = jnp.split(part, 3, axis=-1)
            return [bias * (1 + factor) + shift, scale * (1 + factor), gate]

        first = _shard_index(("sp", "tp")) * x.shape[1]
        is_text = (first + jnp.arange(x.shape[1]) < self.text_tokens)[:, None]
        shift, factor, gate = (
            jnp.where(is_text, t, v) for t, v in zip(affine(text), affine(video), strict=True)
        )
        normed = _normalise(x.astype(jnp.float32), -1, self.norm_eps)
        return (normed * factor + shift).astype(x.dtype), gate.astype(x.dtype)

    def _attention(
        self, weights: Weights, x: jax.Array, rotary: tuple[jax.Array, jax.Array] | None
    ) -> jax.Array:
        x = jax.lax.all_gather(x, "tp", axis=1, tiled=True)
        q, k, v = (self._project(weights, name, x) for name in ("to_q", "to_k", "to_v"))
        q = self._norm_and_rotate(weights, "norm_q", q, rotary, self.query_scale)
        k = self._norm_and_rotate(weights, "norm_k", k, rotary, 1.0)
        q, k, v = (jax.lax.all_to_all(a, "sp", 1, 3, tiled=True) for a in (q, k, v))
        out = self.attend(q, k, v, self.tokens)
        out = jax.lax.all_to_all(out, "sp", 3, 1, tiled=True)
        out = out.reshape(out.shape[0], -1, out.shape[-1])
        out = jnp.einsum("bis,oi->bso", out, weights["attn1.to_out.0.weight"])
        return _sum_shards(out) + weights["attn1.to_out.0.bias"]

    def _project(self, weights: Weights, name: str, x: jax.Array) -> jax.Array:
        """[b, s, E] to the device's heads [b, n, D, s]."""
        out = jnp.einsum("oi,bsi->bos", weights[f"attn1.{name}.weight"], x)
        bias = weights.get(f"attn1.{name}.bias")
        if bias is not None:
            out = out + bias[:, None]
        return out.reshape(out.shape[0], -1, self.head_dim, out.shape[-1])

    def _norm_and_rotate(
        self,
        weights: Weights,
        norm: str,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array] | None,
        scale: float,
    ) -> jax.Array:
        """q/k norm, rotary embedding and scale of [b, n, D, s], in float32, rounded once."""
        x32 = _normalise(x.astype(jnp.float32), -2, 1e-6)
        x32 = x32 * weights[f"attn1.{norm}.weight"][:, None].astype(jnp.float32)
        x32 = (x32 + weights[f"attn1.{norm}.bias"][:, None].astype(jnp.float32)) * scale
        if rotary is None:
            return x32.astype(x.dtype)
        cos, sin = rotary
        even, odd = jnp.split(x32, 2, axis=-2)
        rotated = [even * cos - odd * sin, odd * cos + even * sin]
        return jnp.concatenate(rotated, axis=-2).astype(x.dtype)

    def _mlp(self, weights: Weights, x: jax.Array) -> jax.Array:
        x = jax.lax.all_gather(x, "tp", axis=1, tiled=True)
        hidden = x @ weights["ff.net.0.proj.weight"].T
        if "ff.net.0.proj.bias" in weights:
            hidden = hidden + weights["ff.net.0.proj.bias"]
        hidden = ACTIVATIONS[self.activation](hidden)
        return _sum_shards(hidden @ weights["ff.net.2.weight"].T) + weights["ff.net.2.bias"]


def rotary_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders each head's rows (first axis) from pairs side by side to even half, odd half.

    q.k does not change when q and k are reordered alike.
    """
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return np.moveaxis(paired, 2, 1).reshape(rows.shape)


def _normalise(x: jax.Array, axis: int, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) along an axis, in x's dtype (float32)."""
    centred = x - x.mean(axis, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis, keepdims=True) + eps)


def _sum_shards(x: jax.Array) -> jax.Array:
    """Sums partial products [b, S, E] over tp; each device keeps its share of the tokens."""
    return jax.lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True)


def _shard_index(axes: tuple[str, ...]) -> jax.Array:
    """This device's position along several mesh axes, the first one slowest."""
    index = jnp.int32(0)
    for axis in axes:
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return index
