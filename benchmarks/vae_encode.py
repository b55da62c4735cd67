"""The VAE encode: its cost on a TPU by the compiler's estimate, or on the devices that are here.

    python benchmarks/vae_encode.py --topology v6e-8 --size 768x1360x81 --json
    JAX_PLATFORMS=cpu python benchmarks/vae_encode.py --topology local --size 768x1360x1 --json

With a named topology nothing runs and no TPU is needed; see `vae_decode.py`, whose figures these
are. With `local` an encoder of random weights encodes random frames: an image on the CPU, in
float32 as stage 1 does, or a video on the devices.
"""

import argparse
import json
import os
import resource
import statistics
import time
from typing import Any

from vae_decode import RUNS, programs_on_tpu, weight_bytes

from runtime.chips import MACHINES
from runtime.topology import machine_devices


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", choices=("torchax", "flax"), default="torchax")
    parser.add_argument("--topology", choices=[*MACHINES, "local"], default="v6e-8")
    parser.add_argument(
        "--size", default="768x1360x81", help="height x width x frames (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    height, width, frames = map(int, arguments.size.split("x"))
    shape = (1, frames, height, width, 3)
    measure = run_here if arguments.topology == "local" else compile_for_tpu
    result = {
        "benchmark": "vae_encode",
        "encoder": arguments.encoder,
        "topology": arguments.topology,
        "size": arguments.size,
        **measure(arguments.encoder, arguments.topology, shape),
    }
    if arguments.json:
        print(json.dumps(result), flush=True)
    else:
        print("\n".join(f"{name:32} {value}" for name, value in result.items()), flush=True)


def published_program(encoder: str, devices: list[Any], dtype: str) -> Any:
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh

    from cogvideox.model.config import VaeConfig
    from cogvideox.vae.encode import make_encode_program

    mesh = Mesh(np.array(devices), ("devices",))
    return make_encode_program(f"vae_encoder_{encoder}", VaeConfig(), mesh, jnp.dtype(dtype))


def compile_for_tpu(encoder: str, topology: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Compile the programs cold; return their memory and the estimated cost of an encode."""
    from cogvideox.vae.encode_program import frame_batches

    program = published_program(encoder, list(machine_devices(topology)), "bfloat16")
    return programs_on_tpu(
        lambda: program.programs(shape),
        len(frame_batches(shape[1])),
        list(program.mesh.devices.flat),
        weight_bytes(program.abstract_weights),
    )


def run_here(encoder: str, _: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Encode random frames with random weights on the devices of this machine."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import numpy as np

    from cogvideox.vae.encode import Encoder

    devices = jax.devices()
    dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    program = published_program(encoder, devices, dtype)
    random = np.random.default_rng(0)

    def fill(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        # Deviation 1 over the inputs of a product keeps activations of order 1.
        inputs = abstract.shape[-2] if len(abstract.shape) > 1 else 1
        values = random.standard_normal(abstract.shape, np.float32) / inputs**0.5
        return jax.device_put(values.astype(abstract.dtype), abstract.sharding)

    loaded = Encoder(program, jax.tree.map(fill, program.abstract_weights))
    video = random.integers(0, 256, shape, dtype=np.uint8)
    start = time.perf_counter()
    loaded.compile(shape)
    compile_seconds = time.perf_counter() - start
    seconds, cpu_start = [], time.process_time()
    while len(seconds) < 1 + RUNS:  # the first run touches all memory for the first time
        start = time.perf_counter()
        loaded.encode(video)
        seconds.append(time.perf_counter() - start)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return {
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "dtype": dtype,
        "seconds": statistics.median(seconds[1:]),
        "all_seconds": seconds,
        "cpu_seconds": (time.process_time() - cpu_start) / (1 + RUNS),
        "peak_bytes": max(known) if len(known) == len(peaks) else None,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "compile_seconds": compile_seconds,
    }


if __name__ == "__main__":
    main()
