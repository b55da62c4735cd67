"""Small random models in diffusers layout, for every generation and positional scheme."""

import string
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

# Generation: what its transformer config says of patches and positions.
GENERATIONS = {
    "1.5": {"patch_size_t": 2, "use_rotary_positional_embeddings": True},
    "1.0-rope": {"patch_size_t": None, "use_rotary_positional_embeddings": True},
    "1.0-sincos": {"patch_size_t": None, "use_rotary_positional_embeddings": False},
}


def make_tokenizer() -> transformers.T5Tokenizer:
    """A character tokenizer: every printable character is a token, so lengths are plain."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.printable[:94]]
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def save_tiny_model(
    folder: Path,
    generation: str = "1.5",
    *,
    num_attention_heads: int = 2,
    attention_head_dim: int = 16,
    num_layers: int = 2,
    sample_height: int = 8,
    sample_width: int = 10,
    sample_frames: int = 17,
    max_text_seq_length: int = 16,
    scheduler: type = diffusers.CogVideoXDPMScheduler,
    block_out_channels: tuple[int, ...] = (16, 16, 32, 32),
    seed: int = 0,
    image_to_video: bool = False,
    invert_scale_latents: bool = False,
    **transformer_config: object,
) -> Path:
    """Saves a random CogVideoX whose every part matters, in the layout of the published ones.

    Near-constant parameters are drawn anew, so that a wrong shift, gate, norm or bias shows in the
    output. Image-to-video models are like 1.5-5B-I2V with `ofs`, or 5b-I2V with learned positions.
    """
    torch.manual_seed(seed)
    if image_to_video and generation == "1.5":
        transformer_config = {"ofs_embed_dim": 32, **transformer_config}
    if image_to_video and generation == "1.0-rope":
        transformer_config = {"use_learned_positional_embeddings": True, **transformer_config}
    tokenizer = make_tokenizer()
    text_encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
        )
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        num_layers=num_layers,
        in_channels=16 if image_to_video else 8,
        out_channels=8,
        time_embed_dim=32,
        text_embed_dim=32,
        sample_height=sample_height,
        sample_width=sample_width,
        sample_frames=sample_frames,
        max_text_seq_length=max_text_seq_length,
        **GENERATIONS[generation],
        **transformer_config,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=block_out_channels,
        **_block_types(len(block_out_channels)),
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=0.7 if generation == "1.5" else 1.15258426,
        invert_scale_latents=invert_scale_latents,
    )
    if transformer_config.get("use_learned_positional_embeddings"):
        table = transformer.patch_embed.pos_embedding
        table.data = 0.5 * torch.randn_like(table)
    _draw_vectors(transformer)
    _draw_vectors(vae)
    kinds = diffusers.CogVideoXPipeline, diffusers.CogVideoXImageToVideoPipeline
    pipeline = kinds[image_to_video](
        tokenizer,
        text_encoder,
        vae,
        transformer,
        scheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0 if generation == "1.5" else 3.0,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )
    pipeline.save_pretrained(folder)
    return folder


def _block_types(levels: int) -> dict[str, Any]:
    return {
        "down_block_types": ("CogVideoXDownBlock3D",) * levels,
        "up_block_types": ("CogVideoXUpBlock3D",) * levels,
    }


def _draw_vectors(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            noise = 0.1 * torch.randn_like(parameter)
            parameter.data = noise + (1.0 if "norm" in name and "weight" in name else 0.0)
