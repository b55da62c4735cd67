"""Decodes an untrusted image from stdin and writes it to stdout as PNG; a process of its own.

Whatever a decoder of images does with a hostile file happens here, within limits of memory, time
and files that the process sets for itself before it reads a byte. It imports nothing of the
project.
"""

import io
import resource
import sys
import warnings

# The largest size of a published model, sixteen times.
MAX_PIXELS = 16 << 20
FORMATS = ("PNG", "JPEG", "WEBP")
_LIMITS = {
    resource.RLIMIT_AS: 1 << 30,
    resource.RLIMIT_CPU: 15,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
}


def main() -> None:
    for what, most in _LIMITS.items():
        resource.setrlimit(what, (most, most))

    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    try:
        with Image.open(io.BytesIO(sys.stdin.buffer.read()), formats=FORMATS) as image:
            turned = ImageOps.exif_transpose(image)  # before the tag is lost
            turned.convert("RGBA" if turned.has_transparency_data else "RGB").save(
                sys.stdout.buffer, "PNG", compress_level=1
            )
    except MemoryError:
        sys.exit("it needs too much memory")
    except Exception as error:  # of any decoder
        sys.exit(f"{type(error).__name__}: {error}"[:200])


if __name__ == "__main__":
    main()
