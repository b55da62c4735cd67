"""Reads the TPU compiler's schedule of a Pallas kernel from its final VLIW bundles.

Needs no TPU: libtpu compiles for a named chip and dumps the code it would run. The count is static:
bundles of every loop body times its trips. One bundle is one cycle at best; memory waits come on
top. Regions under a condition count as executed, except loops whose trip count is not a constant.
"""

import dataclasses
import math
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from runtime.chips import CHIPS

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LH|LB|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{")
_START_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel \(!?(%p\w+)\) target = \$region(\d+)")
_EXIT_TEST = re.compile(r"(%p\w+) = scmp\.ge\.s32\.totalorder %s\w+, (\d+)\b")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Weighted counts of one kernel call.

    cycles: bundles executed. units: slots used of each unit, and `spills` of vector registers.
    program_bundles: length of the code. uncounted_bundles: code in loops of unknown trip count.
    """

    cycles: int
    units: dict[str, int]
    program_bundles: int
    uncounted_bundles: int
    compile_seconds: float


def measure(
    lower: Callable[..., Any],
    chip: str,
    kernel_name: str,
    grid_steps: int,
    arguments: dict[str, Any],
) -> Schedule:
    """Compile in a fresh process, because libtpu reads its flags once, and count the bundles.

    Args:
        lower: module-level function; called as lower(sharding, **arguments), it returns a
            `jax.stages.Lowered`.
        chip: v5e, v5p or v6e.
        kernel_name: the `name` of the Pallas call.
        grid_steps: iterations of the kernel's grid.

    Raises:
        Whatever the compiler raises.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        work = pool.submit(_measure_here, lower, chip, kernel_name, grid_steps, arguments)
        return work.result()


def _measure_here(
    lower: Callable[..., Any],
    chip: str,
    kernel_name: str,
    grid_steps: int,
    arguments: dict[str, Any],
) -> Schedule:
    import time

    folder = Path(tempfile.mkdtemp(prefix="kernel_schedule_"))
    try:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=true"
        )
        sharding, mesh = describe_chip(chip)
        import jax

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = lower(sharding, **arguments)
            start = time.perf_counter()
            lowered.compile()
            seconds = time.perf_counter() - start
        return _read(folder, kernel_name, grid_steps, seconds)
    finally:
        shutil.rmtree(folder)


def describe_chip(chip: str) -> tuple[Any, Any]:
    """Return a replicated sharding and the mesh of one chip; needs no TPU."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from runtime.topology import chip_device

    mesh = Mesh(np.array([chip_device(CHIPS[chip])]), ("chip",))
    return NamedSharding(mesh, PartitionSpec()), mesh


def _read(folder: Path, kernel_name: str, grid_steps: int, seconds: float) -> Schedule:
    def only(suffix: str) -> list[str]:
        pattern = re.compile(rf"-{re.escape(kernel_name)}(\.\d+)?-\d+-{suffix}$")
        found = [p for p in folder.iterdir() if pattern.search(p.name)]
        if len(found) != 1:
            raise RuntimeError(f"expected one {suffix} of {kernel_name}, found {found}")
        return found[0].read_text().splitlines()

    bundles = _bundles(only("final_bundles.txt"))
    rows = only("final_hlo-static-per-bundle-utilization.txt")
    names = [name.strip() for name in rows[1].split(",")]
    use = [[int(x) for x in row.split()] for row in rows[4:]]
    if len(use) != len(bundles):
        raise RuntimeError(f"{len(bundles)} bundles but {len(use)} rows of utilization")
    weights = _weights(bundles, grid_steps)
    units = {
        name: sum(w * row[i] for w, row in zip(weights, use, strict=True))
        for i, name in enumerate(names)
    }
    return Schedule(
        cycles=sum(weights),
        units=units,
        program_bundles=len(bundles),
        uncounted_bundles=sum(w == 0 for w in weights),
        compile_seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class _Bundle:
    mark: str | None
    depth: int | None
    text: str


def _bundles(lines: list[str]) -> list[_Bundle]:
    found: list[tuple[re.Match[str], list[str]]] = []
    for line in lines:
        match = _BUNDLE.match(line)
        if match:
            found.append((match, [line]))
        elif found:
            found[-1][1].append(line)
    return [
        # An empty bundle is printed without its depth.
        _Bundle(m[1], None if m.string.startswith("{}", m.end() - 1) else len(m[2]), "\n".join(t))
        for m, t in found
    ]


def _weights(bundles: list[_Bundle], grid_steps: int) -> list[int]:
    """Return how often each bundle runs."""
    exit_value: dict[str, int] = {}
    loop_of_region: dict[str, int] = {}
    trips: dict[int, int] = {}
    # The loop last begun at each depth, counted from 1. The scheduler moves single bundles of a
    # loop behind code that follows it, so depths do not nest like brackets.
    begun: list[int] = []
    depth = 0
    loops_around: list[tuple[int, ...]] = []
    for i, bundle in enumerate(bundles):
        depth = depth if bundle.depth is None else bundle.depth
        if bundle.mark == "LB":
            begun[depth - 1 :] = [i]
            loop_of_region |= dict.fromkeys(_START_REGION.findall(bundle.text), i)
        exit_value |= {name: int(value) for name, value in _EXIT_TEST.findall(bundle.text)}
        for predicate, region in _BRANCH.findall(bundle.text):
            if region in loop_of_region:
                trips[loop_of_region[region]] = exit_value.get(predicate, 0)
        loops_around.append(tuple(begun[:depth]))
    # The grid's loop runs a step or two more, to fill and drain the copies; they skip the kernel.
    trips |= {loops[0]: grid_steps for loops in loops_around if loops}
    return [math.prod(trips[loop] for loop in loops) for loops in loops_around]
