"""One full denoising step (all blocks, guidance, scheduler) at full size, without weights.

    python benchmarks/transformer_step.py --topology v6e-8 --mesh dp=2,sp=4 --json
    python benchmarks/transformer_step.py --topology v6e-8 --speed near --json
    python benchmarks/transformer_step.py --topology local --size 768x1360x81 --json
    python benchmarks/transformer_step.py --topology local --speed fast --steps 4 --json

A named topology compiles for it with libtpu, no TPU needed, and prints what the compiler estimates:
XLA's cycles of every operation plus the scheduled bundles of the Pallas kernels. Time spent waiting
for collectives is in neither; their bytes are printed. `local` runs random weights on the devices
of this machine and prints measured seconds. With lossy options, a topology compiles their programs
instead, and `local` also times a run with at least `--steps` steps of each kind (dense, sparse,
skipped) and extrapolates both to a video of 50 steps.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any, cast

import utils
from cogvideox.transformer.flops import step_flops
from runtime.chips import V6E
from stages.speed import Lossy, resolve

PLANNED_STEPS = 50  # of a video on a named topology


def parse_arguments() -> argparse.Namespace:
    parser = utils.ArgumentParser((__doc__ or "").splitlines()[0], "")
    parser.add_argument("--topology", default="v6e-8", help="v6e-1, -4, -8, -16, or local")
    parser.add_argument("--model", default="CogVideoX1.5-5B", help="a published transformer")
    parser.add_argument("--size", default="768x1360x81", help="height x width x frames")
    parser.add_argument("--mesh", help="such as dp=2,sp=4; default: the stages' own choice")
    parser.add_argument(
        "--baseline", action="store_true", help="time diffusers with compiled blocks instead"
    )
    parser.add_argument("--attention", default="auto", help="as in stage2_transformer.py")
    parser.add_argument("--steps", type=int, default=3, help="timed steps on local devices")
    parser.add_argument("--save", type=Path, help="local: write the final latents to this .npy")
    parser.add_argument("--compare", type=Path, help="local: another mesh's --save file")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    utils.add_speed(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.baseline:
        report = run_diffusers(arguments)
    elif arguments.topology == "local":
        report = run_here(arguments)
    else:
        report = compile_for(arguments)
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:<28}{value}")


def make_denoiser(
    devices: Any, model: str, size: str, mesh: str | None, attention: str = "auto"
) -> Any:
    """Makes the stages' Denoiser for the given model, size and mesh, as the options write them."""
    import jax
    from published_models import TRANSFORMERS

    from cogvideox.denoising.program import Denoiser
    from cogvideox.model.settings import LatentShape
    from cogvideox.transformer.backends import choose_backend
    from runtime.mesh import AXES, choose_mesh

    config = TRANSFORMERS[model]
    height, width, frames = map(int, size.split("x"))
    latent_frames = (frames - 1) // 4 + 1
    latent_frames += -latent_frames % (config.patch_size_t or 1)
    parts = [part.partition("=") for part in (mesh or "").split(",") if part]
    asked = {axis: int(count) for axis, _, count in parts}
    sizes = [asked.get(axis) for axis in AXES]
    if asked:
        sizes = [size or 1 for size in sizes]
    heads = config.num_attention_heads
    shape = choose_mesh(*sizes, batch=2, num_heads=heads, num_devices=devices.size)
    count = shape[0] * shape[1] * shape[2]
    device = devices.flat[0]
    capability = device.compute_capability if device.platform == "gpu" else None
    return Denoiser(
        config=config,
        stored={},
        latents=LatentShape(1, latent_frames, 16, height // 8, width // 8),
        text_tokens=config.max_text_seq_length,
        guided=True,
        dtype="bfloat16",
        mesh=jax.sharding.Mesh(devices.reshape(-1)[:count].reshape(shape), AXES),
        backend=choose_backend(attention, device.platform, "bfloat16", capability),
    )


def make_settings(arguments: argparse.Namespace, steps: int) -> Any:
    """Settings of a guided video with this many steps."""
    from cogvideox.model.settings import DenoisingSettings

    height, width, frames = map(int, arguments.size.split("x"))
    return DenoisingSettings(height, width, frames, 16, steps, 6.0, False, "dpm", 0)


def flops(denoiser: Any) -> dict[str, float]:
    """Returns the floating-point operations of one step on all devices: attention and linear."""
    work = step_flops(denoiser.config, denoiser.layout.tokens, denoiser.samples)
    if denoiser.sparse_step:
        work["attention"] *= denoiser.sparse_step.density()
    return work


def compile_for(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compiles the steps for a named topology; returns the compiler's estimates."""
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    from cogvideox.denoising.parts import split_steps
    from runtime.topology import machine_devices
    from stages.steps import denoisers_of

    denoiser = make_denoiser(
        machine_devices(arguments.topology),
        arguments.model,
        arguments.size,
        arguments.mesh,
        arguments.attention,
    )
    report = {
        "topology": arguments.topology,
        "model": arguments.model,
        "size": arguments.size,
        "mesh": dict(denoiser.mesh.shape),
        "source": "compiler estimate",
    }
    lossy = resolve(cast(Any, arguments), make_settings(arguments, PLANNED_STEPS), None)
    if not lossy.names:
        return report | compile_step(denoiser, "off")
    kept: Any = "keep" if lossy.mask else "off"
    computed = lossy.mask.computed if lossy.mask else (True,) * PLANNED_STEPS
    parts = split_steps(PLANNED_STEPS, lossy.dense_steps, lossy.guided_steps)
    denoisers = denoisers_of(denoiser, lossy, PLANNED_STEPS)
    programs, seconds = {}, 0.0
    for (start, stop, *_), part in zip(parts, denoisers, strict=True):
        runs = sum(computed[start:stop])
        for residual, times in ((kept, runs), (cast(Any, "reuse"), stop - start - runs)):
            if times:
                found = compile_step(part, residual)
                name = part.step_program(residual).name
                programs[name] = {"mesh": dict(part.mesh.shape), "times": times, **found}
                seconds += times * found["estimated_seconds"]
    return report | {
        "lossy": lossy.names,
        "steps": PLANNED_STEPS,
        "estimated_seconds_of_all_steps": round(seconds, 2),
        "programs": programs,
    }


def compile_step(denoiser: Any, residual: Any) -> dict[str, Any]:
    """Compiles one step; `residual` is what it does with the residual."""
    from runtime import hlo_costs
    from runtime.executables import compile_all

    start, cpu_start = time.perf_counter(), time.process_time()
    (built,) = compile_all([denoiser.step_program(residual)], threads=1)
    compiled = built.executable
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    hlo = compiled.as_text()
    assert hlo is not None
    costs = hlo_costs.read_costs(hlo)
    layers = denoiser.config.num_layers
    kernels = {} if residual == "reuse" else kernel_cycles(denoiser)
    if costs.kernel_calls != layers * len(kernels):
        raise RuntimeError(f"{costs.kernel_calls} kernel calls in {layers} blocks")
    by_kind = costs.cycles | {name: cycles * layers for name, cycles in kernels.items()}
    total = sum(by_kind.values())
    hbm = hlo_costs.memory(compiled)
    report = {
        "estimated_cycles": total,
        "estimated_seconds": round(total / V6E.clock_hz, 3),
        "cycles_by_kind": by_kind,
        "collective_bytes_per_chip": sum(costs.collective_bytes.values()),
        "collective_bytes_by_kind": costs.collective_bytes,
        "hbm_bytes_per_chip": {"weights": hbm["arguments"], **hbm},
        "code_bytes": hbm["code"],
        "compile_seconds": round(seconds, 1),
        "compile_cpu_seconds": round(cpu_seconds, 1),
    }
    if residual == "reuse":
        return report
    work = flops(denoiser)
    peak = sum(work.values()) / denoiser.mesh.size / V6E.bfloat16_flops
    return report | {
        "other_cycles_per_block": (total - by_kind["attention"]) // layers,
        "flops": work,
        "share_of_arithmetic_floor": round(peak / (total / V6E.clock_hz), 3),
    }


def kernel_cycles(denoiser: Any) -> dict[str, int]:
    """Returns the cycles of one block's Pallas kernels on one chip, each compiled alone.

    The scheduled bundles, or the time to read and write HBM where that is longer. Attention takes
    the path without a running maximum, as it does for every head whose norms allow it.
    """
    from kernel_schedule import measure

    from cogvideox.transformer.backends.tpu.modulated_norm import grid
    from cogvideox.transformer.backends.tpu.token_shards import Tiles

    config, shape = denoiser.config, dict(denoiser.mesh.shape)
    head_dim, shards = config.attention_head_dim, shape["sp"]
    rows = config.width // (shape["tp"] * shards)
    batch = denoiser.samples // shape["dp"]
    cycles = {"attention": attention_cycles(denoiser, batch, rows // head_dim)}
    split = (batch, shards, rows, denoiser.layout.padded // shards)
    rows_of_device = denoiser.layout.padded // (shards * shape["tp"])
    residual = (batch, rows_of_device, config.width)
    steps = math.prod(Tiles(*split).grid)
    names = {"norm_q": "norm_and_rotate", "norm_k": "norm_and_rotate"}
    if denoiser.backend.precision.attention == "int8_qk":
        names = {name: name for name in ("key_statistics", "quantize_keys", "quantize_queries")}
    kernels = {
        **{kind: (name, split, steps) for kind, name in names.items()},
        "norm1": ("norm_and_modulate", residual, math.prod(grid(residual))),
    }
    if shards > 1:
        kernels["join_v"] = ("join_values", split, steps)
        kernels["part_output"] = ("part_tokens", split, steps)
    for kind, (name, x, steps) in kernels.items():
        what = {"kind": kind, "shape": x, "head_dim": head_dim}
        bundles = measure(lower_kernel, "v6e", name, steps, what).cycles
        traffic = 2 * 2 * math.prod(x) / V6E.hbm_bytes_per_second * V6E.clock_hz
        cycles[kind] = max(bundles, math.ceil(traffic))
    return cycles | {"norm2": cycles["norm1"]}  # the same kernel on the same shape


def attention_cycles(denoiser: Any, batch: int, heads: int) -> int:
    """Returns the cycles of attention in one block: in a sparse step the mean of all blocks.

    Args:
        batch: samples of a device.
        heads: heads of a device, of each sample; in a sparse step those with the most work count.
    """
    import numpy as np
    from attention_kernel import lists_schedule, row

    head_dim, sparse = denoiser.config.attention_head_dim, denoiser.sparse_step
    quantized = denoiser.backend.precision.attention == "int8_qk"
    if sparse is None:
        kernel = "int8_qk_beside" if quantized else "bounded"
        return row("v6e", kernel, batch * heads, denoiser.layout.tokens, head_dim)["cycles"]
    kernel = "sparse_int8_qk_beside" if quantized else "sparse"
    found = lists_schedule("v6e", kernel, sparse.lists, batch * heads, head_dim)
    of_tiles = -(-np.asarray(sparse.lists.lengths) // sparse.lists.unroll)
    bodies = of_tiles.sum(1)[sparse.tables.rule]  # [L, N]
    of_devices = bodies.reshape(len(bodies), -1, heads).sum(-1).max(-1)
    return int(found.cycles + found.uncounted_bundles * batch * of_devices.mean())


def lower_kernel(sharding: Any, kind: str, shape: tuple[int, ...], head_dim: int) -> Any:
    """Lowers one of the kernels around attention alone; runs in a separate process."""
    import jax
    import jax.numpy as jnp

    from cogvideox.transformer.backends.tpu.int8_heads import quantize_heads
    from cogvideox.transformer.backends.tpu.modulated_norm import norm_and_modulate
    from cogvideox.transformer.backends.tpu.token_shards import (
        join_values,
        norm_and_rotate,
        part_tokens,
    )

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if kind == "norm1":
        parameters = abstract((shape[0], 2, shape[-1]), jnp.float32)
        function = jax.jit(norm_and_modulate, static_argnums=4)
        x, text_rows = abstract(shape, jnp.bfloat16), abstract((), jnp.int32)
        return function.lower(x, parameters, parameters, text_rows, 1e-5)
    batch, shards, rows, tokens = shape
    if kind == "join_v":
        return jax.jit(join_values).lower(abstract(shape, jnp.bfloat16))
    if kind == "part_output":
        joined = abstract((batch, rows, shards * tokens), jnp.bfloat16)
        return jax.jit(part_tokens, static_argnums=1).lower(joined, shards)
    norm = abstract((head_dim,), jnp.float32)
    table = abstract((head_dim // 2, shards * tokens), jnp.float32)
    x = abstract(shape, jnp.bfloat16)
    if kind not in ("norm_q", "norm_k"):
        valid = abstract((shards * tokens,), jnp.bool_)
        norms = (norm, norm), (norm, norm)
        return jax.jit(quantize_heads).lower(x, x, *norms, (table, table), valid)
    function = jax.jit(norm_and_rotate, static_argnames="transposed")
    return function.lower(x, norm, norm, (table, table), transposed=kind == "norm_k")


def run_here(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the seconds per step on the devices of this machine, with random weights."""
    import jax
    import numpy as np

    from cogvideox.denoising.loop import run_loop, to_host
    from cogvideox.denoising.noise import NoiseSource
    from cogvideox.denoising.scheduler import make_schedule
    from cogvideox.model.config import SchedulerConfig
    from cogvideox.transformer.parameters import abstract_parameters
    from stages.steps import compile_steps, denoisers_of, load_steps

    what = (arguments.model, arguments.size, arguments.mesh, arguments.attention)
    denoiser = make_denoiser(np.asarray(jax.devices()), *what)
    abstract = abstract_parameters(denoiser.config, denoiser.mesh, np.dtype("bfloat16"))
    parameters = random_parameters(abstract)
    rng = np.random.default_rng(0)
    text = rng.normal(size=(2, 1, denoiser.text_tokens, denoiser.config.text_embed_dim))
    embeddings = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    config = SchedulerConfig(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )

    def times(lossy: Lossy, count: int) -> tuple[list[float], Any, float]:
        """Seconds of each step, the last state, and seconds of compilation."""
        settings = make_settings(arguments, count)
        schedule = make_schedule(settings, config)
        planned = lossy.apply(schedule)
        parts = denoisers_of(denoiser, lossy, len(schedule.timesteps))
        start = time.perf_counter()
        steps = compile_steps(parts, planned, None)
        compiled = time.perf_counter() - start
        loaded = load_steps(parts, steps, parameters, embeddings)
        stamps, state = [time.perf_counter()], None
        inputs = (loaded, planned, settings.seed, NoiseSource())
        for state in run_loop(*inputs, conditioning=black_image(denoiser)):  # noqa: B007
            stamps.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(stamps)], state, compiled

    exact, state, compile_seconds = times(Lossy(), arguments.steps + 1)
    # The first step, which touches all memory for the first time, is not counted.
    seconds = sum(exact[1:]) / arguments.steps
    stats = jax.devices()[0].memory_stats() or {}
    final = to_host(state).latents.astype(np.float32)
    if arguments.save:
        np.save(arguments.save, final)
    report = {
        "topology": "local",
        "device": f"{denoiser.mesh.size} x {jax.devices()[0].device_kind}",
        "model": arguments.model,
        "size": arguments.size,
        "mesh": dict(denoiser.mesh.shape),
        "attention": denoiser.backend.name,
        "seconds_per_step": round(seconds, 4),
        "compile_seconds": round(compile_seconds, 1),
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "teraflops_per_device": round(
            sum(flops(denoiser).values()) / denoiser.mesh.size / seconds / 1e12, 1
        ),
        "latents_std": float(final.std()),
        "jax": jax.__version__,
    }
    video = resolve(cast(Any, arguments), make_settings(arguments, PLANNED_STEPS), None)
    if video.names:
        of_video = step_kinds(video, PLANNED_STEPS)
        lossy, kinds = shortest_run(arguments, of_video)
        measured = times(lossy, len(kinds))[0]
        report |= {"lossy": video.names} | extrapolate(measured, kinds, of_video, seconds)
    if arguments.compare:
        other = np.load(arguments.compare)
        report["relative_difference"] = float(np.linalg.norm(final - other) / np.linalg.norm(other))
    return report


def black_image(denoiser: Any) -> Any:
    """Returns the conditioning of a black image for an image-to-video model, else None."""
    import numpy as np

    from cogvideox.denoising.conditioning import Conditioning

    if not denoiser.config.image_to_video:
        return None
    _, _, channels, height, width = denoiser.latents.sizes
    image = np.zeros((1, channels, 1, height, width), np.dtype("bfloat16"))
    return Conditioning("image", image, image, 1.0)


def step_kinds(lossy: Lossy, steps: int) -> list[str]:
    """Returns the kind of each step of a run, such as "sparse"."""
    from cogvideox.denoising.parts import split_steps

    computed = lossy.mask.computed if lossy.mask else (True,) * steps
    return [
        (("sparse" if part.sparse else "dense") if computed[i] else "skipped")
        + (", gated" if part.gated else "")
        for part in split_steps(steps, lossy.dense_steps, lossy.guided_steps)
        for i in range(part.start, part.stop)
    ]


def shortest_run(arguments: argparse.Namespace, video: list[str]) -> tuple[Lossy, list[str]]:
    """Returns a run with at least `--steps` timed steps of every kind of a video, and its kinds."""
    for steps in range(arguments.steps + 1, 10 * PLANNED_STEPS):
        lossy = resolve(cast(Any, arguments), make_settings(arguments, steps), None)
        kinds = step_kinds(lossy, steps)
        if all(kinds[1:].count(kind) >= arguments.steps for kind in video):
            return lossy, kinds
    raise ValueError(f"no run has {arguments.steps} steps of every kind")


def extrapolate(
    times: list[float], kinds: list[str], video: list[str], exact: float
) -> dict[str, Any]:
    """Extrapolates the seconds of a run to those of a whole video.

    Args:
        times, kinds: of the steps of the run. The first is not counted, as in the exact run.
        video: the kinds of a video's steps.
        exact: seconds of an exact step.
    """
    of_kinds: dict[str, list[float]] = {}
    for kind, seconds in zip(kinds[1:], times[1:], strict=True):
        of_kinds.setdefault(kind, []).append(seconds)
    means = {kind: statistics.mean(seconds) for kind, seconds in of_kinds.items()}
    steps = collections.Counter(video)
    whole = sum(count * means[kind] for kind, count in steps.items())
    return {
        "seconds_by_kind": {kind: round(mean, 4) for kind, mean in means.items()},
        "steps_timed": {kind: len(seconds) for kind, seconds in of_kinds.items()},
        "steps_of_video": dict(steps),
        "extrapolated_seconds_of_video": round(whole, 2),
        "extrapolated_seconds_of_exact_video": round(len(video) * exact, 2),
        "share_of_exact": round(whole / (len(video) * exact), 4),
    }


def run_diffusers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs diffusers' transformer on one GPU: blocks under torch.compile, guided batch of 2."""
    import diffusers
    import torch
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from published_models import TRANSFORMERS

    config = TRANSFORMERS[arguments.model]
    height, width, frames = map(int, arguments.size.split("x"))
    height, width, frames = height // 8, width // 8, (frames - 1) // 4 + 1
    frames += frames % 2
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    model = diffusers.CogVideoXTransformer3DModel(**dataclasses.asdict(config)).eval()
    for block in model.transformer_blocks:
        block.compile(fullgraph=True)
    grid = (height // 2, width // 2)
    rotary = get_3d_rotary_pos_embed(
        64, None, grid, frames // 2, grid_type="slice", max_size=grid, device=torch.device("cuda")
    )
    inputs = {
        "hidden_states": torch.randn(2, frames, 16, height, width),
        "encoder_hidden_states": torch.randn(2, 226, 4096),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": rotary,
    }
    stamps = []
    with torch.no_grad():
        for _ in range(arguments.steps + 1):
            model(**inputs)
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
    return {
        "baseline": "diffusers, torch.compile per block",
        "device": torch.cuda.get_device_name(),
        "size": arguments.size,
        "seconds_per_step": round((stamps[-1] - stamps[0]) / arguments.steps, 4),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "torch": torch.__version__,
    }


def random_parameters(abstract: dict[str, Any]) -> dict[str, Any]:
    """Makes random weights on the devices: matrices of unit gain, norms near one."""
    import jax
    import jax.numpy as jnp

    def fill(key: jax.Array, name: str, shape: tuple[int, ...]) -> jax.Array:
        if "norm" in name and name.endswith("weight") and "linear" not in name:
            return jnp.ones(shape)
        fan_in = shape[-1] if name.endswith("weight") else 2500
        return jax.random.normal(key, shape, jnp.bfloat16) / fan_in**0.5

    made = {}
    for i, (name, leaf) in enumerate(abstract.items()):
        make = jax.jit(
            lambda key, name=name, leaf=leaf: fill(key, name, leaf.shape).astype(leaf.dtype),
            out_shardings=leaf.sharding,
        )
        made[name] = make(jax.random.key(i))
    return made


if __name__ == "__main__":
    main()
