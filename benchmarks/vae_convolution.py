"""A causal 3x3x3 convolution of one frame and the two before it, in the forms XLA can be given.

    python benchmarks/vae_convolution.py --size 768x1360 --channels 128

bfloat16, on the first device of this machine; one JSON object a form. `first_seconds` is the first
run after compilation, in which cuDNN may still build what it runs.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

RUNS = 10

Frames = list[jax.Array]  # three of [1, W, H, C], or one of [1, W, H, 3 C]
Kernels = list[jax.Array]  # three of [3, 3, C, C], or one of [3, 3, 3 C, C]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def in_a_ring(frames: Frames, kernels: Kernels) -> jax.Array:
    """One 2-D convolution over frames side by side in the channels: `cogvideox.vae.xla.layers`."""
    (ring,), (kernel,) = frames, kernels
    return convolve(ring, kernel)


def put_side_by_side(frames: Frames, kernels: Kernels) -> jax.Array:
    """The same convolution, after concatenating the frames."""
    return convolve(jnp.concatenate(frames, axis=3), jnp.concatenate(kernels, axis=2))


def summed_in_float32(frames: Frames, kernels: Kernels) -> jax.Array:
    """Three 2-D convolutions and a sum."""
    parts = [
        lax.optimization_barrier(convolve(*each)) for each in zip(frames, kernels, strict=True)
    ]
    total = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))
    return total.astype(frames[0].dtype)


def three_d(frames: Frames, kernels: Kernels) -> jax.Array:
    return lax.conv_general_dilated(
        jnp.stack(frames, axis=1),
        jnp.stack(kernels),
        (1, 1, 1),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def measure(form: Callable[[Frames, Kernels], jax.Array], *operands: list) -> dict[str, float]:
    start = time.perf_counter()
    program = jax.jit(form).lower(*operands).compile()
    compiled = time.perf_counter()
    jax.block_until_ready(program(*operands))
    first = time.perf_counter()
    for _ in range(RUNS):
        result = program(*operands)
    jax.block_until_ready(result)
    return {
        "compile_seconds": round(compiled - start, 3),
        "first_seconds": round(first - compiled, 3),
        "milliseconds": round((time.perf_counter() - first) / RUNS * 1e3, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="768x1360", help="height x width (default %(default)s)")
    parser.add_argument("--channels", type=int, default=128, help="(default %(default)s)")
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split("x"))
    channels = arguments.channels
    keys = jax.random.split(jax.random.key(0), 6)
    frame, kernel = (1, width, height, channels), (3, 3, channels, channels)
    frames = [jax.random.normal(key, frame, jnp.bfloat16) for key in keys[:3]]
    kernels = [jax.random.normal(key, kernel, jnp.bfloat16) / channels for key in keys[3:]]
    operations = 2 * 27 * channels**2 * height * width
    ring = [jnp.concatenate(frames, axis=3)], [jnp.concatenate(kernels, axis=2)]
    for form in (in_a_ring, put_side_by_side, summed_in_float32, three_d):
        operands = ring if form is in_a_ring else (frames, kernels)
        numbers = measure(form, *operands)
        result = {
            "benchmark": "vae_convolution",
            "device": jax.devices()[0].device_kind,
            "size": arguments.size,
            "channels": channels,
            "form": form.__name__,
            **numbers,
            "tflops_per_second": round(operations / numbers["milliseconds"] / 1e9, 1),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
