"""A VAE folder in diffusers' layout: its configuration and the weights that decoding needs."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"

# Present in every full VAE, of no use to a decoder.
_NOT_FOR_DECODING = ("encoder.", "quant_conv.")


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


def _weight_files(vae_folder: Path) -> list[Path]:
    index = vae_folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [vae_folder / name for name in names]
    return [vae_folder / WEIGHTS_FILE]


def read_weights(vae_folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read exactly the named tensors of a VAE folder.

    Args:
        vae_folder: holds one safetensors file, or several and their index.
        shapes: the shape of every tensor that the decoder has, by diffusers' name.

    Returns:
        Arrays by name, in the dtype of the files.

    Raises:
        FileNotFoundError: a weight file is absent.
        ValueError: tensors are missing, extra or of another shape; the message lists all of them.
            The encoder's are neither.
    """
    weights: dict[str, np.ndarray] = {}
    problems = []
    for path in _weight_files(Path(vae_folder)):
        if not path.is_file():
            raise FileNotFoundError(f"no VAE weights at {path}")
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                if name.startswith(_NOT_FOR_DECODING):
                    continue
                if name not in shapes:
                    problems.append(f"extra {name}")
                    continue
                found = tuple(file.get_slice(name).get_shape())
                if found != tuple(shapes[name]):
                    problems.append(f"{name} is {list(found)}, not {list(shapes[name])}")
                weights[name] = file.get_tensor(name)
    problems += [f"missing {name}" for name in shapes if name not in weights]
    if problems:
        raise ValueError(
            f"the VAE weights in {vae_folder} do not fit its config: " + "; ".join(sorted(problems))
        )
    return weights
