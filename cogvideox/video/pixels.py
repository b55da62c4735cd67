"""Conversion of frames from float32 to uint8."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Converts float32 [..., channels] in 0..1 to uint8: round(255 x).

    Source: diffusers' VaeImageProcessor.numpy_to_pil.

    Raises:
        ValueError: a value is outside 0..1 or not finite; a cast would wrap it.
    """
    check_range(frames)
    return (frames * 255).round().astype("uint8")


def check_range(frames: np.ndarray) -> None:
    """Checks that every value is in 0..1.

    Raises:
        ValueError: a value is outside 0..1 or not finite.
    """
    if frames.size == 0:
        return
    low, high = frames.min(), frames.max()
    if not (low >= 0 and high <= 1):  # in this form NaN fails too
        raise ValueError(f"float frames must be within 0..1, got values from {low} to {high}")
