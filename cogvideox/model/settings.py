"""Settings of one denoising run: requested values, model defaults and checks."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cogvideox.model.config import TransformerConfig
from cogvideox.model.folder import ModelFolder
from cogvideox.model.presets import check_frames, check_size, preset_for


@dataclasses.dataclass(frozen=True)
class LatentShape:
    """Shape of the latents of one run, padding frames included."""

    batch: int
    frames: int
    channels: int
    height: int
    width: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """[B, T, C, H, W], in the order of diffusers' pipeline and transformer."""
        return dataclasses.astuple(self)


@dataclasses.dataclass(frozen=True)
class DenoisingSettings:
    """All settings that affect the latents, by diffusers' names, with defaults filled in."""

    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    scheduler: str
    seed: int

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance doubles the batch, as in diffusers."""
        return self.guidance_scale > 1.0

    def describe(self) -> str:
        """Returns a one-line summary for the user."""
        dynamic = " dynamic" if self.use_dynamic_cfg else ""
        return (
            f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps, "
            f"{self.num_inference_steps} {self.scheduler} steps,{dynamic} guidance "
            f"{self.guidance_scale:g}, seed {self.seed}"
        )


# Ten times 161 frames of 768x1360; beyond that, attention alone would take days.
_MOST_TOKENS = 1 << 20

# Requested settings; None takes the model's default.
Wishes = Mapping[str, Any]


def complete_settings(wishes: Wishes, model: ModelFolder, *, any_size: bool) -> DenoisingSettings:
    """Fills unset settings from the model's preset and checks all settings.

    Args:
        wishes: fields of DenoisingSettings; None takes the model's default.
        any_size: accept sizes and frame counts that the model was not trained for.

    Raises:
        ValueError: the model cannot compute a setting; the message has the nearest valid value.
    """
    transformer, vae = model.transformer, model.vae
    _require_text_to_video(transformer)
    spatial = vae.spatial_scale
    preset = preset_for(transformer, spatial)
    defaults = {
        "height": preset.sizes[0][0],
        "width": preset.sizes[0][1],
        "num_frames": preset.num_frames,
        "fps": preset.fps,
        "num_inference_steps": preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale,
        "scheduler": model.scheduler.name,
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    settings = DenoisingSettings(**{**defaults, **given})
    check_size(
        preset,
        settings.height,
        settings.width,
        multiple=spatial * transformer.patch_size,
        any_size=any_size,
    )
    check_frames(
        preset,
        settings.num_frames,
        temporal_factor=vae.temporal_compression_ratio,
        any_size=any_size,
    )
    tokens = (
        settings.height
        * settings.width
        * settings.num_frames
        // ((spatial * transformer.patch_size) ** 2 * vae.temporal_compression_ratio)
    )
    if tokens > _MOST_TOKENS:
        raise ValueError(
            f"--height {settings.height} --width {settings.width} --num_frames "
            f"{settings.num_frames} make {tokens} tokens; at most {_MOST_TOKENS} are computed"
        )
    trained_steps = model.scheduler.num_train_timesteps
    if settings.num_inference_steps > trained_steps:
        raise ValueError(
            f"--num_inference_steps {settings.num_inference_steps} is more than the "
            f"{trained_steps} the model was trained with"
        )
    return settings


def latent_shape(
    settings: DenoisingSettings, model: ModelFolder, batch: int
) -> tuple[LatentShape, int]:
    """Returns the shape to denoise and the number of its leading padding frames.

    CogVideoX 1.5 takes latent frames in groups of patch_size_t. As in diffusers, the first group is
    padded at the front; the padding frames are denoised and then dropped.
    """
    transformer, vae = model.transformer, model.vae
    frames = (settings.num_frames - 1) // vae.temporal_compression_ratio + 1
    padding = -frames % (transformer.patch_size_t or 1)
    spatial = vae.spatial_scale
    height, width = settings.height // spatial, settings.width // spatial
    return LatentShape(batch, frames + padding, transformer.in_channels, height, width), padding


def decoded_frames(latent_frames: int, factor: int) -> int:
    """Returns the number of frames that diffusers' VAE decodes from latent frames.

    Each latent frame gives `factor` frames. With an odd number of latent frames, the first one
    gives a single frame.
    """
    return latent_frames * factor - (factor - 1) * (latent_frames % 2)


def text_tokens(asked: int | None, transformer: TransformerConfig, *, any_length: bool) -> int:
    """Returns the tokens per prompt: as requested, or as the model was trained.

    Args:
        any_length: accept lengths that the model was not trained for.

    Raises:
        ValueError: the model was not trained for that number; or it has sincos positions, whose
            length no option changes.
    """
    own = transformer.max_text_seq_length
    tokens = own if asked is None else asked
    if tokens != own and not transformer.use_rotary_positional_embeddings:
        raise ValueError(
            f"--max_sequence_length {tokens}: this model's positions are made for {own} tokens"
        )
    if tokens != own and not any_length:
        raise ValueError(
            f"--max_sequence_length {tokens} is not what the model was trained for; take {own}, or "
            "allow any with --allow_unsupported"
        )
    return tokens


def _require_text_to_video(config: TransformerConfig) -> None:
    if config.ofs_embed_dim or config.use_learned_positional_embeddings:
        raise ValueError("this is an image-to-video model; only text-to-video models are supported")
