"""Latents as a sequence of tokens: text, then video patches, then padding; and where each one is.

The whole denoising loop runs on tokens. The scheduler works value by value, so latents are cut into
patches once, on the host, and put together again after the last step: inside the compiled step the
eight-dimensional transposes would cost more to compile than all blocks together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from cogvideox.settings import LatentShape


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """How the tokens of one sample lie in a sequence of `padded` rows.

    Attributes:
        patch, patch_t: latents per token along height and width, and along time.
        text: rows of text tokens at the start.
        padded: rows in all, a number that the mesh divides.
    """

    latents: LatentShape
    patch: int
    patch_t: int
    text: int
    padded: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Video tokens along time, height and width."""
        shape = self.latents
        return shape.frames // self.patch_t, shape.height // self.patch, shape.width // self.patch

    @property
    def tokens(self) -> int:
        """Text and video tokens, S without the padding."""
        return self.text + int(np.prod(self.grid))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[B, padded, channels of a patch]."""
        channels = self.latents.channels * self.patch_t * self.patch**2
        return self.latents.batch, self.padded, channels

    def from_latents(self, latents: np.ndarray) -> np.ndarray:
        """[B, T, C, H, W] to [B, padded, C patch_t patch patch]; other rows are zero.

        The order inside a patch is that of diffusers' CogVideoXPatchEmbed.
        """
        (t, h, w), p, p_t = self.grid, self.patch, self.patch_t
        patches = latents.reshape(-1, t, p_t, self.latents.channels, h, p, w, p)
        patches = patches.transpose(0, 1, 4, 6, 3, 2, 5, 7)
        return self.place(patches.reshape(len(latents), t * h * w, -1), axis=1)

    def to_latents(self, tokens: np.ndarray) -> np.ndarray:
        """The reverse of `from_latents`."""
        (t, h, w), p, p_t = self.grid, self.patch, self.patch_t
        video = tokens[:, self.text : self.tokens]
        patches = video.reshape(-1, t, h, w, self.latents.channels, p_t, p, p)
        return patches.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(self.latents.sizes)

    def place(self, video: np.ndarray, axis: int, text_value: float = 0) -> np.ndarray:
        """What belongs to the video tokens, at their rows along `axis`; padding is zero."""
        shape = list(video.shape)
        shape[axis] = self.padded
        placed = np.zeros(shape, video.dtype)
        rows = [slice(None)] * video.ndim
        rows[axis] = slice(0, self.text)
        placed[tuple(rows)] = text_value
        rows[axis] = slice(self.text, self.tokens)
        placed[tuple(rows)] = video
        return placed


def positions(config: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
    """What tells the tokens where they are: rotary tables, or the sincos embedding of 1.0-2b.

    The 1.5 tables are a slice from 0 of an unbounded grid, so they do not depend on the sample
    size in the config, which differs between published revisions. Text does not rotate, and has
    no sincos embedding.

    Returns:
        {"rotary": (cos, sin) [D / 2, S] float32} or {"embedding": [S, E] float32}, S padded.
    """
    # Only here, because it takes seconds, in which weights can be read.
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, *grid = layout.grid
    if not config["use_rotary_positional_embeddings"]:
        import diffusers
        import torch

        with torch.device("meta"):
            module = diffusers.CogVideoXTransformer3DModel.from_config(dict(config, num_layers=0))
        ratio = config["temporal_compression_ratio"]
        joint = module.patch_embed._get_positional_embeddings(
            layout.latents.height, layout.latents.width, (frames - 1) * ratio + 1, device="cpu"
        )
        video = joint[0, config["max_text_seq_length"] :].numpy()
        return {"embedding": layout.place(video, axis=0)}
    if config["patch_size_t"] is None:
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        patch = config["patch_size"]
        sample = (config["sample_width"] // patch, config["sample_height"] // patch)
        kind = {"crops_coords": get_resize_crop_region_for_grid(tuple(grid), *sample)}
    else:
        kind = {"crops_coords": None, "grid_type": "slice", "max_size": grid}
    tables = get_3d_rotary_pos_embed(
        config["attention_head_dim"], grid_size=tuple(grid), temporal_size=frames, **kind
    )
    # diffusers repeats every angle for the two of a pair.
    cos, sin = (table.numpy()[:, ::2].T for table in tables)
    return {"rotary": (layout.place(cos, 1, text_value=1), layout.place(sin, 1))}
