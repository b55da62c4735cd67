"""Weights of the VAE's decoder: names, shapes, headers, and their arrangement for the layers."""

from pathlib import Path

import numpy as np

from cogvideox.model.config import VaeConfig
from cogvideox.model.folder import check_headers, stored_tensors
from runtime.tensor_files import StoredTensor

# Present in every full VAE, unused by the decoder.
_NOT_FOR_DECODING = ("encoder.", "quant_conv.")

MID_RESNETS = 2  # CogVideoXDecoder3D fixes it


def arrange(weight: np.ndarray) -> np.ndarray:
    """Rearranges a decoder's weight from diffusers' layout to the layout of the layers.

    Convolutions become matrices, because a TPU pads the small axes of a kernel to full tiles. The
    phases of the upsamplers are summed in float32.

    Args:
        weight: a vector; [C', C, 1, 1, 1]; [C', C, frames, rows, columns], 3 of each; or an
            upsampler's [C', C, rows, columns], 3 of each.

    Returns:
        The vector; [C, C']; [3 (frames) 3 (columns) C, 3 (rows) C']; or, respectively,
        [2 (side), 2 (columns) C, 2 (parity) 2 (rows) C']. Doubling turns a pixel into left and
        right (side), even and odd (parity) pixels. Each reads two columns and two rows of the
        input; the left or even one reads the previous pixel and the pixel itself.
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
    return both  # float32; the caller rounds once to the run's dtype


def arranged_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of `arrange`'s result for a weight of this shape."""
    return arrange(np.broadcast_to(np.float32(0), shape)).shape


def weight_shapes(config: VaeConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight that decoding needs, by diffusers' name.

    Source: diffusers' CogVideoXDecoder3D; a test compares its state_dict.
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
    """Returns the headers of the weights that decoding needs.

    Args:
        vae_folder: contains one safetensors file, or several and their index.

    Raises:
        ValueError: files are missing or damaged, or tensors are missing, extra or of the wrong
            shape; the message lists all of them.
    """
    shapes = weight_shapes(config)
    stored = stored_tensors(Path(vae_folder))
    stored = {name: t for name, t in stored.items() if not name.startswith(_NOT_FOR_DECODING)}
    check_headers(stored, shapes, what="the VAE")
    return {name: stored[name] for name in shapes}
