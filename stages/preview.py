"""Previews of stage 2: what the video looks like so far, as a small animated picture."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from runtime import processes
from runtime.text import printable
from stages import files

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.denoising.loop import LoopState
    from cogvideox.model.folder import ModelFolder
    from cogvideox.video.preview import PreviewFactors

PREVIEW_FILE = "stage2_preview.webp"
FACTORS_FILE = "preview_factors.json"  # in a model's folder, from calibrate.py --preview


class PreviewOptions(Protocol):
    """Options of stage 2 about previews."""

    @property
    def preview_every(self) -> int | None: ...

    @property
    def preview_factors(self) -> Path | None: ...


def find_factors(options: PreviewOptions, model: ModelFolder) -> PreviewFactors | None:
    """Returns the factors of a run's previews; None if it makes none.

    Raises:
        ValueError: the model's VAE is not that of the published models, and no file has factors
            for it.
    """
    from cogvideox.video.preview import published_factors, read_factors

    if options.preview_every is None:
        if options.preview_factors:
            raise ValueError("--preview_factors is for --preview_every")
        return None
    channels, own = model.vae.latent_channels, model.path / FACTORS_FILE
    path = options.preview_factors or (own if own.exists() else None)
    factors = read_factors(path) if path else published_factors()
    if factors.channels != channels:
        source = printable(str(path)) if path else "the published factors"
        raise ValueError(
            f"--preview_every: {source} are for {factors.channels} channels, the model has "
            f"{channels}; make some with calibrate.py --preview and name them with "
            "--preview_factors"
        )
    return factors


class Previews:
    """Draws the predicted video every few steps, in a thread. Use it in a `with`."""

    def __init__(
        self, folder: Path, factors: PreviewFactors, every: int, padding_frames: int, fps: float
    ):
        """
        Args:
            folder: PREVIEW_FILE in it is replaced; of a batch one file a video.
            every: steps between two previews.
            padding_frames: leading latent frames that are no part of the video.
            fps: latent frames a second.
        """
        self._folder, self._factors, self._every = folder, factors, every
        self._padding, self._fps = padding_frames, fps
        self._pool = ThreadPoolExecutor(1, "preview")
        self._drawing: Future[None] | None = None

    def __enter__(self) -> Previews:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        self._report()

    def show(self, state: LoopState, total: int) -> None:
        """Draws a state if its turn has come; every process must call it after every step.

        A state is left out while an earlier one is still drawn, so that no step waits.
        """
        from cogvideox.denoising.loop import x0_to_host

        if state.steps % self._every or state.steps >= total:
            return
        latents = x0_to_host(state)[:, self._padding :].swapaxes(1, 2)
        if processes.is_first() and (self._drawing is None or self._drawing.done()):
            self._report()
            self._drawing = self._pool.submit(self._draw, latents)

    def _draw(self, latents: np.ndarray) -> None:
        """Args: latents: [B, C, T, H, W]."""
        from cogvideox.video.preview import pictures_of, write_preview

        paths = files.numbered(self._folder / PREVIEW_FILE, len(latents))
        for path, video in zip(paths, latents, strict=True):
            if self._folder.is_dir():  # writing would make a removed folder again
                write_preview(path, pictures_of(video, self._factors), self._fps)

    def _report(self) -> None:
        """Says why the last preview failed; a run does not end for it."""
        error = self._drawing.exception() if self._drawing else None
        if error:
            print(f"warning: no preview: {printable(str(error))}")
