"""The transformer block in JAX: diffusers' CogVideoXBlock on a device mesh.

All blocks run as one `lax.scan` inside one `shard_map`; the collectives are explicit:

- dp splits the batch (classifier-free guidance doubles it);
- sp splits the tokens; for attention, token shards become head shards, and each device has all
  tokens, text included, of its heads (DeepSpeed Ulysses, arXiv 2309.14509);
- tp splits the heads and the MLP's columns; it splits norms and residuals by tokens, so no work is
  repeated (Megatron sequence parallelism, arXiv 2205.05198).

Text and video stay one sequence, distinguished by position. Splitting and concatenating them would
copy all tokens each time and lose the sharding.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cogvideox.transformer.activations import ACTIVATIONS
from cogvideox.transformer.backends.base import Backend, Bounds, Listed, Queries
from cogvideox.transformer.collectives import gather_over_tp, own_heads, row_indices, sum_over_tp
from cogvideox.transformer.linear import linear, linear_to_tokens_first
from cogvideox.transformer.norms import Rotary, longest_row
from cogvideox.transformer.sparse_step import SparseTables
from splash_attention import BlockLists

# Parameters of one layer by diffusers' names inside the block, split over tp.
Parameters = Mapping[str, jax.Array]

# Parameters whose first or last axis has the heads.
_HEADS_FIRST = [
    f"attn1.{name}.{kind}" for name in ("to_q", "to_k", "to_v") for kind in ("weight", "bias")
]
_HEADS_LAST = "attn1.to_out.0.weight"


@dataclasses.dataclass(frozen=True)
class Block:
    """Static configuration of a block; its parameters are arguments.

    Attributes:
        head_dim: D.
        norm_eps: epsilon of the two LayerNorms.
        activation: activation of the MLP, a key of ACTIVATIONS.
        text_tokens: number of text tokens; they come first.
        tokens: number of text and video tokens, without the padding at the end.
        backend: runs the norms, attention and its projections.
        lists: of the keys to attend to, in a sparse step; its arrays are arguments.
    """

    head_dim: int
    norm_eps: float
    activation: str
    text_tokens: int
    tokens: int
    backend: Backend
    lists: BlockLists | None = None

    def __call__(
        self,
        x: jax.Array,
        parameters: Parameters,
        temb: jax.Array,
        rotary: Rotary | None,
        sparse: SparseTables[jax.Array] | None = None,
    ) -> jax.Array:
        """Runs one block on one device.

        Args:
            x: [b, s, E], this device's batch and tokens (split over sp, then tp).
            parameters: parameters of this layer.
            temb: time embedding [b, time_embed_dim].
            rotary: cos and sin [D / 2, S] float32.
            sparse: in a sparse step, with the heads of this layer.

        Returns:
            [b, s, E].
        """
        modulated, gate = self._modulate(parameters, "norm1", x, temb)
        if sparse is not None and sparse.order is not None:
            parameters = order_heads(parameters, sparse.order)
        x = x + gate * self._attention(parameters, modulated, rotary, sparse)
        modulated, gate = self._modulate(parameters, "norm2", x, temb)
        return x + gate * self._mlp(parameters, modulated)

    @jax.named_scope("modulate")
    def _modulate(
        self, parameters: Parameters, norm: str, x: jax.Array, temb: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Applies CogVideoXLayerNormZero; returns modulated x [b, E, s] and the gate [b, s, E]."""
        weight, bias = parameters[f"{norm}.linear.weight"], parameters[f"{norm}.linear.bias"]
        six = linear(jax.nn.silu(temb), weight, bias)
        six = gather_over_tp(six, axis=1).astype(jnp.float32)
        # Shift, scale and gate of video, then of text; [b, 2, E] each, text first.
        video_and_text = six.reshape(six.shape[0], 2, 3, -1)
        shift, scale, gate = (video_and_text[:, ::-1, i] for i in range(3))
        # Fold in the norm's own weight and bias.
        factor = parameters.get(f"{norm}.norm.weight", 1.0) * (1 + scale)
        shift = parameters.get(f"{norm}.norm.bias", 0.0) * (1 + scale) + shift
        rows = row_indices(x.shape[1])
        text_rows = jnp.clip(self.text_tokens - rows[0], 0, rows.size)
        modulated = self.backend.norm_and_modulate(x, factor, shift, text_rows, self.norm_eps)
        gate = jnp.where((rows < self.text_tokens)[:, None], gate[:, :1], gate[:, 1:])
        return modulated, gate.astype(x.dtype)

    def _attention(
        self,
        parameters: Parameters,
        modulated: jax.Array,
        rotary: Rotary | None,
        sparse: SparseTables[jax.Array] | None,
    ) -> jax.Array:
        """Computes joint attention of text and video: modulated [b, E, s] to [b, s, E]."""
        with jax.named_scope("qkv"):
            modulated = gather_over_tp(modulated, axis=2)
            names = [f"attn1.{name}" for name in ("to_q", "to_k", "to_v")]
            q, k, v = (
                self.backend.project(
                    modulated, parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
                )
                for name in names
            )
        with jax.named_scope("norm_rotate"):
            weight_q, bias_q, weight_k, bias_k = (
                parameters[f"attn1.{name}"].astype(jnp.float32)
                for name in ("norm_q.weight", "norm_q.bias", "norm_k.weight", "norm_k.bias")
            )
            # The rotation is linear: scaling the norm's parameters scales q.
            scale = self.backend.query_scale(self.head_dim)
            weight_q, bias_q = weight_q * scale, bias_q * scale
            scores = longest_row(weight_q, bias_q) * longest_row(weight_k, bias_k)
            keys = self.tokens if sparse is None else self._listed(sparse)
            norms = (weight_q, bias_q), (weight_k, bias_k)
            q, k = self.backend.queries_and_keys(q, k, *norms, rotary, keys)
            v, values = self.backend.values(v)
        with jax.named_scope("attention"):
            out = self._attend(q, k, v, keys, Bounds(scores, values))
        with jax.named_scope("out"):
            out = self.backend.project_out(out, parameters["attn1.to_out.0.weight"])
            return sum_over_tp(out) + parameters["attn1.to_out.0.bias"]

    def _attend(
        self, q: Queries, k: jax.Array, v: jax.Array, keys: int | Listed, bounds: Bounds
    ) -> jax.Array:
        return self.backend.attend(q, k, v, self.head_dim, keys, bounds)

    def _listed(self, sparse: SparseTables[jax.Array]) -> Listed:
        """Returns the lists, and the rules of this device's heads."""
        assert self.lists is not None
        lists = dataclasses.replace(self.lists, **sparse.lists)
        return Listed(lists, own_heads(sparse.rule, ("tp", "sp")))

    @jax.named_scope("mlp")
    def _mlp(self, parameters: Parameters, modulated: jax.Array) -> jax.Array:
        """Computes the MLP: modulated [b, E, s] to [b, s, E]."""
        modulated = gather_over_tp(modulated, axis=2)
        hidden = linear_to_tokens_first(modulated, parameters["ff.net.0.proj.weight"])
        if "ff.net.0.proj.bias" in parameters:
            hidden = hidden + parameters["ff.net.0.proj.bias"]
        hidden = ACTIVATIONS[self.activation](hidden)
        out = linear(hidden, parameters["ff.net.2.weight"])
        return sum_over_tp(out) + parameters["ff.net.2.bias"]


def order_heads(parameters: Parameters, order: jax.Array) -> Parameters:
    """Moves the heads of attention's projections to other places on this device along tp.

    The output projection takes them from there, so the result changes only by rounding.

    Args:
        order: int32 [N], the head at each place, of all devices; it stays on its device along tp.
    """
    own = own_heads(order, ("tp",))
    own = own - own.size * jax.lax.axis_index("tp")
    moved = dict(parameters)
    for name, axis in [(name, 0) for name in _HEADS_FIRST] + [(_HEADS_LAST, 1)]:
        if name in parameters:
            x = parameters[name]
            shape = (*x.shape[:axis], own.size, -1, *x.shape[axis + 1 :])
            moved[name] = jnp.take(x.reshape(shape), own, axis=axis).reshape(x.shape)
    return moved
