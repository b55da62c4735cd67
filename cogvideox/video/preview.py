"""Small pictures of latents: a linear map of their channels to colours, without the VAE.

Each latent value of a CogVideoX VAE stands for 8x8 pixels and, but for the first, four frames. A
linear map from its channels to the mean colour of these pixels is enough to see what a video will
become, and takes a millisecond.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError
from runtime.files import atomic_path, write_json
from runtime.text import printable
from runtime.typed_json import from_json, read_object

if TYPE_CHECKING:
    import numpy as np

_FORMAT = "cogvideox preview factors 1"
_QUALITY = 85
_METHOD = 2  # of 0 to 6: the fastest that is not much larger

# For the published models' 16 channels. ComfyUI-CogVideoXWrapper's factors (Apache 2.0), whose
# picture is (1 + 5 latents factors + bias) / 2.
_PUBLISHED = (
    *((0.0320, 0.0409, 0.0016), (0.0055, 0.0052, -0.0056), (0.0012, -0.0161, 0.0250)),
    *((0.0176, 0.0037, -0.0006), (0.0004, 0.0061, 0.0008), (-0.0105, -0.0032, -0.0089)),
    *((-0.0001, 0.0102, -0.0001), (0.0208, -0.0017, 0.0067), (0.0055, 0.0097, 0.0019)),
    *((0.0121, 0.0247, 0.0372), (0.0010, 0.0198, 0.0099), (0.0068, -0.0011, -0.0070)),
    *((0.0004, 0.0054, -0.0185), (-0.0090, -0.0113, 0.0042), (0.0025, 0.0252, -0.0006)),
    (-0.0111, 0.0018, 0.0279),
)
_PUBLISHED_BIAS = (-0.023, 0.0, -0.017)


@dataclasses.dataclass(frozen=True)
class PreviewFactors:
    """A linear map of latents, as the transformer makes them, to colours in 0..1.

    Attributes:
        weights: for each channel what it adds to red, green and blue.
        bias: the colours of zero latents.
    """

    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.weights)


@dataclasses.dataclass(frozen=True)
class _FactorsJson:
    format: str
    weights: list[list[float]]
    bias: list[float]
    psnr: float | None = None
    videos: int | None = None


def published_factors() -> PreviewFactors:
    """The factors for the VAE of the published models."""
    weights = tuple(tuple(2.5 * one for one in row) for row in _PUBLISHED)
    return PreviewFactors(weights, tuple((1 + one) / 2 for one in _PUBLISHED_BIAS))


def read_factors(path: Path) -> PreviewFactors:
    """Reads what `write_factors` wrote.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        file = from_json(_FactorsJson, read_object(path))
        if file.format != _FORMAT:
            raise ValueError(f"it is not of the format {_FORMAT!r}")
        if not file.weights or any(len(row) != 3 for row in (*file.weights, file.bias)):
            raise ValueError("it does not hold three factors for each channel")
    except OSError as error:
        raise InputError(f"cannot read {printable(str(path))}: {error.strerror}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{printable(str(path))}: {printable(str(error))}") from error
    return PreviewFactors(tuple(map(tuple, file.weights)), tuple(file.bias))


def write_factors(path: Path, factors: PreviewFactors, psnr: float, videos: int) -> None:
    """Writes factors as JSON, with how well they fit how many videos."""
    rows = [[round(one, 6) for one in row] for row in factors.weights]
    bias = [round(one, 6) for one in factors.bias]
    file = _FactorsJson(_FORMAT, rows, bias, round(psnr, 2), videos)
    write_json(path, dataclasses.asdict(file))


def pictures_of(latents: np.ndarray, factors: PreviewFactors) -> np.ndarray:
    """Draws latents.

    Args:
        latents: [C, T, H, W], unscaled as the transformer makes them, any float dtype.

    Returns:
        [T, H, W, 3] uint8.
    """
    import numpy as np

    weights = np.array(factors.weights, np.float32)
    colours = np.einsum("cthw,cr->thwr", latents.astype(np.float32), weights)
    colours += np.array(factors.bias, np.float32)
    return np.rint(255 * colours.clip(0, 1)).astype(np.uint8)


def small_frames(frames: np.ndarray, latent_frames: int, scale: int) -> np.ndarray:
    """Averages the frames of a video over the pixels that each latent value stands for.

    Args:
        frames: [F, H * scale, W * scale, 3] uint8.
        latent_frames: T. With an odd number, the first stands for one frame.
        scale: pixels a latent value along height and width.

    Returns:
        [T, H, W, 3] float32 in 0..1.

    Raises:
        ValueError: there are not as many frames as that many latents make.
    """
    import numpy as np

    count, height, width, _ = frames.shape
    single = latent_frames % 2
    groups = latent_frames - single
    if groups and (count - single) % groups or count < latent_frames:
        raise ValueError(f"{count} frames are not those of {latent_frames} latent frames")
    shape = (count, height // scale, scale, width // scale, scale, 3)
    small = frames.reshape(shape).mean(axis=(2, 4), dtype=np.float32) / 255
    parts = [small[:1]] if single else []
    if groups:
        rest = small[single:]
        parts.append(rest.reshape(groups, -1, *rest.shape[1:]).mean(axis=1))
    return np.concatenate(parts)


def fit_factors(
    latents: Sequence[np.ndarray], pictures: Sequence[np.ndarray]
) -> tuple[PreviewFactors, float]:
    """Fits factors by least squares.

    Args:
        latents: of each video, [C, T, H, W].
        pictures: what they should look like, [T, H, W, 3] in 0..1; see `small_frames`.

    Returns:
        The factors, and their PSNR over all videos in dB.
    """
    import numpy as np

    from cogvideox.video.metrics import psnr

    rows = np.concatenate([x.astype(np.float64).reshape(len(x), -1).T for x in latents])
    wanted = np.concatenate([x.astype(np.float64).reshape(-1, 3) for x in pictures])
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    error = float(np.mean(((rows @ solution).clip(0, 1) - wanted) ** 2))
    weights = tuple(tuple(map(float, row)) for row in solution[:-1])
    return PreviewFactors(weights, tuple(map(float, solution[-1]))), psnr(error)


def write_preview(path: Path, pictures: np.ndarray, fps: float) -> None:
    """Writes an animated WebP that repeats; replaces `path` at once, without flushing.

    Args:
        pictures: [T, H, W, 3] uint8.
        fps: pictures a second.
    """
    from PIL import Image

    first, *rest = [Image.fromarray(picture) for picture in pictures]
    with atomic_path(path, durable=False) as temporary:
        first.save(
            temporary,
            "WEBP",
            save_all=True,
            append_images=rest,
            duration=round(1000 / fps),
            loop=0,
            quality=_QUALITY,
            method=_METHOD,
        )
