"""Fits the factors of previews to a model's own videos, by least squares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import InputError, checking_input
from runtime.progress import working
from runtime.text import printable
from stages import decode, files
from stages.preview import FACTORS_FILE
from stages.sections import DECODE

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class CalibratePreviewOptions:
    """Options of calibrate.py --preview.

    Attributes:
        preview: folders with latents of stage 2 and their videos of stage 3.
        model_id: None takes the model that made the latents.
    """

    preview: Sequence[Path]
    output_dir: Path
    model_id: str | None = None


def run(options: CalibratePreviewOptions) -> None:
    """Reads the latents and videos, and writes preview_factors.json."""
    from cogvideox.video.preview import fit_factors, write_factors

    with checking_input():
        files.check_output_folder(options.output_dir, FACTORS_FILE, needed_bytes=1 << 20)
        with working(f"reading {len(options.preview)} folder(s)"):
            pairs = [pair for folder in options.preview for pair in _read(folder, options.model_id)]
        channels = {len(latents) for latents, _ in pairs}
        if len(channels) > 1:
            raise InputError(f"--preview: latents of {sorted(channels)} channels do not fit")
    factors, psnr = fit_factors([x for x, _ in pairs], [y for _, y in pairs])
    path = options.output_dir / FACTORS_FILE
    write_factors(path, factors, psnr, len(pairs))
    print(f"{path}: {factors.channels} channels, {psnr:.1f} dB over {len(pairs)} video(s)")


def _read(folder: Path, model_id: str | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """The latents [C, T, H, W] and the pictures [T, H, W, 3] of each video of a folder.

    Raises:
        ValueError: files are missing, damaged or stale.
    """
    import numpy as np

    from cogvideox.video.frames import inspect_video, read_frames
    from cogvideox.video.preview import small_frames

    config, file = decode.open_latents(folder)
    model = files.find_same_model(model_id, file, DECODE)
    if config.get(DECODE, {}).get("latents") != file.section["fingerprint"]:
        raise InputError(
            f"{printable(str(folder))}: run {DECODE}.py; its video is not of the latents"
        )
    latents = files.read_tensors(file)["latents"]
    found = []
    for one, path in zip(
        latents, files.numbered(folder / files.VIDEO_FILE, len(latents)), strict=True
    ):
        video = np.stack(list(read_frames(inspect_video(path))))
        found.append((one, small_frames(video, one.shape[1], model.vae.spatial_scale)))
    return found
