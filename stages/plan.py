"""Plans the memory and time of a video, before anything runs (see `estimates`)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cogvideox.denoising.parts import split_steps
from cogvideox.denoising.program import Denoiser
from cogvideox.model.settings import DenoisingSettings
from cogvideox.vae.decode import Decoder
from cogvideox.vae.encode_program import EncodeProgram
from runtime.jax_types import Device
from runtime.mesh import fitting_meshes, make_mesh
from stages.estimates import (
    Compiler,
    Estimate,
    decoder_programs,
    derive_decode,
    derive_lossy,
    derive_step,
    estimate_decode,
    estimate_step,
)
from stages.speed import SPEEDS, NamedSpeed, resolve
from stages.steps import denoisers_of


@dataclasses.dataclass(frozen=True)
class Target:
    """The programs of one size on one machine.

    Attributes:
        latents: what stage 3 decodes, [B, C, T, H, W].
        denoiser: on the mesh to compile; None leaves stage 2 out.
        decoder: None leaves stage 3 out.
        encoder: of stage 1's image or video; None leaves stage 1 out.
        encoded: what it encodes, [B, F, height, width, 3].
    """

    settings: DenoisingSettings
    latents: tuple[int, ...]
    denoiser: Denoiser | None
    decoder: Decoder | None
    encoder: EncodeProgram | None = None
    encoded: tuple[int, ...] = ()

    @property
    def device(self) -> Device:
        """The first device of the machine."""
        program = self.denoiser or self.decoder or self.encoder
        assert program is not None
        return program.mesh.devices.flat[0]


def make_plans(
    targets: Sequence[Target], *, compile_all: bool, threads: int
) -> Iterator[dict[str, Any]]:
    """Plans a video of each size on one machine; yields JSON values.

    Compiles one mesh per size and the decoder of the first size, and derives the rest.

    Args:
        compile_all: compile every mesh and every decoder instead.
        threads: programs to compile at once.
    """
    known: tuple[Estimate, tuple[int, ...]] | None = None
    pool = ThreadPoolExecutor(threads)
    try:
        compiler = Compiler(pool)
        for i, target in enumerate(targets):
            if target.denoiser is not None:
                others = _other_meshes(target.denoiser) if compile_all else []
                for denoiser in (target.denoiser, *others):
                    compiler.start(denoiser.program)
            if target.decoder is not None and (compile_all or i == 0):
                for program in decoder_programs(target.decoder, target.latents):
                    compiler.start(program)
        for target in targets:
            plan = _plan_step(target, compiler, compile_all)
            if target.decoder is not None:
                if known is None or compile_all:
                    estimate = estimate_decode(target.decoder, target.latents, compiler)
                else:
                    estimate = derive_decode(target.decoder, target.latents, *known)
                if estimate.hbm:  # nothing can be derived from a program that is too large
                    known = known or (estimate, target.latents)
                mesh = target.decoder.mesh
                described = estimate.describe(mesh.devices.flat[0])
                plan["decode"] = {"mesh": dict(mesh.shape), **described}
            step, decode = plan.get("best_step"), plan.get("decode")
            if step and decode and decode["fits"] and decode["seconds"] is not None:
                plan["video_seconds"] = {
                    speed: round(seconds + decode["seconds"], 1)
                    for speed, seconds in plan["seconds_of_all_steps"].items()
                }
            yield plan
    finally:
        pool.shutdown(cancel_futures=True)


def _plan_step(target: Target, compiler: Compiler, compile_all: bool) -> dict[str, Any]:
    settings, denoiser = target.settings, target.denoiser
    size = f"{settings.height}x{settings.width}x{settings.num_frames}"
    plan: dict[str, Any] = {"size": size, "steps": settings.num_inference_steps}
    if denoiser is None:
        return plan
    device = denoiser.mesh.devices.flat[0]
    own = estimate_step(denoiser, compiler)
    meshes = [(denoiser, own)]
    for other in _other_meshes(denoiser):
        # Nothing can be derived from a program that is too large.
        derived = own.hbm and not compile_all
        estimate = derive_step(other, own, denoiser) if derived else estimate_step(other, compiler)
        meshes.append((other, estimate))
    rows = [{"mesh": dict(one.mesh.shape), **found.describe(device)} for one, found in meshes]
    fitting = [i for i, row in enumerate(rows) if row["fits"] and row["seconds"] is not None]
    plan |= {"step": rows, "best_step": None}
    if not fitting:
        return plan
    best = min(fitting, key=lambda i: rows[i]["seconds"])
    seconds = _seconds_of_all_steps(settings, *meshes[best], compiler)
    return plan | {"best_step": rows[best], "seconds_of_all_steps": seconds}


def _seconds_of_all_steps(
    settings: DenoisingSettings, denoiser: Denoiser, step: Estimate, compiler: Compiler
) -> dict[str, float]:
    """Returns the seconds of a video's steps for each `--speed` that the devices can run.

    Args:
        step: of the exact step.
    """
    device = denoiser.mesh.devices.flat[0]

    def seconds(estimate: Estimate) -> float:
        return estimate.describe(device)["seconds"]

    skipped = seconds(estimate_step(denoiser, compiler, "reuse"))
    steps, found = settings.num_inference_steps, {}
    for speed in SPEEDS:
        lossy = resolve(NamedSpeed(speed), settings, None)
        computed = lossy.mask.computed if lossy.mask else (True,) * steps
        if lossy.sparse and not denoiser.backend.takes_lists:
            continue
        parts = split_steps(steps, lossy.dense_steps, lossy.guided_steps)
        denoisers = denoisers_of(denoiser, lossy, steps)
        total = 0.0
        for part, one in zip(parts, denoisers, strict=True):
            ungated = dataclasses.replace(denoiser, sparse=one.sparse, backend=one.backend)
            estimate = step if ungated == denoiser else derive_lossy(ungated, step, denoiser)
            if part.gated:
                estimate = derive_step(one, estimate, ungated)
            runs = sum(computed[part.start : part.stop])
            skips = part.stop - part.start - runs
            total += runs * seconds(estimate) + skips * skipped / (2 if part.gated else 1)
        found[speed] = round(total, 2)
    return found


def table(plans: Sequence[Mapping[str, Any]]) -> str:
    """Formats plans as a table."""
    lines = [f"{'size':<14}{'what':<8}{'mesh':<20}{'fits':<6}{'GB a chip':>10}{'weights':>9}"
             f"{'inputs':>8}{'temp.':>7}{'seconds':>10}  source"]  # fmt: skip
    for plan in plans:
        rows = [("step", row) for row in plan.get("step", ())]
        rows += [("decode", plan["decode"])] if "decode" in plan else []
        for what, row in rows:
            mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1)
            hbm = row["hbm_bytes_per_chip"]
            sizes = [hbm.get(kind) for kind in ("total", "weights", "inputs", "temporaries")]
            total, weights, inputs, temporaries = (
                "-" if size is None else f"{size / 1e9:.2f}" for size in sizes
            )
            seconds = "-" if row["seconds"] is None else f"{row['seconds']:.2f}"
            best = "  best" if row is plan.get("best_step") else ""
            lines.append(
                f"{plan['size']:<14}{what:<8}{mesh or '1 device':<20}"
                f"{'yes' if row['fits'] else 'NO':<6}{total:>10}{weights:>9}{inputs:>8}"
                f"{temporaries:>7}{seconds:>10}  {row['source']}{best}"
            )
        if plan.get("video_seconds") is not None:
            speeds = ", ".join(f"{name} {s} s" for name, s in plan["video_seconds"].items())
            lines.append(f"{plan['size']:<14}a video of {plan['steps']} steps: {speeds}")
    note = "Seconds are compiler estimates; nothing was run. All speeds but exact are lossy."
    return "\n".join([*lines, note])


def _other_meshes(denoiser: Denoiser) -> list[Denoiser]:
    """The same step on the other meshes of as many devices."""
    mesh = denoiser.mesh
    shapes = fitting_meshes(
        denoiser.latents.batch * (2 if denoiser.guided else 1),
        denoiser.config.num_attention_heads,
        mesh.size,
    )
    devices = list(mesh.devices.flat)
    return [
        dataclasses.replace(denoiser, mesh=make_mesh(shape, devices))
        for shape in shapes
        if math.prod(shape) == mesh.size and shape != tuple(mesh.shape.values())
    ]
