"""The transformer configurations of the published models, for benchmarks that need no weights."""

import dataclasses

from cogvideox.model.config import TransformerConfig

TRANSFORMERS = {
    "CogVideoX1.5-5B": TransformerConfig(
        num_layers=42,
        num_attention_heads=48,
        patch_size_t=2,
        sample_height=96,
        sample_width=170,
        sample_frames=81,
        use_rotary_positional_embeddings=True,
    ),
    "CogVideoX-5b": TransformerConfig(
        num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True
    ),
    "CogVideoX-2b": TransformerConfig(num_layers=30, num_attention_heads=30),
}
TRANSFORMERS["CogVideoX1.5-5B-I2V"] = dataclasses.replace(
    TRANSFORMERS["CogVideoX1.5-5B"], in_channels=32, ofs_embed_dim=512
)
TRANSFORMERS["CogVideoX-5b-I2V"] = dataclasses.replace(
    TRANSFORMERS["CogVideoX-5b"], in_channels=32, use_learned_positional_embeddings=True
)
