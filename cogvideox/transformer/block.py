"""The transformer block in JAX: what diffusers' CogVideoXBlock computes, laid out for a mesh.

All blocks run as one `lax.scan` inside one `shard_map`, so every collective is written out:

- dp splits the batch (classifier-free guidance doubles it);
- sp splits the tokens; around attention token shards become head shards (`exchange`), and each
  device sees all tokens, text included, for its heads (DeepSpeed Ulysses, arXiv 2309.14509);
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

from cogvideox.transformer.attention import AttentionKernel, Bounds
from cogvideox.transformer.qk_norm import Rotary, longest_row

Weights = Mapping[str, jax.Array]


def _gated(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Half the columns, times the activation of the other half."""

    def apply(x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(x, 2, axis=-1)
        return hidden * activation(gate)

    return apply


# By diffusers' names; every shard of a gated one needs both halves of its columns.
GATED = {
    "geglu": _gated(lambda x: jax.nn.gelu(x, approximate=False)),
    "swiglu": _gated(jax.nn.silu),
}
ACTIVATIONS = GATED | {
    "gelu-approximate": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "linear-silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Block:
    """The static facts of a block; the weights are arguments.

    Attributes:
        head_dim: D.
        norm_eps: of the two LayerNorms.
        activation: of the MLP, a key of ACTIVATIONS.
        text_tokens: the first tokens of the sequence are text.
        tokens: text and video tokens, without the padding at the end.
        kernel: the attention of one device.
    """

    head_dim: int
    norm_eps: float
    activation: str
    text_tokens: int
    tokens: int
    kernel: AttentionKernel

    def __call__(
        self,
        x: jax.Array,
        weights: Weights,
        temb: jax.Array,
        rotary: Rotary | None,
    ) -> jax.Array:
        """One block on one device.

        Args:
            x: [b, s, E], this device's batch and tokens (split over sp, then tp).
            weights: of one layer, by diffusers' names inside the block, split over tp.
            temb: [b, time_embed_dim], the time embedding.
            rotary: cos and sin [D / 2, S] float32.

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
        """CogVideoXLayerNormZero: x normed and modulated [b, E, s], and the gate [b, s, E]."""
        six = jax.nn.silu(temb) @ weights[f"{norm}.linear.weight"].T
        six = six + weights[f"{norm}.linear.bias"]
        six = _gather(six, axis=1).astype(jnp.float32)
        # Shift, scale and gate of video, then of text; [b, 2, E] each, text first.
        video_and_text = six.reshape(six.shape[0], 2, 3, -1)
        shift, scale, gate = (video_and_text[:, ::-1, i] for i in range(3))
        # The norm's own weight and bias are folded in.
        factor = weights.get(f"{norm}.norm.weight", 1.0) * (1 + scale)
        shift = weights.get(f"{norm}.norm.bias", 0.0) * (1 + scale) + shift
        rows = row_indices(x.shape[1])
        text_rows = jnp.clip(self.text_tokens - rows[0], 0, rows.size)
        modulated = self.kernel.norm_and_modulate(x, factor, shift, text_rows, self.norm_eps)
        gate = jnp.where((rows < self.text_tokens)[:, None], gate[:, :1], gate[:, 1:])
        return modulated, gate.astype(x.dtype)

    def _attention(self, weights: Weights, x: jax.Array, rotary: Rotary | None) -> jax.Array:
        """x [b, E, s] to [b, s, E]."""
        x = _gather(x, axis=2)
        q, k, v = (
            self.kernel.project(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
            for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v")
        )
        norm_q, norm_k = (
            [weights[f"attn1.{norm}.{kind}"].astype(jnp.float32) for kind in ("weight", "bias")]
            for norm in ("norm_q", "norm_k")
        )
        # The rotation is linear, so what scales the norm's parameters scales q.
        norm_q = [part * self.kernel.query_scale(self.head_dim) for part in norm_q]
        scores = longest_row(*norm_q) * longest_row(*norm_k)
        q = self.kernel.queries(q, *norm_q, rotary)
        k = self.kernel.keys(k, *norm_k, rotary)
        v, values = self.kernel.values(v)
        out = self.kernel.attend(q, k, v, self.head_dim, self.tokens, Bounds(scores, values))
        out = self.kernel.project_out(out, weights["attn1.to_out.0.weight"])
        return _sum_shards(out) + weights["attn1.to_out.0.bias"]

    def _mlp(self, weights: Weights, x: jax.Array) -> jax.Array:
        """x [b, E, s] to [b, s, E]."""
        x = _gather(x, axis=2)
        hidden = jnp.einsum("bis,oi->bso", x, weights["ff.net.0.proj.weight"])
        if "ff.net.0.proj.bias" in weights:
            hidden = hidden + weights["ff.net.0.proj.bias"]
        hidden = ACTIVATIONS[self.activation](hidden)
        return _sum_shards(hidden @ weights["ff.net.2.weight"].T) + weights["ff.net.2.bias"]


# XLA's CPU backend keeps collectives among one device, each a copy; these leave them out.


def _gather(x: jax.Array, axis: int) -> jax.Array:
    """The parts of an axis that lie on the devices along tp, joined."""
    return x if jax.lax.axis_size("tp") == 1 else jax.lax.all_gather(x, "tp", axis=axis, tiled=True)


def _sum_shards(x: jax.Array) -> jax.Array:
    """Sums partial products [b, S, E] over tp; each device keeps its share of the tokens."""
    if jax.lax.axis_size("tp") == 1:
        return x
    return jax.lax.psum_scatter(x, "tp", scatter_dimension=1, tiled=True)


def row_indices(count: int) -> jax.Array:
    """Where this device's `count` rows lie in the whole sequence, [count] int32."""
    shard = jax.lax.axis_index("sp") * jax.lax.axis_size("tp") + jax.lax.axis_index("tp")
    return shard * count + jnp.arange(count)


def text_rows_first(text: jax.Array, video: jax.Array) -> jax.Array:
    """This device's rows of the joint sequence.

    Args:
        text: [b, S_text, E], all text tokens.
        video: [b, s, E], this device's rows, whatever they hold where text belongs.
    """
    rows = row_indices(video.shape[1])
    # Rows of text at and after this device's first one, filled up to s with anything.
    follow = jnp.pad(text, ((0, 0), (0, video.shape[1]), (0, 0)))
    first = jnp.minimum(rows[0], text.shape[1])
    own = jax.lax.dynamic_slice_in_dim(follow, first, video.shape[1], axis=1)
    return jnp.where((rows < text.shape[1])[:, None], own, video)
