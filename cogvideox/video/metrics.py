"""PSNR and SSIM of two frames.

Values are floats in 0..1 (peak 1), so uint8 frames are divided by 255 first; see `to_float`.
"""

from __future__ import annotations

import math

import numpy as np

# Constants of the SSIM paper; its window has 11 x 11 pixels.
_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03
SSIM_MIN_SIZE = _WINDOW
# Rows filtered at once. 64 rows of 1360 float64 stay in the cache: 2.5 times as fast as a frame.
_STRIP = 64


def to_float(frame: np.ndarray) -> np.ndarray:
    """Converts a frame, uint8 or float in 0..1, to float64 in 0..1."""
    return frame / 255.0 if frame.dtype == np.uint8 else frame.astype(np.float64)


def psnr(squared_error: float, peak: float = 1.0) -> float:
    """Returns the peak signal-to-noise ratio, 10 log10(peak^2 / mean squared error), in dB.

    Infinite without an error.
    """
    return math.inf if squared_error == 0 else 10 * math.log10(peak**2 / squared_error)


def mean_squared_error(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean of (a - b)^2 over all values of two arrays of one shape."""
    return float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the structural similarity of two frames: the mean over the channels R, G and B.

    Gaussian window of 11 x 11 pixels with sigma 1.5, K1 = 0.01, K2 = 0.03, weighted (biased)
    variances, and only positions where the window lies inside the frame. Equals scikit-image's
    `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", 2004.

    Args:
        a, b: float64 [height, width, channels] in 0..1; at least 11 x 11 pixels.

    Raises:
        ValueError: the shapes differ or a frame is smaller than the window.
    """
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[:2]) < _WINDOW:
        raise ValueError(f"SSIM needs two frames of one size >= 11x11, got {a.shape}, {b.shape}")
    positions = a.shape[0] - _WINDOW + 1
    total = 0.0
    for channel in range(a.shape[2]):
        of_a = np.ascontiguousarray(a[..., channel])
        of_b = np.ascontiguousarray(b[..., channel])
        for start in range(0, positions, _STRIP):
            rows = slice(start, min(start + _STRIP, positions) + _WINDOW - 1)
            total += float(_ssim_map(of_a[rows], of_b[rows]).sum())
    return total / (positions * (a.shape[1] - _WINDOW + 1) * a.shape[2])


def _ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM at every position of the window in one channel, [height - 10, width - 10].

    Filtering the sum and the difference takes four filters where a, b, a^2, b^2 and ab take five:
    2 mean(a) mean(b) = (mean(s)^2 - mean(d)^2) / 2, and so on for the squares and variances.
    """
    total, difference = a + b, a - b
    sum_mean, difference_mean = _blur(total), _blur(difference)
    sum_mean *= sum_mean
    difference_mean *= difference_mean
    sum_variance = _blur(total * total) - sum_mean
    difference_variance = _blur(difference * difference) - difference_mean
    c1, c2 = _K1**2, _K2**2
    luminance = (sum_mean - difference_mean + 2 * c1) / (sum_mean + difference_mean + 2 * c1)
    structure = sum_variance - difference_variance + 2 * c2
    return luminance * structure / (sum_variance + difference_variance + 2 * c2)


def _window_weights() -> list[float]:
    distances = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(distances**2) / (2 * _SIGMA**2))
    return (weights / weights.sum()).tolist()


_WEIGHTS = tuple(_window_weights())


def _blur(values: np.ndarray) -> np.ndarray:
    """Weighted mean under the window at every position inside: rows, then columns."""
    return _blur_rows(_blur_rows(values).T).T


def _blur_rows(values: np.ndarray) -> np.ndarray:
    half = _WINDOW // 2
    count = values.shape[0] - 2 * half
    result = _WEIGHTS[half] * values[half : half + count]
    pair = np.empty_like(result)
    for i in range(half):  # the window is symmetric: two rows share a weight
        mirrored = 2 * half - i
        np.add(values[i : i + count], values[mirrored : mirrored + count], out=pair)
        pair *= _WEIGHTS[i]
        result += pair
    return result
