"""The transformer configurations of the published models, for benchmarks that need no weights."""

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
