"""The three stages for many jobs: weights are loaded once, and each shape is compiled once.

The work is the stage scripts' own, so a job's files are byte for byte those of the scripts run by
hand with the same arguments in the same folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from jobs.identity import job_arguments
from jobs.records import Job
from stages import files as stage_files

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.model.folder import ModelFolder


class Shape(NamedTuple):
    """What the compiled programs depend on: jobs of one shape share them."""

    height: int
    width: int
    num_frames: int
    guided: bool
    text_tokens: int

    def __str__(self) -> str:
        guidance = "" if self.guided else ", no guidance"
        return f"{self.height}x{self.width}x{self.num_frames}{guidance}"


def shape_of(job: Job) -> Shape:
    s = job.settings
    return Shape(s.height, s.width, s.num_frames, s.guided, job.max_sequence_length)


class Workshop:
    """Everything loaded and compiled for one model, and each stage of a job as a method."""

    def __init__(
        self,
        model: ModelFolder,
        arguments: argparse.Namespace,
        stop: threading.Event,
        abort: threading.Event,
    ):
        """
        Args:
            arguments: what all jobs share: output_dir, dtype, mesh, attention, decoder, ...
            stop: set to end after the current step, with a checkpoint if they are on.
            abort: set to end the decoding of a video, too.
        """
        self._model = model
        self._arguments = arguments
        self._stop = stop
        self._abort = abort
        self._text_encoder: Any = None
        self._plans: dict[Shape, stage2.Plan] = {}
        self._mesh: Any = None  # of the parameters
        self._parameters: Any = None
        self._compiled: tuple[Shape, Any] | None = None
        self._decoder: Any = None
        self._decoder_mesh: dict[str, int] = {}

    def check(self, jobs: Sequence[Job], stages: Sequence[str]) -> None:
        """Checks all that the stage scripts check before they load weights, once a shape.

        Raises:
            ValueError: what cannot be computed.
        """
        if stage1.STAGE in stages:
            from cogvideox.text.encoder import check_weights

            stage1.check(self._of(jobs[0]))
            check_weights(self._model)
        for shape, job in {shape_of(job): job for job in reversed(jobs)}.items():
            plan = self._plans[shape] = stage2.make_plan(
                self._of(job), self._model, 1, job.max_sequence_length
            )
            _, frames, channels, height, width = plan.denoiser.latents.sizes
            latents = (1, channels, frames - plan.padding_frames, height, width)
            folder, fps = self._arguments.output_dir, job.settings.fps
            stage3.check(self._of(job), self._model, folder, latents, fps)

    def mesh(self, shape: Shape) -> dict[str, int]:
        """The mesh of a shape's transformer, once `check` has passed."""
        return dict(self._plans[shape].denoiser.mesh.shape)

    def prepare(self, stage: str, job: Job) -> None:
        """Loads and compiles what `run` needs and does not have yet."""
        {
            stage1.STAGE: self._prepare_encoder,
            stage2.STAGE: self._prepare_transformer,
            stage3.STAGE: self._prepare_decoder,
        }[stage](job)

    def run(self, stage: str, job: Job) -> None:
        """Makes the files of one stage of a job; stages 2 and 3 may run in two threads.

        Raises:
            stage2.StoppedBetweenSteps: `stop` or `abort` was set.
        """
        {stage1.STAGE: self._embed, stage2.STAGE: self._denoise, stage3.STAGE: self._decode}[stage](
            job
        )

    def release_text_encoder(self) -> None:
        """Frees the gigabytes of T5."""
        self._text_encoder = None

    def _of(self, job: Job) -> argparse.Namespace:
        return job_arguments(job, self._arguments, self._arguments.output_dir)

    def _prepare_encoder(self, job: Job) -> None:
        if self._text_encoder is None:
            import torch

            from cogvideox.text.encoder import load_text_encoder

            print("loading the text encoder")
            self._text_encoder = load_text_encoder(self._model, getattr(torch, job.dtype))

    def _embed(self, job: Job) -> None:
        # One prompt at a time: the bits of an embedding depend on the size of its batch.
        arguments = self._of(job)
        tensors = stage1.embed(self._text_encoder, arguments, job.max_sequence_length)
        stage1.save(tensors, arguments, self._model, job.max_sequence_length)

    def _prepare_transformer(self, job: Job) -> None:
        shape = shape_of(job)
        denoiser = self._plans[shape].denoiser
        if self._mesh != denoiser.mesh:
            print(f"loading the transformer, mesh {self.mesh(shape)}")
            self._parameters = None  # first, so that the devices never hold two
            self._parameters, self._mesh = denoiser.load(), denoiser.mesh
        if self._compiled is None or self._compiled[0] != shape:
            from runtime.compilation import CompilationLog

            log, self._compiled = CompilationLog(), None
            self._compiled = shape, denoiser.compile(self._arguments.executables)
            print(f"{shape}: {log.sentence()}")

    def _denoise(self, job: Job) -> None:
        from cogvideox.denoising.scheduler import make_schedule

        arguments = self._of(job)
        folder = arguments.output_dir
        plan = dataclasses.replace(
            self._plans[shape_of(job)],
            settings=job.settings,
            schedule=make_schedule(job.settings, self._model.scheduler),
        )
        embeddings, _ = stage2.open_embeddings(arguments)
        prompt_embeds = plan.denoiser.prompt_embeds(stage_files.read_tensors(embeddings))
        section = stage2.make_section(plan, arguments, self._model, embeddings)
        every = self._arguments.checkpoint_every
        checkpoints = stage2.Checkpoints(folder, section, every, self._stop.is_set)
        _, step = self._compiled
        latents = stage2.denoise(
            plan, step, self._parameters, prompt_embeds, checkpoints, _step_bar
        )
        stage2.save(latents, section, folder, folder)

    def _prepare_decoder(self, job: Job) -> None:
        if self._decoder is None:
            import jax

            from cogvideox.vae.decode import load_decoder
            from runtime.mesh import all_devices, make_mesh

            print("loading the VAE decoder")
            dp, tp = self._arguments.dp, self._arguments.tp
            mesh = make_mesh(all_devices(dp, tp, jax.device_count()))
            self._decoder_mesh = dict(mesh.shape)
            self._decoder = load_decoder(
                f"vae_{job.decoder}", self._model.path / "vae", mesh, job.dtype
            )
        _, latents_file = stage3.open_latents(self._of(job))
        self._decoder.compile(
            latents_file.shapes["latents"],
            output="uint8",
            executables=self._arguments.executables,
        )

    def _decode(self, job: Job) -> None:
        from cogvideox.model.settings import decoded_frames

        arguments = self._of(job)
        folder = arguments.output_dir
        config, latents_file = stage3.open_latents(arguments)
        videos = [folder / stage_files.VIDEO_FILE]
        section = stage3.make_section(
            arguments, self._model, latents_file, videos, self._decoder_mesh, f"vae_{job.decoder}"
        )
        latents = stage_files.read_tensors(latents_file)["latents"]
        frames = decoded_frames(latents.shape[2], self._model.vae.temporal_compression_ratio)
        batches = self._until_aborted(self._decoder.decode(latents, output="uint8"))
        stage3.write_videos(batches, frames, videos, arguments, {**config, stage3.STAGE: section})
        stage_files.record_section(folder, stage3.STAGE, section, inherited=folder)

    def _until_aborted(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            if self._abort.is_set():
                raise stage2.StoppedBetweenSteps
            yield batch


def _step_bar(states: Iterable, **what: Any) -> Iterable:
    """A progress bar of steps on a terminal, none in a log file."""
    from tqdm import tqdm

    return tqdm(states, total=what["total"], initial=what["initial"], leave=False, disable=None)
