"""Presets: sizes, lengths and defaults that a model's configuration files do not contain.

Sizes, frame counts, frame rates and defaults come from the model cards. An unpublished model (a
fine-tune of another size, a test model) uses its own sample size.
"""

import dataclasses
import math

from cogvideox.model.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes, lengths and defaults of one model, as trained."""

    name: str
    sizes: tuple[tuple[int, int], ...]  # (height, width) in pixels, default first
    frame_step: int  # valid frame counts are frame_step * N + 1
    max_frames: int
    num_frames: int
    fps: int
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    long_sides: range | None = None  # with the short side of `sizes`, other sizes that it takes

    def takes(self, height: int, width: int) -> bool:
        """Whether the model was trained for a size."""
        if (height, width) in self.sizes:
            return True
        short = min(self.sizes[0])
        return min(height, width) == short and max(height, width) in (self.long_sides or ())

    def describe_sizes(self) -> str:
        """Returns the sizes for a message."""
        if self.long_sides:
            sides, short = self.long_sides, min(self.sizes[0])
            return f"one side {short}, the other {sides[0]} to {sides[-1]} in steps of {sides.step}"
        return ", ".join(f"{h}x{w}" for h, w in self.sizes)

    def nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of the model whose ratio of sides is nearest to that of a picture.

        Source: CogVideo's rule for image-to-video: the short side is fixed, the long side follows
        the ratio.
        """
        if self.long_sides:
            short, sides = min(self.sizes[0]), self.long_sides
            wanted = short * max(height, width) / min(height, width)
            long = min(sides, key=lambda side: (abs(side - wanted), side))
            return (short, long) if width >= height else (long, short)
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))


_V1_0 = Preset(
    name="CogVideoX 1.0",
    sizes=((480, 720),),
    frame_step=8,
    max_frames=49,
    num_frames=49,
    fps=8,
)
_V1_5 = Preset(
    name="CogVideoX 1.5",
    sizes=((768, 1360), (1360, 768), (720, 1280), (1280, 720)),
    frame_step=16,
    max_frames=161,
    num_frames=81,
    fps=16,
)

# Models published by THUDM / zai-org, by the transformer's (num_layers, num_attention_heads).
_PUBLISHED = {
    (30, 30): dataclasses.replace(_V1_0, name="CogVideoX-2b"),
    (42, 48): dataclasses.replace(_V1_0, name="CogVideoX-5b"),
}
_PUBLISHED_V1_5 = {
    (42, 48): dataclasses.replace(_V1_5, name="CogVideoX1.5-5B"),
    # The small model in models/toyworld; its model card has the scores for these defaults.
    (6, 4): Preset(
        name="toyworld",
        sizes=((96, 160),),
        frame_step=16,
        max_frames=17,
        num_frames=17,
        fps=16,
        num_inference_steps=25,
        guidance_scale=2.0,
    ),
}


def preset_for(transformer: TransformerConfig, spatial_factor: int) -> Preset:
    """Returns the preset of a transformer, chosen by its configuration, not by its folder's name.

    Args:
        transformer: configuration of the transformer.
        spatial_factor: pixels per latent along height and width (8 for the published VAEs).
    """
    preset = _preset_for_text(transformer, spatial_factor)
    if not transformer.image_to_video:
        return preset
    free = preset is _PUBLISHED_V1_5[42, 48]  # of CogVideoX1.5-5B-I2V's model card
    return dataclasses.replace(
        preset,
        name=f"{preset.name}-I2V",
        sizes=preset.sizes[:2] if free else preset.sizes,
        long_sides=range(768, 1361, 16) if free else None,
    )


def _preset_for_text(transformer: TransformerConfig, spatial_factor: int) -> Preset:
    is_v1_5 = transformer.patch_size_t is not None
    shape = (transformer.num_layers, transformer.num_attention_heads)
    published = (_PUBLISHED_V1_5 if is_v1_5 else _PUBLISHED).get(shape)
    if published:
        return published
    base = _V1_5 if is_v1_5 else _V1_0
    frames = transformer.sample_frames
    return dataclasses.replace(
        base,
        name=f"custom {base.name} model",
        sizes=(
            (
                transformer.sample_height * spatial_factor,
                transformer.sample_width * spatial_factor,
            ),
        ),
        num_frames=frames,
    )


def check_size(preset: Preset, height: int, width: int, *, multiple: int, any_size: bool) -> None:
    """Checks that the model can compute a size and, unless `any_size`, was trained for it.

    Args:
        multiple: pixels per transformer patch; height and width must be multiples of it.

    Raises:
        ValueError: the size is refused; the message has the argument, its value and the nearest
            valid value.
    """
    for name, value in (("height", height), ("width", width)):
        if value < multiple or value % multiple:
            nearest = max(multiple, round(value / multiple) * multiple)
            raise ValueError(
                f"--{name} {value} is not a positive multiple of {multiple}; nearest: {nearest}"
            )
    if not any_size and not preset.takes(height, width):
        raise ValueError(
            f"--height {height} --width {width} is not a size of {preset.name} "
            f"({preset.describe_sizes()}); "
            "--allow_unsupported computes it all the same"
        )


def check_frames(preset: Preset, num_frames: int, *, temporal_factor: int, any_size: bool) -> None:
    """Checks that the VAE can make a frame count and, unless `any_size`, was trained for it.

    Raises:
        ValueError: the count is refused; the message has the value and the nearest valid counts.
    """
    step = temporal_factor if any_size else preset.frame_step
    limit = None if any_size else preset.max_frames
    own = num_frames == preset.num_frames and num_frames % temporal_factor == 1 % temporal_factor
    if own or (
        num_frames >= 1 and num_frames % step == 1 % step and num_frames <= (limit or num_frames)
    ):
        return
    below = max(1, (num_frames - 1) // step * step + 1)
    nearest = sorted({min(n, limit or n) for n in (below, below + step)})
    raise ValueError(
        f"--num_frames {num_frames} is not {step} * N + 1"
        + (f" up to {limit} ({preset.name})" if limit else "")
        + f"; nearest: {' or '.join(map(str, nearest))}"
        + ("" if any_size else f"; --allow_unsupported allows any {temporal_factor} * N + 1")
    )


def check_video_frames(
    preset: Preset, frames: int, latent_frames: int, *, factor: int, group: int, any_size: bool
) -> None:
    """Checks that a video can be the start of a run, as far as its length matters.

    Args:
        frames: of the video.
        latent_frames: that the VAE makes of them.
        factor: frames per latent frame.
        group: latent frames per token.

    Raises:
        ValueError: the model cannot compute that length or, unless `any_size`, was not trained for
            it; the message has the nearest lengths.
    """
    most = None if any_size else -(-((preset.max_frames - 1) // factor + 1) // group) * group
    least = group if any_size else max(2, group)
    if latent_frames % group == 0 and least <= latent_frames <= (most or latent_frames):
        return
    nearest = max(latent_frames // group * group, -(-least // group) * group)
    nearest = min(nearest, most or nearest)
    raise ValueError(
        f"the video of --video has {frames} frames, {latent_frames} latent frames; {preset.name} "
        + (f"takes them in groups of {group}" if latent_frames % group else "takes")
        + (f"{' and' if latent_frames % group else ''} {least} to {most}" if most else "")
        + f"; nearest: {factor * (nearest - 1) + 1} to {factor * nearest} frames"
    )
