"""A VAE folder in diffusers' layout: its configuration and the weights that decoding needs."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from cogvideox.model.folder import StoredTensor, check_names_and_shapes, stored_tensors

# Present in every full VAE, of no use to a decoder.
_NOT_FOR_DECODING = ("encoder.", "quant_conv.")

MID_RESNETS = 2  # CogVideoXDecoder3D fixes it


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """What a decoder's shape depends on, by diffusers' names and with diffusers' defaults."""

    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_num_groups: int = 32
    temporal_compression_ratio: float = 4
    scaling_factor: float = 1.15258426
    use_post_quant_conv: bool = False

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if self.up_block_types != ("CogVideoXUpBlock3D",) * levels:
            raise ValueError(
                f"VAE config: up_block_types must be {levels} times CogVideoXUpBlock3D, as many as "
                f"block_out_channels, not {list(self.up_block_types)}"
            )
        if self.act_fn not in ("silu", "swish"):
            raise ValueError(f"VAE config: act_fn must be silu, not {self.act_fn!r}")
        unequal = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if unequal:
            raise ValueError(
                f"VAE config: block_out_channels {unequal} do not divide into "
                f"norm_num_groups={self.norm_num_groups}"
            )
        if self.use_post_quant_conv and self.out_channels != self.latent_channels:
            # diffusers builds that convolution for out_channels and applies it to the latents.
            raise ValueError(
                f"VAE config: use_post_quant_conv needs out_channels={self.out_channels} equal to "
                f"latent_channels={self.latent_channels}"
            )

    @classmethod
    def from_folder(cls, vae_folder: Path) -> "VaeConfig":
        """Read `config.json`; keys that do not matter to decoding are left alone."""
        path = Path(vae_folder) / "config.json"
        values = json.loads(path.read_text())
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
                if name in known
            }
        )

    @property
    def time_levels(self) -> int:
        """Up blocks, from the deepest, that double the frames too."""
        return int(math.log2(self.temporal_compression_ratio))

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along the height and the width."""
        return 2 ** (len(self.block_out_channels) - 1)


def arrange(weight: np.ndarray) -> np.ndarray:
    """A decoder's weight from diffusers' order to the one its layers compute with.

    Convolutions become the matrices of the products that compute them, because a TPU pads the
    small axes of a kernel to whole tiles, and the phases of the upsamplers are summed in float32.

    Args:
        weight: a vector; or [C', C, 1, 1, 1]; or [C', C, frames, rows, columns] of 3 each; or
            [C', C, rows, columns] of 3 each, which is an upsampler's.

    Returns:
        The vector; or [C, C']; or [3 (frames) 3 (columns) C, 3 (rows) C']; or
        [2 (side), 2 (columns) C, 2 (parity) 2 (rows) C']: for the left or right, even or odd of
        the pixels that a pixel is doubled to, the weights of the two columns and the two rows that
        it then reads (for the left or even one the pixel before and the pixel itself).
    """
    if weight.ndim == 1:
        return weight
    out_channels, channels = weight.shape[:2]
    if weight.shape[2:] == (1, 1, 1):
        return weight.reshape(out_channels, channels).T
    if weight.ndim == 5:
        return weight.transpose(2, 4, 1, 3, 0).reshape(9 * channels, 3 * out_channels)
    first, middle, last = np.moveaxis(weight.astype(np.float32), 2, 0)
    by_row = np.stack([first, middle + last, first + middle, last])  # [parity row, C', C, columns]
    first, middle, last = np.moveaxis(by_row, 3, 0)
    both = np.stack(
        [first, middle + last, first + middle, last]
    )  # [side column, parity row, C', C]
    both = both.transpose(0, 3, 1, 2).reshape(2, 2 * channels, 4 * out_channels)
    return both  # float32: rounded to the run's dtype once, by the caller


def arranged_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `arrange`'s result for a weight of this shape."""
    return arrange(np.broadcast_to(np.float32(0), shape)).shape


def weight_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Every weight that decoding needs, by diffusers' name, from the config alone.

    Source: diffusers' CogVideoXDecoder3D, whose state_dict a test compares.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    widths, latent = config.block_out_channels[::-1], config.latent_channels

    def conv(name: str, out: int, inputs: int, *size: int) -> None:
        shapes[f"{name}.weight"] = (out, inputs, *size)
        shapes[f"{name}.bias"] = (out,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.norm_layer.weight"] = shapes[f"{name}.norm_layer.bias"] = (channels,)
        for part in ("conv_y", "conv_b"):
            conv(f"{name}.{part}.conv", channels, latent, 1, 1, 1)

    def resnet(name: str, inputs: int, out: int) -> None:
        for number, channels in (("1", inputs), ("2", out)):
            norm(f"{name}.norm{number}", channels)
            conv(f"{name}.conv{number}.conv", out, channels, 3, 3, 3)
        if inputs != out:
            conv(f"{name}.conv_shortcut", out, inputs, 1, 1, 1)

    if config.use_post_quant_conv:
        conv("post_quant_conv", latent, latent, 1, 1, 1)
    conv("decoder.conv_in.conv", widths[0], latent, 3, 3, 3)
    for i in range(MID_RESNETS):
        resnet(f"decoder.mid_block.resnets.{i}", widths[0], widths[0])
    for level, out in enumerate(widths):
        block, before = f"decoder.up_blocks.{level}", widths[max(level - 1, 0)]
        for i in range(config.layers_per_block + 1):
            resnet(f"{block}.resnets.{i}", out if i else before, out)
        if level < len(widths) - 1:
            conv(f"{block}.upsamplers.0.conv", out, out, 3, 3)
    norm("decoder.norm_out", widths[-1])
    conv("decoder.conv_out.conv", config.out_channels, widths[-1], 3, 3, 3)
    return shapes


def stored_weights(vae_folder: Path, config: VaeConfig) -> dict[str, StoredTensor]:
    """The headers of exactly the weights that decoding needs.

    Args:
        vae_folder: holds one safetensors file, or several and their index.

    Raises:
        ValueError: files are absent or damaged, or tensors are missing, extra or of another shape;
            the message lists all of them.
    """
    shapes = weight_shapes(config)
    stored = stored_tensors(Path(vae_folder))
    stored = {name: t for name, t in stored.items() if not name.startswith(_NOT_FOR_DECODING)}
    check_names_and_shapes(stored, shapes, what="the VAE")
    return {name: stored[name] for name in shapes}
