"""What a batch will take, before it starts: jobs by shape, seconds, and disk."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cogvideox.model.folder import ModelFolder
from cogvideox.model.settings import latent_shape
from jobs.records import STAGES, Job, JobState
from jobs.workshop import Shape, shape_of

# Multiplications a second and device, by jax's name of the device. The v6e's is a compiler estimate
# (0.94 s a step of 768x1360x81 on eight), the H200's was measured (6.27 s a step on one).
_SPEED = {"TPU v6 lite": 1.97e14, "NVIDIA H200": 2.36e14}
# An mp4 of default quality, by pixel and frame; noise takes more, cartoons less.
_VIDEO_BYTES = 0.15
_OTHER_BYTES = 2 << 20  # contact sheet, records


def describe(
    jobs: Sequence[Job],
    needs: Mapping[Job, str],
    states: Sequence[JobState],
    model: ModelFolder,
    mesh: Callable[[Shape], dict[str, int]],
) -> str:
    """The plan as a table.

    Args:
        needs: what each job needs next (`Ledger.next`).
        states: the jobs that the batch's folder holds; finished ones tell how long others take.
    """
    import jax

    pace = Pace(states, model, jax.devices())
    lines, seconds, unknown, size = [], 0.0, 0, 0
    shapes = list(dict.fromkeys(map(shape_of, jobs)))
    for shape in shapes:
        own = [job for job in jobs if shape_of(job) == shape]
        todo = [job for job in own if needs[job] in STAGES]
        times = [pace.seconds(job) for job in todo]
        known = [time for time in times if time is not None]
        disk = sum(job_bytes(job, model) for job in todo)
        seconds, unknown, size = (
            seconds + sum(known),
            unknown + len(times) - len(known),
            size + disk,
        )
        time = (
            f"about {_duration(sum(known))}" if len(known) == len(times) else "time not known yet"
        )
        axes = " ".join(f"{axis}={n}" for axis, n in mesh(shape).items())
        lines.append(
            f"  {shape}: {len(own)} job(s), {len(todo)} to do, mesh {axes}, {time}, "
            f"{disk / 1e6:,.0f} MB"
        )
    total = f"{len(jobs)} job(s) of {len(shapes)} shape(s), {size / 1e6:,.0f} MB to write, "
    if unknown:
        total += f"time not known: {pace.source}"
    else:
        total += f"about {_duration(seconds)} plus loading and compiling ({pace.source})"
    return "\n".join([*lines, total])


class Pace:
    """Seconds a video, from finished videos in the same folder or what is known of the devices.

    Stage 2's time goes with the arithmetic of a step, which for long sequences is the square of
    the tokens; a shape that was never run is scaled from those that were.
    """

    def __init__(self, states: Sequence[JobState], model: ModelFolder, devices: Sequence[Any]):
        self._model = model
        ratios = [
            state.seconds / self._work(state.job)
            for state in states
            if state.stages_done == len(STAGES)
        ]
        speed = _SPEED.get(devices[0].device_kind, 0.0) * len(devices)
        if ratios:
            self._ratio = statistics.median(ratios)
            self.source = f"from {len(ratios)} finished video(s) here"
        elif speed:
            self._ratio = 1 / speed
            self.source = f"denoising alone, by the arithmetic of {devices[0].device_kind}"
        else:
            self._ratio = None
            self.source = "no finished video in this folder to go by"

    def seconds(self, job: Job) -> float | None:
        return None if self._ratio is None else self._ratio * self._work(job)

    def _work(self, job: Job) -> float:
        """Multiplications of all steps."""
        config = self._model.config("transformer")
        shape, _ = latent_shape(job.settings, self._model, batch=1)
        patch = config["patch_size"] ** 2 * (config["patch_size_t"] or 1)
        tokens = shape.frames * shape.height * shape.width // patch + job.max_sequence_length
        width = config["num_attention_heads"] * config["attention_head_dim"]
        # Attention's two products, and the 12 E^2 weights of a block for each token.
        step = config["num_layers"] * (2 * tokens**2 * width + 12 * tokens * width**2)
        return step * job.settings.num_inference_steps * (2 if job.settings.guided else 1)


def job_bytes(job: Job, model: ModelFolder) -> int:
    """What a job's folder will hold, roughly: the tensors exactly, the video by rule of thumb."""
    settings, value = job.settings, 4 if job.dtype == "float32" else 2
    width = model.config("transformer")["text_embed_dim"]
    shape, padding = latent_shape(settings, model, batch=1)
    embeddings = 2 * job.max_sequence_length * width * value
    latents = (shape.frames - padding) * shape.channels * shape.height * shape.width * value
    pixels = settings.height * settings.width * settings.num_frames
    return int(embeddings + latents + pixels * _VIDEO_BYTES) + _OTHER_BYTES


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
