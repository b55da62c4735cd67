"""Images and videos that a run starts from: bounded reading, and fitting to a size.

Fitting follows diffusers' VaeImageProcessor for PIL images, which stretches; a centre crop keeps
the shapes.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cogvideox.video.frames import inspect_video, read_frames
from cogvideox.video.pixels import to_uint8
from runtime.errors import InputError
from runtime.files import open_regular

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Fit = Literal["stretch", "crop"]

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits at most
_MOST_PIXELS = 1 << 26  # 8192 x 8192; decoded, it takes 200 MB
_MOST_BYTES = 256 << 20
_MOST_FRAMES = 1024


def read_image(path: Path) -> Image:
    """Reads an image as RGB, turned as its EXIF tag says.

    Source: diffusers.utils.load_image. Transparency is dropped, as there.

    Raises:
        ValueError: it is missing, no image, damaged or too large; nothing large was decoded.
    """
    import io

    from PIL import Image, ImageOps

    if not path.exists():
        raise InputError(f"--image {path}: there is no such file")
    if path.is_dir():
        raise InputError(f"--image {path} is a folder; name a file (a folder of frames: --video)")
    with open_regular(path) as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InputError(f"--image {path} is larger than {_MOST_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked below
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        _check_pixels(f"--image {path}", *image.size)
        if image.mode not in _MODES:
            raise InputError(
                f"--image {path} has pixels of mode {image.mode}; save it as 8-bit RGB"
            )
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kinds = ", ".join(_FORMATS)
        raise InputError(
            f"--image {path} is damaged, too large or not one of {kinds}: {error}"
        ) from error


def read_video(path: Path, height: int, width: int, fit: Fit) -> np.ndarray:
    """Reads a video and fits every frame: uint8 [F, height, width, 3].

    Args:
        path: see `cogvideox.video.frames.inspect_video`.

    Raises:
        ValueError: it is missing, damaged, of an unknown format or too large.
    """
    import numpy as np
    from PIL import Image

    video = inspect_video(path)
    _check_pixels(f"--video {path}", video.height, video.width)
    if video.num_frames > _MOST_FRAMES:
        raise InputError(f"--video {path} has {video.num_frames} frames; at most {_MOST_FRAMES}")
    frames = np.empty((video.num_frames, height, width, 3), np.uint8)
    for i, frame in enumerate(read_frames(video)):
        pixels = frame if frame.dtype == np.uint8 else to_uint8(frame)
        frames[i] = fitted(Image.fromarray(pixels), height, width, fit)
    return frames


def count_frames(path: Path) -> int:
    """Returns the number of frames of a video, without decoding it.

    Raises:
        ValueError: see `cogvideox.video.frames.inspect_video`.
    """
    return inspect_video(path).num_frames


def fitted(image: Image, height: int, width: int, fit: Fit) -> np.ndarray:
    """Resizes an RGB image: uint8 [height, width, 3].

    Args:
        fit: "stretch" as diffusers, or "crop" to take the largest centred part of the right shape.
    """
    import numpy as np
    from PIL import Image

    box = None
    if fit == "crop":
        own_width, own_height = image.size
        scale = min(own_width / width, own_height / height)
        across, down = (own_width - scale * width) / 2, (own_height - scale * height) / 2
        box = (across, down, own_width - across, own_height - down)
    resized = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def _check_pixels(what: str, height: int, width: int) -> None:
    if height * width > _MOST_PIXELS:
        raise InputError(f"{what} has {height * width:,} pixels; at most {_MOST_PIXELS:,} are read")
