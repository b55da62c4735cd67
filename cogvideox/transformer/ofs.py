"""The `ofs` embedding of CogVideoX1.5-5B-I2V, folded into a bias.

diffusers embeds the constant 2.0 and adds it to the embedding of the timestep, which ends with a
bias. So the sum of both biases makes the same vectors, and the step's program is that of the other
models.
"""

from collections.abc import Mapping

import numpy as np

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.parameters import OFS
from runtime.tensor_files import StoredTensor

FOLDED_INTO = "time_embedding.linear_2.bias"

_VALUE = 2.0  # fixed by CogVideoXImageToVideoPipeline


def ofs_embedding(config: TransformerConfig, stored: Mapping[str, StoredTensor]) -> np.ndarray:
    """Computes what `ofs` adds to the embedding of every timestep: float32 [time_embed_dim].

    Source: diffusers' Timesteps and TimestepEmbedding.
    """
    assert config.ofs_embed_dim is not None
    half = config.ofs_embed_dim // 2
    exponents = np.arange(half, dtype=np.float32) / np.float32(half - config.freq_shift)
    angles = np.float32(_VALUE) * np.exp(np.float32(-np.log(10_000)) * exponents)
    waves = [np.sin(angles), np.cos(angles)]
    x = np.concatenate(waves[::-1] if config.flip_sin_to_cos else waves)

    def linear(number: int, x: np.ndarray) -> np.ndarray:
        weight, bias = (
            stored[f"{OFS}linear_{number}.{kind}"].mapped().astype(np.float32)
            for kind in ("weight", "bias")
        )
        return weight @ x + bias

    return linear(2, _activate(config.timestep_activation_fn, linear(1, x)))


def _activate(name: str, x: np.ndarray) -> np.ndarray:
    """Applies one of diffusers' activations of the timestep in float32."""
    import jax

    functions = {
        "silu": jax.nn.silu,
        "swish": jax.nn.silu,
        "mish": jax.nn.mish,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "relu": jax.nn.relu,
    }
    return np.asarray(functions[name](x))
