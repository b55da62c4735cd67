"""Weights of the VAE: names, shapes, headers, and their arrangement for the layers."""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import VaeConfig
from cogvideox.model.folder import check_headers, stored_tensors
from runtime.mesh import place
from runtime.tensor_files import StoredTensor

Half = Literal["encoder", "decoder"]

# Beginnings of the names of each half's weights. Every full VAE holds both halves.
_NAMES: dict[Half, tuple[str, ...]] = {
    "encoder": ("encoder.", "quant_conv."),
    "decoder": ("decoder.", "post_quant_conv."),
}

MID_RESNETS = 2  # CogVideoXEncoder3D and CogVideoXDecoder3D fix it


def is_downsampler(name: str) -> bool:
    """Whether a weight belongs to a downsampler, by diffusers' name."""
    return ".downsamplers." in name


def arrange(weight: np.ndarray, downsampler: bool = False) -> np.ndarray:
    """Rearranges a weight from diffusers' layout to the layout of the layers.

    Convolutions become matrices, because a TPU pads the small axes of a kernel to full tiles. The
    phases of the upsamplers are summed in float32.

    Args:
        weight: a vector; [C', C, 1, 1, 1]; [C', C, frames, rows, columns], 3 of each; or an
            upsampler's [C', C, rows, columns], 3 of each.
        downsampler: the weight is a downsampler's, which become [columns, rows, C, C'].

    Returns:
        The vector; [C, C']; [3 (frames) 3 (columns) C, 3 (rows) C']; or, respectively,
        [2 (side), 2 (columns) C, 2 (parity) 2 (rows) C']. Doubling turns a pixel into left and
        right (side), even and odd (parity) pixels. Each reads two columns and two rows of the
        input; the left or even one reads the previous pixel and the pixel itself.
    """
    if weight.ndim == 1:
        return weight
    if downsampler:
        return weight.transpose(3, 2, 1, 0)
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


def arranged_shape(shape: tuple[int, ...], downsampler: bool = False) -> tuple[int, ...]:
    """Returns the shape of `arrange`'s result for a weight of this shape."""
    return arrange(np.broadcast_to(np.float32(0), shape), downsampler).shape


def weight_shapes(config: VaeConfig, half: Half = "decoder") -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight of one half of the VAE, by diffusers' name.

    Source: diffusers' CogVideoXEncoder3D and CogVideoXDecoder3D; a test compares their state_dict.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    latent, encoder = config.latent_channels, half == "encoder"
    widths = config.block_out_channels if encoder else config.block_out_channels[::-1]

    def conv(name: str, out: int, inputs: int, *size: int) -> None:
        shapes[f"{name}.weight"] = (out, inputs, *size)
        shapes[f"{name}.bias"] = (out,)

    def norm(name: str, channels: int) -> None:
        if encoder:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)
            return
        shapes[f"{name}.norm_layer.weight"] = shapes[f"{name}.norm_layer.bias"] = (channels,)
        for part in ("conv_y", "conv_b"):
            conv(f"{name}.{part}.conv", channels, latent, 1, 1, 1)

    def resnet(name: str, inputs: int, out: int) -> None:
        for number, channels in (("1", inputs), ("2", out)):
            norm(f"{name}.norm{number}", channels)
            conv(f"{name}.conv{number}.conv", out, channels, 3, 3, 3)
        if inputs != out:
            conv(f"{name}.conv_shortcut", out, inputs, 1, 1, 1)

    inputs, outputs = (config.in_channels, 2 * latent) if encoder else (latent, config.out_channels)
    direction, extra = ("down", 0) if encoder else ("up", 1)
    if encoder and config.use_quant_conv:
        conv("quant_conv", outputs, outputs, 1, 1, 1)
    if not encoder and config.use_post_quant_conv:
        conv("post_quant_conv", latent, latent, 1, 1, 1)
    conv(f"{half}.conv_in.conv", widths[0], inputs, 3, 3, 3)
    middle = widths[-1] if encoder else widths[0]
    for i in range(MID_RESNETS):
        resnet(f"{half}.mid_block.resnets.{i}", middle, middle)
    for level, out in enumerate(widths):
        block, before = f"{half}.{direction}_blocks.{level}", widths[max(level - 1, 0)]
        for i in range(config.layers_per_block + extra):
            resnet(f"{block}.resnets.{i}", out if i else before, out)
        if level < len(widths) - 1:
            conv(f"{block}.{direction}samplers.0.conv", out, out, 3, 3)
    norm(f"{half}.norm_out", widths[-1])
    conv(f"{half}.conv_out.conv", outputs, widths[-1], 3, 3, 3)
    return shapes


def stored_weights(
    vae_folder: Path, config: VaeConfig, half: Half = "decoder"
) -> dict[str, StoredTensor]:
    """Returns the headers of the weights of one half of the VAE.

    Args:
        vae_folder: contains one safetensors file, or several and their index.

    Raises:
        ValueError: files are missing or damaged, or tensors are missing, extra or of the wrong
            shape; the message lists all of them.
    """
    shapes = weight_shapes(config, half)
    other: Half = "encoder" if half == "decoder" else "decoder"
    stored = stored_tensors(Path(vae_folder))
    stored = {name: t for name, t in stored.items() if not name.startswith(_NAMES[other])}
    check_headers(stored, shapes, what=f"the VAE's {half}")
    return {name: stored[name] for name in shapes}


def abstract_weights(
    config: VaeConfig, half: Half, mesh: Mesh, dtype: jnp.dtype
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes of the arranged weights by diffusers' names; weights are replicated."""
    everywhere = NamedSharding(mesh, P())
    return {
        name: jax.ShapeDtypeStruct(
            arranged_shape(shape, is_downsampler(name)), dtype, sharding=everywhere
        )
        for name, shape in weight_shapes(config, half).items()
    }


def load_weights(
    vae_folder: Path, config: VaeConfig, half: Half, mesh: Mesh, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """Reads the weights of one half of the VAE and places them on every device of a mesh.

    Returns:
        The weights by diffusers' names, in the layout of `arrange`.

    Raises:
        ValueError: the weights do not fit the config; see `stored_weights`.
    """
    everywhere = NamedSharding(mesh, P())
    return {
        name: place(np.asarray(arrange(tensor.read(), is_downsampler(name)), dtype), everywhere)
        for name, tensor in stored_weights(vae_folder, config, half).items()
    }
