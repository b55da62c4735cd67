"""Write the table of tuned tiles of the attention kernel, or check that its entries compile.

    python benchmarks/tune_block_sizes.py                  # from the compiler's schedules, no TPU
    python benchmarks/tune_block_sizes.py --on-device      # from timings on the TPU of this machine
    python benchmarks/tune_block_sizes.py --check          # compile every entry, every path

One JSON line is printed for each candidate or check. A candidate that does not fit or does not
compile loses, with its reason on its line.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from attention_kernel import lower_ours, measure_ours, operand_dtype
from kernel_schedule import describe_chip

from runtime.chips import CHIPS
from splash_attention.block_sizes import chip_named, fit_block_sizes

TABLE = Path(__file__).parents[1] / "splash_attention" / "tuned_tables.py"
HEAD_DIMS = (64, 128, 256)
LENGTHS = (1024, 4608, 17920)
# block_q, chunk, unroll at most. The exponentials' registers grow with block_q x chunk, and what a
# body has to fill and drain weighs less the longer it is.
CANDIDATES = (
    (512, 256, 64),
    (512, 512, 32),
    (512, 128, 64),
    (1024, 256, 32),
    (1024, 128, 64),
    (256, 256, 64),
)
# Every body, keys of both layouts, and the dtype that needs most VMEM.
CHECKED = ("bounded", "online_beside", "int8_qk_beside", "float32")


def schedule_cycles(chip: str, head_dim: int, length: int, blocks: dict[str, int]) -> int:
    """Read cycles of the bounded path from the schedule, four heads: the grid is a loop."""
    return measure_ours(chip, 4, length, head_dim, "bounded", blocks).cycles


def device_microseconds(chip: str, head_dim: int, length: int, blocks: dict[str, int]) -> float:
    """Measure the median time of the bounded path on the TPU of this machine, twelve heads."""
    import jax
    import jax.numpy as jnp

    heads, repeats = 12, 7
    q = jax.random.normal(jax.random.key(0), (heads, head_dim, length), jnp.bfloat16) / head_dim
    k = q.swapaxes(1, 2)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    call = lower_ours(sharding, chip, heads, length, head_dim, "bounded", blocks).compile()
    jax.block_until_ready(call(q=q, k=k, v=q))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(q=q, k=k, v=q))
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2] * 1e6


def tune(chip: str, head_dim: int, length: int, on_device: bool) -> tuple[int, int, int]:
    """Find the fastest candidate for a shape."""
    cost, unit = (device_microseconds, "us") if on_device else (schedule_cycles, "cycles")
    best: tuple[float, tuple[int, int, int]] | None = None
    tried = set()
    for candidate in CANDIDATES:
        line: dict[str, Any] = {"chip": chip, "head_dim": head_dim, "length": length}
        line |= {"candidate": candidate}
        try:
            sizes = fit_block_sizes(
                chip_named(chip), candidate, head_dim, length, length, jnp.dtype("bfloat16")
            )
            if sizes in tried:
                continue
            tried.add(sizes)
            line[unit] = cost(chip, head_dim, length, dataclasses.asdict(sizes))
        except Exception as error:
            # The compiler raises many kinds of errors; the search goes on after each.
            line["refused"] = f"{type(error).__name__}: {error}"[:300]
        else:
            if best is None or line[unit] < best[0]:
                best = line[unit], candidate
        print(json.dumps(line), flush=True)
    if best is None:
        raise RuntimeError(f"no candidate runs on {chip} at head size {head_dim}, {length} tokens")
    return best[1]


def write_table(tables: dict[str, dict[int, list[tuple[int, ...]]]]) -> None:
    """Replace the tables of the tuned chips in the module of data."""
    from splash_attention.tuned_tables import TABLES

    text = TABLE.read_text()
    lines = [text[: text.index("TABLES = {")] + "TABLES = {"]
    for chip, by_head_dim in sorted((TABLES | tables).items()):
        lines.append(f'    "{chip}": {{')
        for head_dim, rows in sorted((TABLES[chip] | by_head_dim).items()):
            # Equal neighbours become one row.
            kept = [a for a, b in zip(rows, rows[1:], strict=False) if a[1:] != b[1:]]
            if not kept:
                lines.append(f"        {head_dim}: ({tuple(rows[-1])},),")
                continue
            lines.append(f"        {head_dim}: (")
            lines += [f"            {tuple(row)}," for row in [*kept, rows[-1]]]
            lines.append("        ),")
        lines.append("    },")
    TABLE.write_text("\n".join(lines) + "\n}\n")


def compile_entry(chip: str, head_dim: int, kv_len: int, kernel: str) -> float:
    """Compile one entry of the table for its chip, in this process; return the seconds."""
    sharding, mesh = describe_chip(chip)
    import jax

    from splash_attention.block_sizes import choose_block_sizes

    sizes = choose_block_sizes(
        chip_named(chip), head_dim, kv_len, kv_len, jnp.dtype(operand_dtype(kernel))
    )
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lower_ours(sharding, chip, 2, kv_len, head_dim, kernel, dataclasses.asdict(sizes)).compile()
    return time.perf_counter() - start


def check(chips: list[str], head_dims: Sequence[int]) -> bool:
    """Compile every entry of the table by every path; return whether all compiled."""
    from splash_attention.tuned_tables import TABLES

    good = True
    spawn = multiprocessing.get_context("spawn")
    for chip in chips:
        # libtpu reads its chip once per process.
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            for head_dim in head_dims:
                for length, *_ in TABLES[chip][head_dim]:
                    for kernel in CHECKED:
                        line = {"chip": chip, "head_dim": head_dim, "length": length}
                        line |= {"kernel": kernel}
                        work = pool.submit(compile_entry, chip, head_dim, length, kernel)
                        try:
                            line["compile_seconds"] = round(work.result(), 1)
                        except Exception as error:
                            good = False
                            line["error"] = f"{type(error).__name__}: {error}"[:600]
                        print(json.dumps(line), flush=True)
    return good


def main() -> int:
    """Tune or check; 1 when an entry does not compile."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", choices=sorted(CHIPS), action="append", help="default: all")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, action="append")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--on-device", action="store_true", help="time on the TPU of this machine")
    mode.add_argument("--check", action="store_true", help="compile every entry of the table")
    args = parser.parse_args()
    chips, head_dims = args.chip or sorted(CHIPS), args.head_dim or list(HEAD_DIMS)
    if args.check:
        return 0 if check(chips, head_dims) else 1
    if args.on_device:
        from splash_attention.block_sizes import current_chip

        chips = [current_chip(interpret=False).name]
    for chip in chips:
        for head_dim in head_dims:
            rows = [(n, *tune(chip, head_dim, n, args.on_device)) for n in LENGTHS]
            write_table({chip: {head_dim: rows}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
