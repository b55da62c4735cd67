"""The VAE decode: what it costs on a TPU by the compiler's estimate, or on the GPU that is here.

    python benchmarks/vae_decode.py --decoder flax --topology v6e-8 --size 768x1360x81 --json
    python benchmarks/vae_decode.py --decoder torchax flax diffusers --topology local --json

With a named topology nothing runs and no TPU is needed: both programs of the decoder are compiled
cold for the published model's shape, side by side as the decoder compiles them, and their cycles
(XLA's own estimates plus the bundles of the Pallas kernels) and their memory are reported. With
`local` a decoder of random weights decodes random latents; each decoder in its own process, so that
one's memory is not the other's.
"""

import argparse
import collections
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from runtime.chips import MACHINES, V6E
from runtime.topology import machine_devices

DECODERS = ("torchax", "flax", "diffusers")
# CogVideoX1.5-5B; its other values are the defaults.
SCALING_FACTOR = 0.7
RUNS = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["torchax", "flax"])
    parser.add_argument("--topology", choices=[*MACHINES, "local"], default="v6e-8")
    parser.add_argument(
        "--size", default="768x1360x81", help="height x width x frames (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a decoder")
    arguments = parser.parse_args()
    if "diffusers" in arguments.decoder and arguments.topology != "local":
        parser.error("diffusers is measured with --topology local only")
    return arguments


def latents_shape(size: str) -> tuple[int, ...]:
    """Return [B, C, T, H, W] of the published VAE's latents for a video of this size."""
    height, width, frames = map(int, size.split("x"))
    return 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8


def main() -> None:
    arguments = parse_arguments()
    if len(arguments.decoder) > 1:
        for decoder in arguments.decoder:
            options = ["--topology", arguments.topology, "--size", arguments.size]
            options += ["--json"] if arguments.json else []
            subprocess.run([sys.executable, __file__, "--decoder", decoder, *options], check=True)
        return
    (decoder,) = arguments.decoder
    shape = latents_shape(arguments.size)
    if arguments.topology != "local":
        numbers = compile_for_tpu(decoder, arguments.topology, shape)
    elif decoder == "diffusers":
        numbers = run_diffusers(shape)
    else:
        numbers = run_here(decoder, shape)
    result = {
        "benchmark": "vae_decode",
        "decoder": decoder,
        "topology": arguments.topology,
        "size": arguments.size,
        **numbers,
    }
    if arguments.json:
        print(json.dumps(result), flush=True)
    else:
        print("\n".join(f"{name:32} {value}" for name, value in result.items()), flush=True)


def compile_for_tpu(decoder_name: str, topology: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Compile both programs cold; return their memory and the estimated cost of a decode."""
    import numpy as np
    from jax.sharding import Mesh

    from cogvideox.vae.program import frame_batches

    devices = machine_devices(topology)
    mesh = Mesh(np.array(devices).reshape(1, -1), ("dp", "tp"))
    decoder = published_decoder(decoder_name, mesh)
    return programs_on_tpu(
        lambda: decoder.programs(shape, output="uint8"),
        len(frame_batches(shape[2])),
        list(mesh.devices.flat),
        weight_bytes(decoder.abstract_weights),
    )


def programs_on_tpu(
    make_programs: Callable[[], list[Any]], batches: int, devices: list[Any], weights: int
) -> dict[str, Any]:
    """Compile cold the programs of the first batch and, if there is one, of the later batches.

    Args:
        make_programs: returns the programs, not yet lowered.
        batches: of frames in the video.
        weights: bytes of the weights on every chip.
    """
    import jax

    from runtime.executables import find_or_compile
    from runtime.hlo_costs import memory, read_costs

    jax.config.update("jax_enable_compilation_cache", False)
    programs = make_programs()
    start, cpu_start = time.perf_counter(), time.process_time()
    compiled = find_or_compile(programs, None, devices=devices, threads=2)
    compile_seconds = time.perf_counter() - start
    compile_cpu_seconds = time.process_time() - cpu_start

    calls = [_calls_while_lowering(program) for program in make_programs()]
    schedules = {call: schedule(call) for call in sorted({c for cs in calls for c in cs}, key=str)}
    times = (1, batches - 1)[: len(programs)]
    by_kind: collections.Counter[str] = collections.Counter()
    received, parts = 0, []
    for program, program_calls, count in zip(compiled, calls, times, strict=True):
        hlo = program.as_text()
        assert hlo is not None
        costs = read_costs(hlo)
        if costs.kernel_calls != sum(program_calls.values()):
            raise RuntimeError(f"{costs.kernel_calls} kernels, traced {program_calls.total()}")
        kernels = sum(schedules[call].cycles * n for call, n in program_calls.items())
        xla = sum(costs.cycles.values())
        by_kind["kernels"] += count * kernels
        by_kind.update({kind: count * cycles for kind, cycles in costs.cycles.items()})
        received += count * sum(costs.collective_bytes.values())
        parts.append(
            {
                "runs": count,
                "kernel_cycles": kernels,
                "xla_cycles": xla,
                "kernel_calls": costs.kernel_calls,
                "memory": memory(program),
            }
        )
    total = sum(by_kind.values())
    larger = max((part["memory"] for part in parts), key=lambda hbm: hbm["total"])
    return {
        "source": "compiler estimate",
        "estimated_cycles": total,
        "estimated_seconds": round(total / V6E.clock_hz, 3),
        "cycles_by_kind": dict(by_kind),
        "collective_bytes_per_chip": received,
        "hbm_bytes_per_chip": {"weights": weights, **larger},
        "code_bytes": sum(part["memory"]["code"] for part in parts),
        "compile_seconds": compile_seconds,
        "compile_cpu_seconds": compile_cpu_seconds,
        "programs": parts,
        "kernels": [
            {
                **dataclasses.asdict(call),
                "calls": [program_calls[call] for program_calls in calls],
                "cycles": found.cycles,
                "mxu": found.units["MXU"],
                "spill_stores": found.units["VSTORE:SPILL"],
                "compile_seconds": found.compile_seconds,
            }
            for call, found in schedules.items()
        ],
    }


def weight_bytes(weights: dict[str, Any]) -> int:
    """Return the bytes of the weights; every chip holds all of them."""
    return sum(array.size * array.dtype.itemsize for array in weights.values())


def published_decoder(name: str, mesh: Any) -> Any:
    import jax.numpy as jnp

    from cogvideox.model.config import VaeConfig
    from cogvideox.vae.decode import make_decoder

    config = VaeConfig(scaling_factor=SCALING_FACTOR)
    return make_decoder(f"vae_{name}", config, mesh, jnp.dtype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """One call of a kernel.

    Attributes:
        function: its name in `cogvideox.vae.tpu.layers`.
        arrays: name, length of the tuple (0 for a single array), shape and dtype of each.
        options: its other arguments.
    """

    function: str
    arrays: tuple[tuple[str, int, tuple[int, ...], str], ...]
    options: tuple[tuple[str, Any], ...]


def _calls_while_lowering(program: Any) -> collections.Counter[KernelCall]:
    """Return the kernels that a program calls; a lowered program calls none again."""
    import inspect

    from cogvideox.vae.tpu import layers

    calls: collections.Counter[KernelCall] = collections.Counter()

    def recording(name: str) -> Any:
        function = getattr(layers, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            arrays, options = [], []
            for key, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
                if isinstance(value, tuple):
                    arrays.append((key, len(value), value[0].shape, value[0].dtype.name))
                elif hasattr(value, "dtype"):
                    arrays.append((key, 0, value.shape, value.dtype.name))
                else:
                    options.append((key, value))
            calls[KernelCall(name, tuple(arrays), tuple(options))] += 1
            return function(*args, **kwargs)

        return mock.patch.object(layers, name, call)

    with recording("causal_conv"), recording("upsample"):
        program.lower()
    return calls


def lower_kernel(sharding: Any, function: str, arrays: Any, options: Any) -> Any:
    """Lower one kernel alone; runs in a separate process."""
    import jax

    from cogvideox.vae.tpu import layers

    def abstract(count: int, shape: tuple[int, ...], dtype: str) -> Any:
        one = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return (one,) * count if count else one

    operands = {name: abstract(*described) for name, *described in arrays}
    kernel = getattr(layers, function)
    return jax.jit(lambda operands: kernel(**operands, **dict(options))).lower(operands)


def schedule(call: KernelCall) -> Any:
    from kernel_schedule import measure

    (x,) = (shape for name, _, shape, _ in call.arrays if name == "x")
    return measure(lower_kernel, "v6e", call.function, x[0] * (x[2] + 1), dataclasses.asdict(call))


def run_here(decoder_name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Decode random latents with random weights on the devices of this machine."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import numpy as np
    from jax.sharding import Mesh

    devices = jax.devices()
    mesh = Mesh(np.array(devices).reshape(1, -1), ("dp", "tp"))
    decoder = published_decoder(decoder_name, mesh)
    random = np.random.default_rng(0)

    def fill(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        # Deviation 1 over the inputs of a product keeps activations of order 1.
        inputs = abstract.shape[-2] if len(abstract.shape) > 1 else 1
        values = random.standard_normal(abstract.shape, np.float32) / inputs**0.5
        return jax.device_put(values.astype(abstract.dtype), abstract.sharding)

    decoder.weights = jax.tree.map(fill, decoder.abstract_weights)
    latents = random.standard_normal(shape, np.float32)
    start = time.perf_counter()
    decoder.compile(shape, output="uint8")
    compile_seconds = time.perf_counter() - start
    seconds, frames = [], 0
    for _ in range(1 + RUNS):  # the first run touches all memory for the first time
        start = time.perf_counter()
        frames = sum(batch.shape[1] for batch in decoder.decode(latents, output="uint8"))
        seconds.append(time.perf_counter() - start)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds,
        "frames": frames,
        "peak_bytes": max(known) if len(known) == len(peaks) else None,
        "compile_seconds": compile_seconds,
    }


def run_diffusers(shape: tuple[int, ...]) -> dict[str, Any]:
    """Decode with diffusers on one GPU, untiled, to uint8 frames on the host."""
    import torch
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("cuda"):
        vae = AutoencoderKLCogVideoX(scaling_factor=SCALING_FACTOR).eval()
        torch.nn.Module.to(vae, torch.bfloat16)  # the types of diffusers' own `to` are wrong
    latents = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    seconds, frames = [], 0
    with torch.no_grad():
        for _ in range(1 + RUNS):
            start = time.perf_counter()
            video = vae.decode(latents / SCALING_FACTOR, return_dict=False)[0]
            pixels = ((video * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            seconds.append(time.perf_counter() - start)
            frames = pixels.shape[2]
            del video
    return {
        "device": torch.cuda.get_device_name(),
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds,
        "frames": frames,
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    main()
