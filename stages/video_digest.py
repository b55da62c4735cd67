"""The sha256 of finished videos, recorded next to them in generation_config.json.

The settings beside a video without a tag may be those of a later run; the digest tells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files import open_regular
from stages.sections import with_facts

_KEY = "video_sha256"
_BLOCK_BYTES = 1 << 20


def with_digests(
    section: Mapping[str, Any], videos: Sequence[Path], contents: Sequence[Path] | None = None
) -> dict[str, Any]:
    """Returns stage 3's section with the digest of each video, by its name.

    Args:
        contents: where the videos lie now, if not at their own paths yet.
    """
    digests = {
        video.name: digest(content)
        for video, content in zip(videos, contents or videos, strict=True)
    }
    return with_facts(section, **{_KEY: digests})


def recorded_digest(section: Mapping[str, Any], video: Path) -> str | None:
    """Returns what `with_digests` recorded for a video of this name."""
    digests = section["made_with"].get(_KEY)
    found = digests.get(video.name) if isinstance(digests, dict) else None
    return found if isinstance(found, str) else None


def digest(video: Path) -> str:
    """Hashes a video: a file, or a folder of frames with their names.

    Raises:
        InputError: it cannot be read.
    """
    hashed = hashlib.sha256()
    for path in sorted(video.iterdir()) if video.is_dir() else [video]:
        if path != video:
            hashed.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES):
                hashed.update(block)
    return hashed.hexdigest()
