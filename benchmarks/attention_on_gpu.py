"""Timings and errors of the attention kernels on the GPU of this machine.

`attention_kernel.py --chip local` prints them. All kernels of a shape are timed in turn, so that a
change of the clock affects all. Inputs are unit normals in bfloat16.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from splash_attention import BlockLists

# heads, tokens, head size: a CogVideoX1.5-5B block with guidance on one GPU is 96 x 45,106 x 64.
SHAPES = (
    (96, 45106, 64),
    (24, 45106, 64),
    (12, 45106, 64),
    (96, 1024, 64),
    (96, 4096, 64),
    (96, 17776, 64),
    (24, 87778, 64),
    (48, 45106, 128),
)
# bounded, online: q is scaled before it is rounded, and bounds are given. splash_attention: the
# public function, which reads q, k and v for the bounds and scales the scores. cudnn_parts: cuDNN
# on full tiles of keys, the remaining keys added outside; faster where keys end inside a tile.
KERNELS = ("bounded", "online", "splash_attention", "cudnn", "cudnn_parts")
# The bounded path over lists of chunks, beside the dense one in `bounded`.
SPARSE = "sparse"
_ROUNDS = 5
_SECONDS = 0.05  # at least so long a round of one kernel
_CHECKED_QUERIES, _CHECKED_HEADS = 512, 2


def bounded_path(largest_score: float, lists: BlockLists | None = None) -> Callable[..., Any]:
    """Return the kernel with a given bound, over lists if there are any, as `calls` does."""
    import jax.numpy as jnp

    from splash_attention.hopper.attention import hopper_attention

    def call(q: Any, k: Any, v: Any, scaled: Any) -> Any:
        del q
        score, value = (jnp.full(k.shape[::2], x, jnp.float32) for x in (largest_score, 1.0))
        given = {"largest_score": score, "largest_value": value, "block_lists": lists}
        return hopper_attention(scaled, k, v, factor=1.0, **given)[0]

    return call


def calls(head_dim: int) -> dict[str, Callable[..., Any]]:
    """Return the kernels as functions of q, k, v [1, S, N, D] and q scaled for the first two."""
    import jax
    import jax.numpy as jnp

    from cogvideox.transformer.backends.base import Bounds
    from cogvideox.transformer.backends.gpu import GpuBackend
    from splash_attention import splash_attention

    def public(q: Any, k: Any, v: Any, scaled: Any) -> Any:
        # One head after another in memory, as the function takes them.
        return splash_attention(*(x.reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v)))

    def cudnn(q: Any, k: Any, v: Any, scaled: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")

    def cudnn_parts(q: Any, k: Any, v: Any, scaled: Any) -> Any:
        q_rows, k_rows, v_rows = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
        unused = Bounds(jnp.zeros(()), jnp.zeros(()))
        out = GpuBackend().attend(q_rows, k_rows, v_rows, head_dim, k.shape[1], unused)
        return out.reshape(q.shape)

    functions = (bounded_path(64.0), bounded_path(float("inf")), public, cudnn, cudnn_parts)
    return {name: jax.jit(f) for name, f in zip(KERNELS, functions, strict=True)}


def inputs(heads: int, tokens: int, head_dim: int, deviation: float) -> tuple[Any, ...]:
    """Return q, k, v [1, S, N, D] and q scaled before it is rounded; q has this deviation."""
    import jax
    import jax.numpy as jnp

    from splash_attention import query_scale

    @jax.jit
    def make(key: Any) -> tuple[Any, ...]:
        shape = (1, tokens, heads, head_dim)
        q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(key, 3))
        q = q * deviation
        scaled = q * query_scale(head_dim)
        return tuple(x.astype(jnp.bfloat16) for x in (q, k, v, scaled))

    return make(jax.random.key(0))


def relative_error(
    kernel: str, out: Any, q: Any, k: Any, v: Any, scaled: Any, *, lists: BlockLists | None = None
) -> float:
    """Return the relative L2 error of some queries against float32, on the kernel's own inputs.

    Of lists the queries are those of the second tile, whose list is short.
    """
    import jax
    import jax.numpy as jnp

    from splash_attention import reference_attention

    @jax.jit
    def error(out: Any, q: Any, k: Any, v: Any) -> Any:
        if lists is None:
            out, q = (x[:, :_CHECKED_QUERIES] for x in (out, q))
        else:
            out, q = (x[:, : 2 * lists.block_q] for x in (out, q))
        out, q, k, v = (x[:, :, :_CHECKED_HEADS].swapaxes(1, 2) for x in (out, q, k, v))
        out, q, k, v = (x.astype(jnp.float32) for x in (out, q, k, v))
        scale = math.log(2) if prescaled else None
        exact = reference_attention(q, k, v, scale=scale, block_lists=own)
        if own is not None:
            out, exact = (x[:, :, own.block_q :] for x in (out, exact))
        return jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)

    prescaled = kernel in ("bounded", "online", SPARSE)
    own = lists and dataclasses.replace(
        lists, chunks=lists.chunks[:, :2], lengths=lists.lengths[:, :2]
    )
    return float(error(out, scaled if prescaled else q, k, v))


def seconds(call: Callable[..., Any], operands: tuple[Any, ...], times: int) -> float:
    """Return the seconds of one call, of `times` queued at once."""
    import jax

    start = time.perf_counter()
    for _ in range(times):
        out = call(*operands)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / times


def in_turn(kernels: dict[Any, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict[Any, float]:
    """Return the median seconds of each function of its operands, all measured in turn."""
    times = {
        name: max(1, round(_SECONDS / seconds(call, operands, 2)))
        for name, (call, operands) in kernels.items()
    }
    measured: dict[Any, list[float]] = {name: [] for name in kernels}
    for _ in range(_ROUNDS):
        for name, (call, operands) in kernels.items():
            measured[name].append(seconds(call, operands, times[name]))
    return {name: statistics.median(values) for name, values in measured.items()}


def sparse_rows(
    of_densities: list[BlockLists], heads: int, tokens: int, head_dim: int
) -> list[dict[str, Any]]:
    """Return a line of the table for each of some lists, and how it compares with dense."""
    import jax

    dense = jax.jit(bounded_path(64.0))
    kernels: dict[Any, Any] = {"dense": (dense, inputs(heads, tokens, head_dim, 1.0))}
    padded = inputs(heads, of_densities[0].keys, head_dim, 1.0)
    errors = {}
    for lists in of_densities:
        density = round(float(lists.density()[0]), 4)
        call = jax.jit(bounded_path(64.0, lists))
        kernels[density] = call, padded
        errors[density] = {"normal": relative_error(SPARSE, call(*padded), *padded, lists=lists)}
    medians = in_turn(kernels)
    return [
        {
            "kernel": SPARSE,
            "chip": jax.devices()[0].device_kind,
            "heads": heads,
            "q_len": tokens,
            "kv_len": tokens,
            "head_dim": head_dim,
            "density": density,
            "milliseconds": round(medians[density] * 1e3, 3),
            "dense_milliseconds": round(medians["dense"] * 1e3, 3),
            "of_dense": round(medians[density] / medians["dense"], 3),
            "teraflops": round(
                4 * heads * tokens**2 * head_dim * density / medians[density] / 1e12, 1
            ),
            "of_cudnn": None,
            "relative_l2_error": error,
            "source": "measured",
            "jax": jax.__version__,
        }
        for density, error in errors.items()
    ]


def rows(kernels: list[str], heads: int, tokens: int, head_dim: int) -> list[dict[str, Any]]:
    """Return a line of the table for each kernel."""
    import jax

    functions = {name: call for name, call in calls(head_dim).items() if name in kernels}
    errors: dict[str, dict[str, float]] = {name: {} for name in functions}
    for inputs_name, deviation in (("concentrated", 2.5), ("normal", 1.0)):
        operands = inputs(heads, tokens, head_dim, deviation)
        for name, call in functions.items():
            if name == "splash_attention":
                # It reads the heads one after another, so compare it on such arrays.
                one = tuple(x[:, :, :1] for x in operands)
                errors[name][inputs_name] = relative_error(
                    name, call(*one).reshape(one[0].shape), *one
                )
            else:
                errors[name][inputs_name] = relative_error(name, call(*operands), *operands)
    medians = in_turn({name: (call, operands) for name, call in functions.items()})
    cudnn = min((medians[name] for name in medians if name.startswith("cudnn")), default=None)
    return [
        {
            "kernel": name,
            "chip": jax.devices()[0].device_kind,
            "heads": heads,
            "q_len": tokens,
            "kv_len": tokens,
            "head_dim": head_dim,
            "milliseconds": round(value * 1e3, 3),
            "teraflops": round(4 * heads * tokens**2 * head_dim / value / 1e12, 1),
            "of_cudnn": cudnn and round(value / cudnn, 3),
            "relative_l2_error": errors[name],
            "source": "measured",
            "jax": jax.__version__,
        }
        for name, value in medians.items()
    ]
