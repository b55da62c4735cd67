"""The transformer configurations of the published models, for benchmarks that need no weights."""

from typing import Any

_COMMON = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "out_channels": 16,
    "patch_size": 2,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
_V1_0 = {"patch_size_t": None, "sample_height": 60, "sample_width": 90, "sample_frames": 49}
_V1_5 = {"patch_size_t": 2, "sample_height": 96, "sample_width": 170, "sample_frames": 81}


def _config(layers: int, heads: int, rotary: bool, generation: dict[str, Any]) -> dict[str, Any]:
    sizes = {"num_layers": layers, "num_attention_heads": heads}
    return {**_COMMON, **generation, **sizes, "use_rotary_positional_embeddings": rotary}


TRANSFORMERS = {
    "CogVideoX1.5-5B": _config(42, 48, True, _V1_5),
    "CogVideoX-5b": _config(42, 48, True, _V1_0),
    "CogVideoX-2b": _config(30, 30, False, _V1_0),
}
