"""Conversion of latents to a token sequence (text, video patches, padding), and token positions.

Sparse attention wants other rows for the video tokens than one after the other (see `tiling`).

The denoising loop runs on tokens. The scheduler is elementwise, so the host cuts latents into
patches once and reassembles them after the last step. Inside the compiled step, the
eight-dimensional transposes would cost more to compile than all blocks together.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.model.config import TransformerConfig
from cogvideox.model.settings import LatentShape
from cogvideox.transformer.parameters import LEARNED_POSITIONS
from cogvideox.transformer.tiling import Tiling
from runtime.tensor_files import StoredTensor

PositionTables = dict[str, Any]  # trees of arrays


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Layout of the tokens of one sample in a sequence of `padded` rows.

    Attributes:
        patch, patch_t: latents per token along height and width, and along time.
        text: number of text rows; they come first.
        padded: total number of rows, divisible over the mesh.
        tiling: where the video tokens lie; None puts them directly after the text.
    """

    latents: LatentShape
    patch: int
    patch_t: int
    text: int
    padded: int
    tiling: Tiling | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of video tokens along time, height and width."""
        shape = self.latents
        return shape.frames // self.patch_t, shape.height // self.patch, shape.width // self.patch

    @property
    def tokens(self) -> int:
        """Number of text and video tokens: S without padding."""
        return self.text + int(np.prod(self.grid))

    @property
    def video(self) -> slice | np.ndarray:
        """The rows of the video tokens, in the order of time, height and width."""
        return slice(self.text, self.tokens) if self.tiling is None else self.tiling.video_rows

    def is_video(self, rows: jax.Array) -> jax.Array:
        """Returns whether each of consecutive rows holds a video token, bool of the same shape."""
        if self.tiling is None:
            return (rows >= self.text) & (rows < self.tokens)
        placed = np.zeros(self.padded, np.bool_)
        placed[self.video] = True
        own = jax.lax.dynamic_slice_in_dim(jnp.asarray(placed), rows.reshape(-1)[0], rows.size)
        return own.reshape(rows.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the sequence: [B, padded, channels of a patch]."""
        channels = self.latents.channels * self.patch_t * self.patch**2
        return self.latents.batch, self.padded, channels

    def from_latents(self, latents: np.ndarray) -> np.ndarray:
        """Converts [B, T, C, H, W] to [B, padded, C patch_t patch patch]; other rows are zero.

        The order inside a patch matches diffusers' CogVideoXPatchEmbed.
        """
        (t, h, w), p, p_t = self.grid, self.patch, self.patch_t
        patches = latents.reshape(-1, t, p_t, self.latents.channels, h, p, w, p)
        patches = patches.transpose(0, 1, 4, 6, 3, 2, 5, 7)
        return self.place(patches.reshape(len(latents), t * h * w, -1), axis=1)

    def to_latents(self, tokens: np.ndarray) -> np.ndarray:
        """Inverts `from_latents`."""
        (t, h, w), p, p_t = self.grid, self.patch, self.patch_t
        video = tokens[:, self.video]
        patches = video.reshape(-1, t, h, w, self.latents.channels, p_t, p, p)
        return patches.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(self.latents.sizes)

    def place(self, video: np.ndarray, axis: int, text_value: float = 0) -> np.ndarray:
        """Pads values of the video tokens to all rows along `axis`; padding rows are zero."""
        shape = list(video.shape)
        shape[axis] = self.padded
        placed = np.zeros(shape, video.dtype)
        rows: list[slice | np.ndarray] = [slice(None)] * video.ndim
        rows[axis] = slice(0, self.text)
        placed[tuple(rows)] = text_value
        rows[axis] = self.video
        placed[tuple(rows)] = video
        return placed


def _learned(
    config: TransformerConfig, layout: TokenLayout, stored: Mapping[str, StoredTensor]
) -> np.ndarray | None:
    """Reads the learned positions of text and video, [tokens, E] float32; None without them.

    Args:
        stored: headers of the weights; without them, to compile ahead, the table is zero.
    """
    if not config.use_learned_positional_embeddings:
        return None
    table = stored.get(LEARNED_POSITIONS)
    if table is None:
        return np.zeros((layout.tokens, config.width), np.float32)
    return np.asarray(table.mapped()[0], np.float32)


def positions(
    config: TransformerConfig, layout: TokenLayout, stored: Mapping[str, StoredTensor]
) -> PositionTables:
    """Computes the positional tables: rotary, the sincos embedding of 1.0-2b, or a learned one.

    The 1.5 tables are a slice from 0 of an unbounded grid, so they do not depend on the sample
    size in the config, which differs between published revisions. Text tokens are not rotated and
    have no sincos embedding, but a learned one.

    Source: diffusers' models/embeddings.py, get_3d_rotary_pos_embed and get_3d_sincos_pos_embed,
    and get_resize_crop_region_for_grid of its CogVideoX pipeline; tests compare them.

    Args:
        stored: headers of the weights, which hold a learned table; see `_learned`.

    Returns:
        "rotary": (cos, sin) [D / 2, S] float32, "embedding": [S, E] float32, or both; S includes
        padding.
    """
    tables: PositionTables = {}
    learned = _learned(config, layout, stored)
    if learned is not None:
        tables["embedding"] = layout.place(learned[layout.text :], axis=0)
        tables["embedding"][: layout.text] = learned[: layout.text]
    elif not config.use_rotary_positional_embeddings:
        tables["embedding"] = layout.place(_sincos(config, layout.grid), axis=0)
    if not config.use_rotary_positional_embeddings:
        return tables
    frames, *grid = layout.grid
    points = [np.arange(size, dtype=np.float32) for size in layout.grid]
    if config.patch_size_t is None:
        for axis, (start, stop) in enumerate(_crop(config, grid), 1):
            size = layout.grid[axis]
            points[axis] = np.linspace(start, stop * (size - 1) / size, size, dtype=np.float32)
    head_dim = config.attention_head_dim
    angles = []
    for axis, width in enumerate((head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)):
        # Round the angles as diffusers does.
        powers = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        rates = 1 / (10_000.0 ** powers.astype(np.float64)).astype(np.float32)
        shape = [width // 2, 1, 1, 1]
        shape[1 + axis] = -1
        angles.append(np.outer(rates, points[axis]).reshape(shape))

    def table(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        parts = (function(part.astype(np.float64)).astype(np.float32) for part in angles)
        parts = [np.broadcast_to(part, (len(part), *layout.grid)) for part in parts]
        return np.concatenate(parts).reshape(-1, math.prod(layout.grid))

    cos, sin = table(np.cos), table(np.sin)
    return {"rotary": (layout.place(cos, 1, text_value=1), layout.place(sin, 1)), **tables}


def _crop(config: TransformerConfig, grid: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, stop) per side of the centred, largest fit in a 1.0 model's own grid."""
    height, width = (
        getattr(config, name) // config.patch_size for name in ("sample_height", "sample_width")
    )
    if grid[0] / grid[1] > height / width:
        sides = height, round(height / grid[0] * grid[1])
    else:
        sides = round(width / grid[1] * grid[0]), width
    starts = [round((most - side) / 2) for most, side in zip((height, width), sides, strict=True)]
    return [(start, start + side) for start, side in zip(starts, sides, strict=True)]


def _sincos(config: TransformerConfig, grid: tuple[int, int, int]) -> np.ndarray:
    """Returns [T H W, E] float32: sines, then cosines, of time, then width, then height."""
    width = config.width
    scales = [
        getattr(config, f"{kind}_interpolation_scale")
        for kind in ("temporal", "spatial", "spatial")
    ]

    def waves(axis: int, channels: int) -> np.ndarray:
        points = np.arange(grid[axis], dtype=np.float32) / np.float32(scales[axis])
        rates = 1 / 10_000 ** (np.arange(channels // 2) / (channels / 2))
        shape = [1, 1, 1, channels]
        shape[axis] = grid[axis]
        angles = np.outer(points, rates)
        both = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        return np.broadcast_to(both.reshape(shape), (*grid, channels))

    parts = [waves(0, width // 4), waves(2, width * 3 // 8), waves(1, width * 3 // 8)]
    return np.concatenate(parts, axis=-1).reshape(-1, width).astype(np.float32)
