"""Small random VAEs of diffusers for the tests of decoders and encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from jax.sharding import Mesh


def random_vae(folder: Path, levels: int, **config) -> AutoencoderKLCogVideoX:
    """A VAE whose every weight matters, saved to `folder`."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        **config,
    ).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            # Biases and norm weights start at 0 and 1, which would hide a mix-up.
            noise = 0.3 if parameter.ndim == 1 else 0.05
            parameter.add_(noise * torch.randn_like(parameter))
    vae.save_pretrained(folder)
    return vae


def random_vaes(
    models: Mapping[str, dict[str, Any]], folders: pytest.TempPathFactory
) -> dict[str, tuple[AutoencoderKLCogVideoX, Path]]:
    """A VAE of each name and the folder that it is saved in; see `random_vae`."""
    places = {name: folders.mktemp(name) for name in models}
    return {name: (random_vae(place, **models[name]), place) for name, place in places.items()}


def mesh_of(devices: int) -> Mesh:
    """The first devices, along the width."""
    return Mesh(np.array(jax.devices()[:devices]), ("width",))


def thin_vae(folder: Path, **config) -> AutoencoderKLCogVideoX:
    """The smallest one with every kind of layer, upsampling in time and in space only."""
    return random_vae(
        folder,
        levels=3,
        block_out_channels=(4, 8, 8),
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        scaling_factor=0.7,
        **config,
    )
