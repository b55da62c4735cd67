"""Reads colour, shape, motion and background back from the frames of a toy-world video.

Classical image analysis, no learning: the background is the median colour of the border, an object
is one connected blob of space-time that stands out from it, and its shape is the template of the
same area and centroid that overlaps it best.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from toyworld.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, Thing, coverage

NONE = "none"
ATTRIBUTES = ("color", "shape", "motion", "background")

# A pixel stands out when it differs this much (Euclid over RGB in 0..1) from the background. The
# least contrast of the world is 0.53, so the edge of a blob lies at or outside half coverage.
_CONTRAST = 0.2
# A colour farther than this from every colour of the table has no name. The closest two names,
# blue and purple, are 0.52 apart; orange and yellow 0.35.
_NAMED_WITHIN = 0.25
# What counts as one unit of motion: pixels across, pixels down, natural logarithm of size, each
# near the least the world shows in 17 frames (32 px, 26 px, ln 2). Below half a unit: no motion.
_UNITS = np.array([32.0, 26.0, 0.69])
_LEAST_MOTION = 0.5


@dataclass(frozen=True)
class Reading:
    """What a video shows: a background and its objects, from the largest to the smallest.

    A value that fits no name of the world is `NONE`. `fits` says how well each object keeps to its
    shape: the overlap (intersection over union) with the ideal shape of the same area and centroid,
    averaged over the frames.
    """

    background: str
    things: tuple[Thing, ...]
    fits: tuple[float, ...]


def read_video(frames: np.ndarray) -> Reading:
    """Reads a video [F, H, W, 3] of floats in 0..1.

    Raises:
        ValueError: the array is not such a video.
    """
    frames = _checked(frames)
    background = np.median(_border(frames), axis=0)
    difference = np.linalg.norm(frames - background, axis=-1)
    blobs = _blobs(difference > _CONTRAST)
    seen = [_read_thing(frames, background, blob) for blob in blobs]
    return Reading(
        _nearest(background, BACKGROUNDS),
        tuple(thing for thing, _ in seen),
        tuple(fit for _, fit in seen),
    )


def evaluate_video(frames: np.ndarray) -> dict[str, str]:
    """Colour, shape and motion of the largest object of a video, and its background.

    Args:
        frames: [F, H, W, 3] floats in 0..1.

    Returns:
        The keys of `ATTRIBUTES` with names of the world or `NONE`, and `count`, the number of
        objects seen.
    """
    return largest_of(read_video(frames))


def largest_of(reading: Reading) -> dict[str, str]:
    """Returns the dictionary of `evaluate_video` for a reading."""
    thing = reading.things[0] if reading.things else Thing(NONE, NONE, NONE)
    return {**vars(thing), "background": reading.background, "count": str(len(reading.things))}


def truth_of(scene: Scene) -> dict[str, str]:
    """Returns what `evaluate_video` returns for a perfect video of a scene with one thing."""
    (thing,) = scene.things
    return {**vars(thing), "background": scene.background, "count": "1"}


def shows(frames: np.ndarray, scene: Scene) -> bool:
    """Checks that a video shows a scene: its background and exactly its things, in any order."""
    return agrees(read_video(frames), scene)


def agrees(reading: Reading, scene: Scene) -> bool:
    """Checks that a reading is of a scene: its background and exactly its things, in any order."""
    return reading.background == scene.background and sorted(map(str, reading.things)) == sorted(
        map(str, scene.things)
    )


def _checked(frames: np.ndarray) -> np.ndarray:
    if frames.ndim != 4 or frames.shape[-1] != 3 or not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"a video is [F, H, W, 3] of floats, not {frames.shape} {frames.dtype}")
    if not np.isfinite(frames).all() or frames.min() < 0 or frames.max() > 1:
        raise ValueError("a video holds finite values in 0..1")
    return frames.astype(np.float32)


def _border(frames: np.ndarray) -> np.ndarray:
    """Returns the outermost two pixels of every frame, [pixels, 3]."""
    edges = (frames[:, :2], frames[:, -2:], frames[:, :, :2], frames[:, :, -2:])
    return np.concatenate([edge.reshape(-1, 3) for edge in edges])


def _blobs(mask: np.ndarray) -> list[np.ndarray]:
    """Returns the objects of a mask [F, H, W], largest first, as masks of the same shape.

    An object moves less than its width between frames, so it is connected in space-time. Blobs
    that live for less than three quarters of the frames or have no interior are dropped as specks.
    """
    labels = np.zeros(mask.shape, np.int32)
    count = ndimage.label(mask, output=labels)
    assert isinstance(count, int)
    interior = ndimage.binary_erosion(mask, np.ones((1, 3, 3)))
    blobs = []
    for label in range(1, count + 1):
        blob = labels == label
        if ((blob & interior).any(axis=(1, 2))).mean() >= 0.75:
            blobs.append(blob)
    return sorted(blobs, key=np.sum, reverse=True)


def _read_thing(
    frames: np.ndarray, background: np.ndarray, blob: np.ndarray
) -> tuple[Thing, float]:
    """Returns an object, and how well it keeps its shape."""
    interior = np.asarray(ndimage.binary_erosion(blob, np.ones((1, 3, 3))), bool)
    color = np.median(frames[interior], axis=0)
    # The share of the object's colour in each pixel, along the line between the two colours, in
    # the blob and the ring of two pixels around it that holds the soft edge.
    axis = (color - background) / np.sum((color - background) ** 2)
    alpha = np.clip((frames - background) @ axis, 0, 1)
    alpha = alpha * ndimage.binary_dilation(blob, np.ones((1, 5, 5)))

    lives = np.flatnonzero(blob.any(axis=(1, 2)))
    grid_y, grid_x = np.indices(alpha.shape[1:]) + 0.5
    area = alpha[lives].sum(axis=(1, 2))
    x = (alpha[lives] * grid_x).sum(axis=(1, 2)) / area
    y = (alpha[lives] * grid_y).sum(axis=(1, 2)) / area
    r = np.sqrt(area / np.pi)
    shape, fit = _read_shape(alpha[lives], x, y, r)
    motion = _read_motion(lives, x, y, r, len(frames))
    return Thing(_nearest(color, COLORS), shape, motion), fit


def _read_shape(
    alpha: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray
) -> tuple[str, float]:
    """Returns the shape whose template overlaps alpha [F, H, W] best, and the mean overlap."""
    grid_y, grid_x = np.indices(alpha.shape[1:]) + 0.5
    dx = torch.from_numpy(grid_x - x[:, None, None])
    dy = torch.from_numpy(grid_y - y[:, None, None])
    size = torch.from_numpy(r)[:, None, None]
    overlaps = []
    for shape in range(len(SHAPES)):
        template = coverage(torch.tensor(shape), dx, dy, size).numpy()
        union = np.maximum(alpha, template).sum(axis=(1, 2))
        overlaps.append((np.minimum(alpha, template).sum(axis=(1, 2)) / union).mean())
    best = int(np.argmax(overlaps))
    return SHAPES[best], float(overlaps[best])


def _read_motion(
    lives: np.ndarray, x: np.ndarray, y: np.ndarray, r: np.ndarray, frames: int
) -> str:
    """Returns the motion with the largest fitted change over the video, in units of `_UNITS`."""
    slopes = np.polyfit(lives, np.stack([x, y, np.log(r)], axis=1), deg=1)[0]
    change = slopes * (frames - 1) / _UNITS
    strongest = int(np.argmax(np.abs(change)))
    if abs(change[strongest]) < _LEAST_MOTION:
        return NONE
    names = (("left", "right"), ("up", "down"), ("shrink", "grow"))[strongest]
    name = names[int(change[strongest] > 0)]
    assert name in MOTIONS
    return name


def _nearest(color: np.ndarray, table: dict[str, tuple[float, float, float]]) -> str:
    """Returns the name of the closest colour in a table, or NONE if none is close."""
    distances = {name: np.linalg.norm(color - np.array(value)) for name, value in table.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < _NAMED_WITHIN else NONE
