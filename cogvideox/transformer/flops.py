"""Floating-point operations of the transformer."""

from cogvideox.model.config import TransformerConfig


def step_flops(config: TransformerConfig, tokens: int, samples: int) -> dict[str, float]:
    """Operations of one denoising step: attention, and everything linear.

    A multiplication and an addition count as two. Attention has two products of [S, S, E]; a block
    has 12 E^2 weights that multiply every token.

    Args:
        tokens: S, of text and video.
        samples: of the transformer's batch; guidance doubles it.
    """
    blocks = samples * config.num_layers
    return {
        "attention": blocks * 4.0 * tokens**2 * config.width,
        "linear": blocks * 24.0 * tokens * config.width**2,
    }
