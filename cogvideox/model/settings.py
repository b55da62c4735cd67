"""Settings of one denoising run: requested values, model defaults and checks."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from cogvideox.model.config import TransformerConfig
from cogvideox.model.folder import ModelFolder
from cogvideox.model.presets import Preset, check_frames, check_size, check_video_frames, preset_for
from runtime.json_files import read_json_object


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
    strength: float | None = None  # of video-to-video: the share of the steps that run

    @property
    def executed_steps(self) -> int:
        """Number of steps that run: the last ones of `num_inference_steps`.

        Source: CogVideoXVideoToVideoPipeline.get_timesteps, which cuts the product off.
        """
        if self.strength is None:
            return self.num_inference_steps
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    @property
    def shown_steps(self) -> str:
        """The number of steps for people: "50", or "28 of 50" if a strength leaves some out."""
        steps = str(self.num_inference_steps)
        return steps if self.strength is None else f"{self.executed_steps} of {steps}"

    def to_json(self) -> dict[str, Any]:
        """Returns the settings by name; a strength only if there is one.

        So runs of text and images keep the fingerprints that they had before there were videos.
        """
        settings = dataclasses.asdict(self)
        if self.strength is None:
            del settings["strength"]
        return settings

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance doubles the batch, as in diffusers."""
        return self.guidance_scale > 1.0

    def describe(self) -> str:
        """Returns a one-line summary for the user."""
        dynamic = " dynamic" if self.use_dynamic_cfg else ""
        strength = "" if self.strength is None else f"strength {self.strength:g}, "
        return (
            f"{self.width}x{self.height}, {self.num_frames} frames at {self.fps} fps, "
            f"{self.shown_steps} {self.scheduler} steps,{dynamic} guidance "
            f"{self.guidance_scale:g}, {strength}seed {self.seed}"
        )


# Ten times 161 frames of 768x1360; beyond that, attention alone would take days.
_MOST_TOKENS = 1 << 20

# Requested settings; None takes the model's default.
Wishes = Mapping[str, Any]

DEFAULT_STRENGTH = 0.8  # CogVideoXVideoToVideoPipeline's


@dataclasses.dataclass(frozen=True)
class Condition:
    """The image or video that a run starts from, after it was fitted to a size.

    Attributes:
        frames: of the video; 1 for an image.
    """

    kind: Literal["image", "video"]
    height: int
    width: int
    frames: int = 1


def complete_settings(
    wishes: Wishes, model: ModelFolder, *, any_size: bool, condition: Condition | None = None
) -> DenoisingSettings:
    """Fills unset settings from the model's preset and checks all settings.

    Args:
        wishes: fields of DenoisingSettings; None takes the model's default.
        any_size: accept sizes and frame counts that the model was not trained for.
        condition: what stage 1 encoded besides the text; decides the size, and the length if it is
            a video.

    Raises:
        ValueError: the model cannot compute a setting, or needs another condition; the message has
            the nearest valid value.
    """
    transformer, vae = model.transformer, model.vae
    check_condition(model, condition)
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
    if condition is not None:
        given |= _from_condition(condition, given, preset, model, any_size=any_size)
    elif "strength" in given:
        raise ValueError(f"--strength {given['strength']:g} is for a video: stage 1's --video")
    settings = DenoisingSettings(**{**defaults, **given})
    check_size(
        preset,
        settings.height,
        settings.width,
        multiple=spatial * transformer.patch_size,
        any_size=any_size,
    )
    if settings.strength is None:
        check_frames(
            preset,
            settings.num_frames,
            temporal_factor=vae.temporal_compression_ratio,
            any_size=any_size,
        )
    elif settings.executed_steps < 1:
        raise ValueError(
            f"--strength {settings.strength:g} runs none of {settings.num_inference_steps} steps; "
            f"take at least {1 / settings.num_inference_steps:.3g}"
        )
    if transformer.use_learned_positional_embeddings:
        _check_learned_positions(settings, model)
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
    return LatentShape(batch, frames + padding, transformer.out_channels, height, width), padding


def decoded_frames(latent_frames: int, factor: int) -> int:
    """Returns the number of frames that diffusers' VAE decodes from latent frames.

    Each latent frame gives `factor` frames. With an odd number of latent frames, the first one
    gives a single frame.
    """
    return latent_frames * factor - (factor - 1) * (latent_frames % 2)


def encoded_frames(frames: int, factor: int) -> int:
    """Returns the number of latent frames that diffusers' VAE encodes frames to.

    It halves the frames log2(factor) times, in batches of eight; those that remain join the first.
    """
    first = frames % 8 + 8 if frames > 8 else frames
    return -(-first // factor) + (frames - first) // 8 * max(1, 8 // factor)


def text_tokens(asked: int | None, transformer: TransformerConfig, *, any_length: bool) -> int:
    """Returns the tokens per prompt: as requested, or as the model was trained.

    Args:
        any_length: accept lengths that the model was not trained for.

    Raises:
        ValueError: the model was not trained for that number; or it has sincos or learned
            positions, whose length no option changes.
    """
    own = transformer.max_text_seq_length
    tokens = own if asked is None else asked
    fixed = transformer.use_learned_positional_embeddings
    if tokens != own and (fixed or not transformer.use_rotary_positional_embeddings):
        raise ValueError(
            f"--max_sequence_length {tokens}: this model's positions are made for {own} tokens"
        )
    if tokens != own and not any_length:
        raise ValueError(
            f"--max_sequence_length {tokens} is not what the model was trained for; take {own}, or "
            "allow any with --allow_unsupported"
        )
    return tokens


def check_supported(model: ModelFolder) -> None:
    """Checks that the model is one of text-to-video or image-to-video.

    Raises:
        ValueError: it is of the Fun family, or has other channels.
    """
    config = model.transformer
    kind = str(read_json_object(model.path / "model_index.json").get("_class_name"))
    fun = "-Fun-" in f"{model.model_id}-" or "Fun" in kind
    if fun or config.in_channels not in (config.out_channels, 2 * config.out_channels):
        raise ValueError(
            f"{model.model_id}: CogVideoX-Fun models and others of {config.in_channels} input "
            f"channels are not supported; take a text-to-video model ({config.out_channels} "
            f"channels) or an image-to-video model ({2 * config.out_channels}) of CogVideoX"
        )


def check_condition(model: ModelFolder, condition: Condition | None) -> None:
    """Checks that a model takes an image, a video or neither.

    Raises:
        ValueError: it needs another one; see also `check_supported`.
    """
    check_supported(model)
    kind = None if condition is None else condition.kind
    if model.transformer.image_to_video and kind != "image":
        given = "--video is for text-to-video models; " if kind else ""
        raise ValueError(
            f"{given}this is an image-to-video model: give stage 1 an image (--image FILE)"
        )
    if not model.transformer.image_to_video and kind == "image":
        raise ValueError(
            "--image needs an image-to-video model, such as zai-org/CogVideoX1.5-5B-I2V; this is a "
            "text-to-video model"
        )


def likely_condition(model: ModelFolder, height: int | None, width: int | None) -> Condition | None:
    """Returns the condition that a model needs, to make programs before there is an image.

    Args:
        height, width: None takes the model's default.
    """
    if not model.transformer.image_to_video:
        return None
    default = preset_for(model.transformer, model.vae.spatial_scale).sizes[0]
    return Condition("image", height or default[0], width or default[1])


def _from_condition(
    condition: Condition, given: Mapping[str, Any], preset: Preset, model: ModelFolder, *,
    any_size: bool,
) -> dict[str, Any]:  # fmt: skip
    """Returns the settings that an image or a video decides.

    Raises:
        ValueError: they differ from those that were given, or the model cannot compute them.
    """
    decided: dict[str, Any] = {"height": condition.height, "width": condition.width}
    if condition.kind == "video":
        factor = model.vae.temporal_compression_ratio
        latent_frames = encoded_frames(condition.frames, factor)
        check_video_frames(
            preset, condition.frames, latent_frames, factor=factor,
            group=model.transformer.patch_size_t or 1, any_size=any_size,
        )  # fmt: skip
        decided["num_frames"] = decoded_frames(latent_frames, factor)
    elif "strength" in given:
        raise ValueError(f"--strength {given['strength']:g} is for --video, not for --image")
    for name, value in decided.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"--{name} {given[name]}: the {condition.kind} was encoded for {value}; leave the "
                f"argument out, or run stage1_text_encoder.py with it"
            )
    if condition.kind == "video":
        decided["strength"] = given.get("strength", DEFAULT_STRENGTH)
    return decided


def _check_learned_positions(settings: DenoisingSettings, model: ModelFolder) -> None:
    """Checks that the table of learned positions is for this size and length.

    Raises:
        ValueError: it is not. diffusers ignores the table for another length.
    """
    config, spatial = model.transformer, model.vae.spatial_scale
    own = {
        "height": config.sample_height * spatial,
        "width": config.sample_width * spatial,
        "num_frames": config.sample_frames,
    }
    for name, value in own.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"--{name} {getattr(settings, name)}: this model's learned positions are made for "
                f"{own['height']}x{own['width']} and {own['num_frames']} frames; take {value}"
            )
