"""Reading of videos frame by frame: `.mp4`, `.gif`, `.webp`, `.npy`, or a folder of PNG images.

`inspect_video` reads size, frame count and rate without decoding the video; `read_frames` streams
the frames, so host memory holds one frame of any video.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cogvideox.video.formats import FILE_SUFFIXES
from cogvideox.video.frame_folder import frame_name
from cogvideox.video.pixels import check_range

if TYPE_CHECKING:
    import numpy as np

    Frames = Generator[np.ndarray, None, None]

# GIF stores delays in 1/100 s, WebP in 1/1000 s, so their frame rates are not exact.
_CLOCKS = {".gif": 0.01, ".webp": 0.001}
_FLOATS = ("float16", "float32", "float64")
_PNG_MODES = ("RGB", "RGBA", "L", "P")  # 8 bits a channel; alpha is ignored


@dataclasses.dataclass(frozen=True)
class Video:
    """A video on disk.

    Attributes:
        fps: frames a second; None for `.npy` and PNG folders, which store no rate.
        clock: resolution of its time stamps in seconds; 0 if the frame rate is exact.
        files: the images of a PNG folder in order; empty for others.
    """

    path: Path
    num_frames: int
    height: int
    width: int
    fps: float | None = None
    clock: float = 0.0
    files: tuple[Path, ...] = ()


def inspect_video(path: Path) -> Video:
    """Reads the size, frame count and frame rate of a video.

    Raises:
        ValueError: the video is missing, damaged or of an unknown format, in one line.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _inspect_folder(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if suffix not in FILE_SUFFIXES or not path.is_file():
        raise ValueError(
            f"{path} is not a video: use one of {', '.join(FILE_SUFFIXES)}, or a folder of PNG "
            "frames"
        )
    if suffix == ".npy":
        num_frames, height, width, _ = _open_array(path).shape
        return Video(path, num_frames, height, width)
    return _inspect_animation(path) if suffix in _CLOCKS else _inspect_mp4(path)


def read_frames(video: Video) -> Frames:
    """Yields the frames in order: uint8 [height, width, 3], or float32 in 0..1 from `.npy`.

    Close the generator to end early: it ends ffmpeg.

    Raises:
        ValueError: the video is damaged, or a float is outside 0..1.
    """
    suffix = video.path.suffix.lower()
    if video.files:
        return _read_folder(video)
    if suffix == ".npy":
        return _read_array(video)
    return _read_animation(video) if suffix in _CLOCKS else _read_mp4(video)


# .mp4 -------------------------------------------------------------------------------------------


def _inspect_mp4(path: Path) -> Video:
    # A header as text, `YUV4MPEG2 W1360 H768 F16:1 ...`, is what ffmpeg tells without ffprobe.
    first = ["-frames:v", "1", "-pix_fmt", "yuv420p", "-f", "yuv4mpegpipe", "-"]
    header = _ffmpeg(path, first).split(b"\n", 1)[0].decode(errors="replace")
    found = re.fullmatch(r"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+) .*", header)
    if found is None:
        raise ValueError(f"{path} is damaged: ffmpeg finds no frame")
    width, height, numerator, denominator = map(int, found.groups())
    # Copying packets to nowhere counts them without decoding.
    report = _ffmpeg(path, ["-progress", "pipe:1", "-nostats", "-c", "copy", "-f", "null", "-"])
    counts = re.findall(rb"^frame=(\d+)$", report, re.MULTILINE)
    if not counts or int(counts[-1]) == 0:
        raise ValueError(f"{path} is damaged: ffmpeg finds no frame")
    fps = float(Fraction(numerator, max(1, denominator)))
    return Video(path, int(counts[-1]), height, width, fps)


def _ffmpeg(path: Path, arguments: list[str]) -> bytes:
    done = subprocess.run(
        _ffmpeg_command(path, arguments), stdin=subprocess.DEVNULL, capture_output=True
    )
    # ffmpeg ends with status 0 for a truncated file, but says so.
    if done.returncode != 0 or done.stderr:
        raise ValueError(_damage(path, done.stderr))
    return done.stdout


def _ffmpeg_command(path: Path, arguments: list[str]) -> list[str]:
    from imageio_ffmpeg import get_ffmpeg_exe

    # Without `strict`, a damaged frame is concealed and ffmpeg neither complains nor fails.
    strict = ["-xerror", "-err_detect", "explode"]
    source = ["-nostdin", "-v", "error", *strict, "-i", f"file:{path}", "-map", "0:v:0"]
    return [get_ffmpeg_exe(), *source, *arguments]


def _damage(path: Path, messages: bytes) -> str:
    lines = messages.decode(errors="replace").strip().splitlines() or ["nothing"]
    return f"{path} is damaged or not a video; ffmpeg says: {lines[0]}"


def _read_mp4(video: Video) -> Frames:
    import numpy as np

    # The colour matrix is the file's; the flags spare rounding errors of the conversion to RGB.
    convert = "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp,format=rgb24"
    raw = ["-fps_mode", "passthrough", "-vf", convert, "-f", "rawvideo", "pipe:1"]
    size = video.height * video.width * 3
    # A file, because a full pipe of messages would block ffmpeg while its frames are read.
    with tempfile.TemporaryFile() as messages, _running(video.path, raw, messages) as process:
        pipe = process.stdout
        assert pipe is not None
        count = 0
        while len(pixels := pipe.read(size)) == size:
            yield np.frombuffer(pixels, np.uint8).reshape(video.height, video.width, 3)
            count += 1
        status = process.wait()
        messages.seek(0)
        said = messages.read()
        if status != 0 or said or count != video.num_frames:
            said = said or f"{count} of {video.num_frames} frames decoded".encode()
            raise ValueError(_damage(video.path, said))


@contextmanager
def _running(
    path: Path, arguments: list[str], messages: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ffmpeg with its output in a pipe; kills it if the block ends early."""
    command = _ffmpeg_command(path, arguments)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages
    )
    try:
        yield process
    finally:
        if process.stdout is not None:
            process.stdout.close()
        if process.poll() is None:
            process.kill()
            process.wait()


# .gif and .webp ---------------------------------------------------------------------------------


def _inspect_animation(path: Path) -> Video:
    from PIL import Image

    seconds, count = 0.0, 0
    with _naming_damage(path), Image.open(path) as image:
        width, height = image.size
        num_frames = getattr(image, "n_frames", 1)
        for index in range(num_frames):
            image.seek(index)
            image.load()
            seconds += image.info.get("duration", 0) / 1000
            count += 1
    fps = count / seconds if seconds > 0 else None
    return Video(path, count, height, width, fps, _CLOCKS[path.suffix.lower()])


def _read_animation(video: Video) -> Frames:
    import numpy as np
    from PIL import Image

    with _naming_damage(video.path), Image.open(video.path) as image:
        for index in range(video.num_frames):
            image.seek(index)
            yield np.asarray(image.convert("RGB"))


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns what Pillow raises for a damaged file into one ValueError."""
    from PIL import Image

    try:
        yield
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or not what its suffix says: {error}") from error


# .npy -------------------------------------------------------------------------------------------


def _open_array(path: Path) -> np.ndarray:
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a .npy file: {error}") from error
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"{path} is not a video: shape {list(array.shape)}, not [F, H, W, 3]")
    if array.dtype.name not in ("uint8", *_FLOATS):
        raise ValueError(f"{path} holds {array.dtype.name}; use uint8, or floats in 0..1")
    return array


def _read_array(video: Video) -> Frames:
    import numpy as np

    for index, frame in enumerate(_open_array(video.path)):
        if frame.dtype.name in _FLOATS:
            frame = frame.astype(np.float32)
            try:
                check_range(frame)
            except ValueError as error:
                raise ValueError(f"{video.path}, frame {index}: {error}") from None
        yield np.asarray(frame)


# Folder of PNG images ---------------------------------------------------------------------------


def png_files(folder: Path) -> list[Path]:
    """Lists the PNG images of a folder by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() == ".png" and p.is_file())


def _inspect_folder(path: Path) -> Video:
    from PIL import Image

    files = png_files(path)
    if not files:
        raise ValueError(f"{path} holds no PNG frames")
    if files[0].name == frame_name(0):
        for index, file in enumerate(files):
            if file.name != frame_name(index):
                raise ValueError(f"{path}: frame {index} should be {frame_name(index)}")
    sizes = []
    for file in files:
        with _naming_damage(file), Image.open(file) as image:  # reads the header only
            sizes.append(image.size)
            if image.mode not in _PNG_MODES:
                raise ValueError(f"mode {image.mode}, not one of {', '.join(_PNG_MODES)}")
        if sizes[-1] != sizes[0]:
            width, height = sizes[-1]
            raise ValueError(f"{file} is {height}x{width}, {files[0].name} is not")
    width, height = sizes[0]
    return Video(path, len(files), height, width, files=tuple(files))


def _read_folder(video: Video) -> Frames:
    import numpy as np
    from PIL import Image

    for file in video.files:
        with _naming_damage(file), Image.open(file) as image:
            frame = np.asarray(image.convert("RGB"))
        yield frame
