"""How a block attends: q/k norm, rotary embedding, and the kernel that each backend runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchax.interop

from splash_attention import splash_attention
from splash_attention.reference import reference_attention
from splash_attention.sharded import sharded_attention

# A kernel maps q, k, v [B, N, S, D] to the attended values [B, N, S, D].
Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def choose_attention(choice: str, backend: str, dtype: str) -> str:
    """The kernel's name for `choice` (auto, splash, cudnn or reference) on a backend.

    Args:
        backend: jax.default_backend(): "tpu", "gpu" or "cpu".
        dtype: of q, k and v.

    Raises:
        ValueError: the backend cannot run what was asked for.
    """
    if choice == "auto":
        if backend == "tpu":
            return "splash"
        return "cudnn" if backend == "gpu" and dtype == "bfloat16" else "reference"
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(choice, backend)
    if needed != backend:
        raise ValueError(
            f"--attention {choice} needs a {needed.upper()}, this is a {backend.upper()}; "
            "use auto or reference"
        )
    if choice == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"--attention cudnn computes bfloat16 only, not {dtype}; use reference")
    return choice


def make_attention(name: str, mesh: jax.sharding.Mesh) -> Kernel:
    """The kernel `name` over the mesh: batch split over dp, heads over tp."""
    kernels = {"splash": splash_attention, "cudnn": _cudnn, "reference": reference_attention}
    return sharded_attention(kernels[name], mesh)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # jax.nn has the sequence before the heads
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), 1, 2)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis with float32 statistics, in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (normed * weight + bias).astype(x.dtype)


def apply_rotary_emb(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates consecutive pairs of the last axis (diffusers' apply_rotary_emb, unbind_dim=-1).

    Args:
        x: [B, N, S, D].
        cos, sin: [S, D] float32.
    """
    x32 = x.astype(jnp.float32)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    rotated = jnp.where(even, -jnp.roll(x32, -1, axis=-1), jnp.roll(x32, 1, axis=-1))
    return (x32 * cos + rotated * sin).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class AttentionProcessor:
    """The processor of diffusers' CogVideoX attention (CogVideoXAttnProcessor2_0), on JAX."""

    kernel: Kernel

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint self-attention of text and video tokens.

        Args:
            attn: diffusers' Attention module, holding the projections and norms.
            hidden_states: video tokens [B, S_video, E].
            encoder_hidden_states: text tokens [B, S_text, E].
            image_rotary_emb: cos and sin [S_text + S_video, D]; the text rows rotate by nothing.

        Returns:
            The attended video and text tokens.
        """
        text_length = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        norms = [
            None if norm is None else (norm.weight, norm.bias, norm.eps)
            for norm in (attn.norm_q, attn.norm_k)
        ]
        attended = torchax.interop.call_jax(
            self._attend, q, k, v, norms, image_rotary_emb, attn.heads
        )
        attended = attn.to_out[0](attended)
        return attended[:, text_length:], attended[:, :text_length]

    def _attend(self, q, k, v, norms, rotary, heads):
        def split(x: jax.Array) -> jax.Array:  # [B, S, N * D] to [B, N, S, D]
            return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)

        q, k, v = split(q), split(k), split(v)
        q, k = (
            x if norm is None else layer_norm(x, *norm)
            for x, norm in zip((q, k), norms, strict=True)
        )
        if rotary is not None:
            q, k = (apply_rotary_emb(x, *rotary) for x in (q, k))
        attended = jnp.swapaxes(self.kernel(q, k, v), 1, 2)
        return attended.reshape(*attended.shape[:2], -1)
