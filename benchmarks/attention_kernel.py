"""Cycles of the attention kernels on a TPU chip, by the compiler's own schedule; no TPU needed.

    python benchmarks/attention_kernel.py --chip v6e --json
    python benchmarks/attention_kernel.py --chip local --json

The first prints compiler estimates: bundles of the final schedule, weighed by loop trips and grid.
`local` measures the kernels on the Hopper GPU of this machine, cuDNN's among them.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from typing import Any

import attention_on_gpu
from kernel_schedule import Schedule, measure

from runtime.chips import CHIPS
from splash_attention import BlockLists

# heads, tokens, head size: one chip's share of a CogVideoX1.5-5B block first.
SHAPES = (
    (12, 45106, 64),
    (12, 1024, 64),
    (12, 17776, 64),
    (12, 87778, 64),
    (6, 45106, 128),
)
# "_beside": the keys of all heads side by side, as a projection makes them and stage 2 passes them.
OURS = ("bounded", "bounded_beside", "online", "online_beside", "int8_qk", "int8_qk_beside")
# The bounded path over lists of chunks, at these shares of all chunks: for the first shape only.
SPARSE = ("sparse", "sparse_beside", "sparse_int8_qk", "sparse_int8_qk_beside")
DENSITIES = (1.0, 0.5, 0.36, 0.27, 0.15)
SPARSE_TILE, SPARSE_CHUNK = 512, 256  # queries and keys, as the transformer's rules take them
UNITS = {
    "mxu": "MXU",
    "xlu": "XLU",
    "valu": "VALU",
    "eup": "EUP",
    "vpop": "VPOP",
    "vector_loads": "VLOAD",
    "vector_stores": "VSTORE",
    "spill_fills": "VLOAD:FILL",
    "spill_stores": "VSTORE:SPILL",
}


def operand_dtype(kernel: str) -> str:
    """Return the dtype of the kernel's q and k."""
    name = kernel.removesuffix("_beside").removeprefix("sparse_")
    return {"int8_qk": "int8", "float32": "float32"}.get(name, "bfloat16")


def lower_ours(
    sharding: Any,
    chip: str,
    heads: int,
    length: int,
    head_dim: int,
    kernel: str,
    blocks: dict,
    list_shapes: tuple[tuple[int, ...], ...] = (),
    listed_valid: int | None = None,
) -> Any:
    """Lower one path of the kernel of this package.

    Args:
        list_shapes: of the arrays of `refs.ListRefs`.
        listed_valid: as in `attention_kernel`.
    """
    import jax
    import jax.numpy as jnp

    from splash_attention.block_sizes import BlockSizes, chip_named
    from splash_attention.kernel import attention_kernel
    from splash_attention.quantize import DIGITS

    block_sizes = BlockSizes(**blocks)
    dtype = jnp.dtype(operand_dtype(kernel))
    quantized = dtype == jnp.int8
    value_dtype = jnp.dtype(jnp.bfloat16) if quantized else dtype
    # int8 keys end on a tile of 32.
    keys = round_up(length, 32) if quantized else length
    rows = head_dim * DIGITS if quantized else head_dim
    beside = kernel.endswith("_beside")
    operands: dict[str, tuple[tuple[int, ...], jnp.dtype]] = {
        "q": ((heads, rows, length), dtype),
        "k": ((1, keys, heads * rows) if beside else (heads, keys, rows), dtype),
        "v": ((heads, head_dim, length), value_dtype),
    }
    if quantized:
        operands["q_scale"] = ((heads, 1, length), jnp.dtype(jnp.bfloat16))
    lists = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in list_shapes]

    def call(lists: list[jax.Array], **arrays: Any) -> jax.Array:
        return attention_kernel(
            **arrays,
            lists=tuple(lists),
            listed_valid=listed_valid,
            bounded=not kernel.startswith("online"),
            kv_len=jnp.array([length], jnp.int32),
            always_valid=length,
            most_valid=length,
            window_size=None,
            block_sizes=block_sizes,
            vmem_limit_bytes=chip_named(chip).require_vmem(block_sizes, head_dim, dtype),
            out_dtype=value_dtype,
            interpret=False,
        )[0]

    return jax.jit(call).lower(
        lists,
        **{
            name: jax.ShapeDtypeStruct(shape, d, sharding=sharding)
            for name, (shape, d) in operands.items()
        },
    )


def lower_jax_splash(
    sharding: Any, heads: int, length: int, head_dim: int, blocks: tuple[int, int, int]
) -> Any:
    """Lower jax's own splash attention; `length` is a multiple of its blocks."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import splash_attention as jax_splash

    mask = jax_splash.MultiHeadMask([jax_splash.FullMask((length, length))] * heads)
    kernel = jax_splash.make_splash_mha_single_device(
        mask, block_sizes=jax_splash.BlockSizes(*blocks)
    )
    array = jax.ShapeDtypeStruct((heads, length, head_dim), jnp.bfloat16, sharding=sharding)
    return jax.jit(kernel).lower(array, array, array)


def lower_jax_flash(
    sharding: Any, heads: int, length: int, head_dim: int, blocks: tuple[int, int, int]
) -> Any:
    """Lower jax's flash attention; `length` is a multiple of its blocks."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import flash_attention as jax_flash

    sizes = jax_flash.BlockSizes(*blocks, block_b=1)
    array = jax.ShapeDtypeStruct((1, heads, length, head_dim), jnp.bfloat16, sharding=sharding)
    return jax.jit(lambda q, k, v: jax_flash.flash_attention(q, k, v, block_sizes=sizes)).lower(
        array, array, array
    )


def lower_tokamax(
    sharding: Any, heads: int, length: int, head_dim: int, blocks: tuple[int, int, int]
) -> Any:
    """Lower tokamax's splash attention, with its own scheduler and base of the exponentials."""
    import jax
    import jax.numpy as jnp
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore
        splash_attention_kernel as splash,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import (  # pyright: ignore
        splash_attention_mask,
    )

    kernel = splash.make_splash_mha(
        splash_attention_mask.FullMask((length, length)),
        config=splash.SplashConfig(*blocks, use_experimental_scheduler=True),
        q_seq_shards=1,
    )
    array = jax.ShapeDtypeStruct((heads, length, head_dim), jnp.bfloat16, sharding=sharding)
    return jax.jit(kernel).lower(array, array, array)


# Kernels of other projects: how to lower them, and the name of their Pallas call.
RIVALS = {
    "jax_splash": (lower_jax_splash, "splash_mha_fwd_no_residuals"),
    "jax_flash": (lower_jax_flash, "flash_attention"),
    "tokamax": (lower_tokamax, "splash_mha_fwd_no_residuals"),
}
KERNELS = (*OURS, *SPARSE, *RIVALS)


def measure_ours(
    chip: str, heads: int, length: int, head_dim: int, kernel: str, blocks: dict[str, int]
) -> Schedule:
    """Return the schedule of one path with given blocks."""
    steps = heads * -(-length // blocks["block_q"]) * -(-length // blocks["block_kv"])
    return measure(
        lower_ours,
        chip,
        "splash_attention",
        steps,
        {
            "chip": chip,
            "heads": heads,
            "length": length,
            "head_dim": head_dim,
            "kernel": kernel,
            "blocks": blocks,
        },
    )


def sparse_lists(density: float, length: int, precision: str) -> BlockLists:
    """Return lists that visit a share of all chunks; text is always visited, and visits everything.

    The first chunk and the first tile hold the text. The other tiles visit evenly spread chunks,
    with a key of padding each: 3 rows of 85 columns.
    """
    chunks = round_up(length, SPARSE_CHUNK) // SPARSE_CHUNK
    tiles = round_up(length, SPARSE_TILE) // SPARSE_TILE
    visited = max(2, int((density * tiles - 1) * chunks / max(1, tiles - 1)))
    spread = [1 + i * (chunks - 1) // (visited - 1) for i in range(visited - 1)]
    lists = [list(range(chunks)), *[[0, *spread]] * (tiles - 1)]
    text = min(SPARSE_CHUNK, length - (chunks - 1) * (SPARSE_CHUNK - 1))
    valid = [text] + [SPARSE_CHUNK - 1] * (chunks - 1)
    return BlockLists.from_lists(
        [lists], block_q=SPARSE_TILE, chunk=SPARSE_CHUNK, valid=valid, precision=precision
    )


def lists_schedule(
    chip: str, kernel: str, lists: BlockLists, heads: int, head_dim: int
) -> Schedule:
    """Return the schedule over lists; its uncounted bundles are those of one body."""
    tiles = lists.chunks.shape[1]
    shapes = ((heads,), lists.chunks.shape, lists.lengths.shape, lists.valid.shape)
    arguments = {
        "chip": chip, "heads": heads, "length": lists.keys, "head_dim": head_dim, "kernel": kernel,
        "blocks": dataclasses.asdict(lists.block_sizes), "list_shapes": shapes,
        "listed_valid": lists.least_valid,
    }  # fmt: skip
    return measure(lower_ours, chip, "splash_attention", heads * tiles, arguments)


def sparse_row(
    chip: str, kernel: str, heads: int, length: int, head_dim: int, density: float
) -> dict[str, Any]:
    """Return one line of the table for lists of chunks.

    The number of bodies of a tile is data, so the schedule counts the loop's body once.
    """
    dtype = operand_dtype(kernel)
    lists = sparse_lists(density, length, "int8_qk" if dtype == "int8" else "bf16")
    blocks = dataclasses.asdict(lists.block_sizes)
    schedule = lists_schedule(chip, kernel, lists, heads, head_dim)
    bodies = heads * int((-(-lists.lengths // lists.unroll)).sum())
    cycles = schedule.cycles + bodies * schedule.uncounted_bundles
    return {
        "kernel": kernel,
        "chip": chip,
        "heads": heads,
        "q_len": length,
        "kv_len": length,
        "head_dim": head_dim,
        "density": round(float(lists.density()[0]), 4),
        "cycles": cycles,
        "milliseconds": round(cycles / CHIPS[chip].clock_hz * 1e3, 3),
        "block_sizes": blocks,
        "bodies": bodies,
        "bundles_per_body": schedule.uncounted_bundles,
        "program_bundles": schedule.program_bundles,
        "compile_seconds": round(schedule.compile_seconds, 1),
        "source": "compiler estimate",
    }


def round_up(value: int, step: int) -> int:
    """Round up to a multiple of `step`."""
    return -(-value // step) * step


def row(chip: str, kernel: str, heads: int, length: int, head_dim: int) -> dict[str, Any]:
    """Return one line of the table."""
    padded = length
    vmem = None
    if kernel in RIVALS:
        lower, name = RIVALS[kernel]
        # The best of their tiles found at head size 64.
        block_q, block_kv, compute = 1024, min(2048, round_up(length, 1024)), 512
        padded = round_up(length, block_kv)
        steps = heads * (padded // block_q) * (padded // block_kv)
        arguments: dict[str, Any] = {"heads": heads, "length": padded, "head_dim": head_dim}
        arguments["blocks"] = (block_q, block_kv, compute)
        blocks = {"block_q": block_q, "block_kv": block_kv, "chunk": compute}
        schedule = measure(lower, chip, name, steps, arguments)
    else:
        import jax.numpy as jnp

        from splash_attention.block_sizes import chip_named, choose_block_sizes

        dtype = jnp.dtype(operand_dtype(kernel))
        sizes = choose_block_sizes(chip_named(chip), head_dim, length, length, dtype)
        blocks = dataclasses.asdict(sizes)
        vmem = sizes.vmem_bytes(head_dim, dtype)
        schedule = measure_ours(chip, heads, length, head_dim, kernel, blocks)
    scores = heads * length * length
    return {
        "kernel": kernel,
        "chip": chip,
        "heads": heads,
        "q_len": length,
        "kv_len": length,
        "head_dim": head_dim,
        "cycles": schedule.cycles,
        "bundles_per_million_scores": round(schedule.cycles / (scores / 1e6), 1),
        "milliseconds": round(schedule.cycles / CHIPS[chip].clock_hz * 1e3, 3),
        "padded_len": padded,
        "block_sizes": blocks,
        "vmem_bytes": vmem,
        "program_bundles": schedule.program_bundles,
        "uncounted_bundles": schedule.uncounted_bundles,
        "compile_seconds": round(schedule.compile_seconds, 1),
        **{name: schedule.units[unit] for name, unit in UNITS.items()},
        "source": "compiler estimate",
    }


def report(line: dict[str, Any], json_follows: bool) -> None:
    """Print progress; with --json the table goes to stdout at the end."""
    shape = f"{line['heads']}x{line['q_len']}x{line['head_dim']}"
    rest = (
        f"at density {line['density']}"
        if "density" in line
        else f"{line['bundles_per_million_scores']:8.1f} per million scores"
    )
    print(
        f"{line['kernel']:21} {shape:16} {line['cycles'] / 1e6:8.2f}M cycles {rest}",
        file=sys.stderr if json_follows else sys.stdout,
        flush=True,
    )


def measure_here(kernels: list[str], shapes: Sequence[tuple[int, ...]], as_json: bool) -> int:
    """Print the timings on this machine's GPU."""
    rows = []
    whole = [kernel for kernel in kernels if kernel != attention_on_gpu.SPARSE]
    for shape in shapes:
        lines = attention_on_gpu.rows(whole, *shape) if whole else []
        if attention_on_gpu.SPARSE in kernels and shape == shapes[0]:
            of_densities = [sparse_lists(density, shape[1], "bf16") for density in DENSITIES]
            lines += attention_on_gpu.sparse_rows(of_densities, *shape)
        for line in lines:
            rows.append(line)
            other = f"{line['of_cudnn'] or 0:6.3f} of cuDNN"
            if "density" in line:
                other = f"{line['of_dense']:6.3f} of dense at density {line['density']}"
            print(
                f"{line['kernel']:16} {'x'.join(map(str, shape)):14} {line['milliseconds']:9.3f} ms"
                f" {line['teraflops']:6.1f} TFLOP/s {other}  error "
                + " ".join(f"{error:.2e}" for error in line["relative_l2_error"].values()),
                file=sys.stderr if as_json else sys.stdout,
                flush=True,
            )
    if as_json:
        print(json.dumps(rows, indent=1))
    return 0


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=(*sorted(CHIPS), "local"), default="v6e")
    parser.add_argument(
        "--kernel",
        choices=sorted({*KERNELS, *attention_on_gpu.KERNELS, attention_on_gpu.SPARSE}),
        action="append",
        help="default: all of the chip",
    )
    parser.add_argument(
        "--shape", action="append", metavar="HEADSxTOKENSxSIZE", help="default: a list of five"
    )
    parser.add_argument("--json", action="store_true", help="a list of rows instead of lines")
    args = parser.parse_args()
    local = args.chip == "local"
    listed, known = (
        (attention_on_gpu.SHAPES, (*attention_on_gpu.KERNELS, attention_on_gpu.SPARSE))
        if local
        else (SHAPES, KERNELS)
    )
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape] if args.shape else listed
    kernels = args.kernel or list(known)
    if not set(kernels) <= set(known):
        parser.error(f"--chip {args.chip} has the kernels {', '.join(known)}")
    if local:
        from splash_attention.hopper.attention import COMPUTE_CAPABILITY, runs_on_hopper

        if not runs_on_hopper():
            parser.error(f"--chip local needs a GPU of compute capability {COMPUTE_CAPABILITY}")
        return measure_here(kernels, shapes, args.json)
    if "tokamax" in kernels and importlib.util.find_spec("tokamax") is None:
        if args.kernel:
            parser.error("--kernel tokamax: tokamax is not installed; pip install '.[compare]'")
        print("tokamax is not installed and left out; pip install '.[compare]'", file=sys.stderr)
        kernels.remove("tokamax")
    rows = []
    for heads, length, head_dim in shapes:
        for kernel in kernels:
            if kernel not in SPARSE:
                rows.append(row(args.chip, kernel, heads, length, head_dim))
                report(rows[-1], args.json)
            elif args.shape or (heads, length, head_dim) == SHAPES[0]:
                for density in DENSITIES:
                    rows.append(sparse_row(args.chip, kernel, heads, length, head_dim, density))
                    report(rows[-1], args.json)
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
