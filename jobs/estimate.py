"""Estimate the time and disk space of a batch before it starts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from cogvideox.model.folder import ModelFolder
from cogvideox.model.settings import latent_shape
from cogvideox.transformer.flops import step_flops
from jobs.records import STAGES, Job, JobState
from runtime.chips import DENOISING_FLOPS
from stages.session import Shape
from stages.sparse import density_of

# Bytes per pixel and frame of an mp4 of default quality. Noise takes more, drawings take less.
_VIDEO_BYTES = 0.15
_OTHER_BYTES = 2 << 20  # contact sheet and records


def describe(
    jobs: Sequence[Job],
    needs: Mapping[Job, str],
    states: Sequence[JobState],
    model: ModelFolder,
    mesh: Callable[[Shape], dict[str, int]],
) -> str:
    """Formats the plan: one line for each shape, then the totals.

    Args:
        jobs: the jobs of the batch.
        needs: the next stage of each job, from `Ledger.next`.
        states: the jobs in the batch's folder; finished ones calibrate the estimate.
        model: the model folder.
        mesh: returns the transformer's mesh axes and sizes for a shape.
    """
    import jax

    devices = jax.devices()
    pace = Pace(states, model, devices[0].device_kind, len(devices))
    lines, seconds, unknown, size = [], 0.0, 0, 0
    shapes = list(dict.fromkeys(job.shape for job in jobs))
    for shape in shapes:
        own = [job for job in jobs if job.shape == shape]
        todo = [job for job in own if needs[job] in STAGES]
        times = [pace.seconds(job) for job in todo]
        known = [time for time in times if time is not None]
        disk = sum(job_bytes(job, model) for job in todo)
        seconds += sum(known)
        unknown += len(times) - len(known)
        size += disk
        time = "time unknown" if len(known) < len(times) else f"about {_duration(sum(known))}"
        axes = " ".join(f"{axis}={n}" for axis, n in mesh(shape).items())
        lines.append(
            f"  {shape}: {len(own)} job(s), {len(todo)} to do, mesh {axes}, {time}, "
            f"{disk / 1e6:,.0f} MB"
        )
    total = f"{len(jobs)} job(s) of {len(shapes)} shape(s), {size / 1e6:,.0f} MB to write, "
    if unknown:
        total += f"time unknown: {pace.source}"
    else:
        total += f"about {_duration(seconds)} plus loading and compiling ({pace.source})"
    return "\n".join([*lines, total])


class Pace:
    """Estimates the seconds of a video.

    Scales the median of the finished videos in the folder, or a known speed of the devices, by
    the arithmetic of the denoising steps. For long sequences this grows with the square of the
    number of tokens.

    Attributes:
        source: where the estimate comes from, for the user.
    """

    def __init__(
        self, states: Sequence[JobState], model: ModelFolder, device_kind: str, devices: int
    ):
        """
        Args:
            states: the jobs in the batch's folder.
            model: the model folder.
            device_kind: JAX's name of the devices.
            devices: how many there are.
        """
        self._model = model
        ratios = [
            state.seconds / self._work(state.job)
            for state in states
            if state.stages_done == len(STAGES)
        ]
        speed = DENOISING_FLOPS.get(device_kind, 0.0) * devices
        self._ratio: float | None = None
        self.source = "no video in this folder is finished"
        if ratios:
            self._ratio = statistics.median(ratios)
            self.source = f"from {len(ratios)} finished video(s) in this folder"
        elif speed:
            self._ratio = 1 / speed
            self.source = f"denoising only, from the known speed of {device_kind}"

    def seconds(self, job: Job) -> float | None:
        """Returns the seconds that the job takes, or None if nothing is known."""
        return None if self._ratio is None else self._ratio * self._work(job)

    def _work(self, job: Job) -> float:
        """Returns the floating-point operations of all denoising steps."""
        config = self._model.transformer
        shape, _ = latent_shape(job.settings, self._model, batch=1)
        patch = config.patch_size**2 * (config.patch_size_t or 1)
        tokens = shape.frames * shape.height * shape.width // patch + job.max_sequence_length
        step = step_flops(config, tokens, samples=2 if job.settings.guided else 1)
        lossy, total = job.lossy, sum(step.values())
        sparse_cost = 1.0
        if lossy.sparse:
            density = density_of(lossy.sparse, job.settings, self._model)
            sparse_cost -= (1 - density) * step["attention"] / total
        return total * lossy.computed_steps(job.settings.executed_steps, sparse_cost)


def job_bytes(job: Job, model: ModelFolder) -> int:
    """Estimates the bytes of a job's folder: exact for tensors, approximate for the video."""
    settings, value = job.settings, 4 if job.dtype == "float32" else 2
    width = model.transformer.text_embed_dim
    shape, padding = latent_shape(settings, model, batch=1)
    embeddings = 2 * job.max_sequence_length * width * value
    latents = (shape.frames - padding) * shape.channels * shape.height * shape.width * value
    pixels = settings.height * settings.width * settings.num_frames
    return int(embeddings + latents + pixels * _VIDEO_BYTES) + _OTHER_BYTES


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
