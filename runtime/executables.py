"""Finds the executables of programs in a folder, and compiles those that are missing.

compile_ahead.py fills a folder that the stages are given. Without one, each run keeps what it
compiled for the next, in the compilation cache. `runtime.artifacts` describes the files.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import jax

from runtime import artifacts, stopping
from runtime.artifacts import Refused
from runtime.compilation import KEPT, cache_hits_of_this_thread, without_persistent_cache
from runtime.compiler_options import CompilerOptions
from runtime.files import open_regular
from runtime.jax_types import Device
from runtime.programs import Program
from runtime.text import printable
from runtime.trusted_folders import check_trusted, make_folder

# Tracing imports diffusers, whose lazy modules fail when two threads import them at once.
_ONE_TRACES = threading.Lock()


def find_or_compile(
    programs: Sequence[Program],
    folder: Path | None,
    *,
    devices: Sequence[Device],
    threads: int = 1,
) -> list[jax.stages.Compiled]:
    """The executables of `programs`, read from a folder where they match, else compiled.

    Args:
        folder: of artifacts; prints which were found, and for the others why none matched.
            None: uses those that earlier runs kept, and keeps what it compiles for later ones.
        devices: the mesh's, in its order.
        threads: programs to compile at once.

    Raises:
        InputError: others can change the files of the folder.
    """
    named = folder is not None
    folder = folder or kept_folder(devices)
    if folder and folder.is_dir():
        check_trusted(folder, "--executables" if named else "compilation cache")
    found: dict[str, jax.stages.Compiled] = {}
    for program in programs:
        executable = _find(program, folder, devices, named=named) if folder else None
        if executable is not None:
            found[program.name] = executable
    missing = [program for program in programs if program.name not in found]
    for program, built in zip(missing, compile_all(missing, threads), strict=True):
        found[program.name] = built.executable
        if folder and not named:
            _keep(program, built, folder)
    return [found[program.name] for program in programs]


def foresee(programs: Sequence[Program], folder: Path | None, devices: Sequence[Device]) -> str:
    """What `find_or_compile` is about to do: "loading", or "compiling ..." and how long.

    The seconds are those that programs of the same names took for other shapes.
    """
    folder = folder or kept_folder(devices)
    if folder is None or not folder.is_dir():
        return "compiling"
    missing = [p for p in programs if not (folder / p.manifest_name).exists()]
    if not missing:
        return "loading"
    seconds = artifacts.compile_seconds(folder)
    known = [seconds[program.name] for program in missing if program.name in seconds]
    about = f"; about {sum(known):.0f} s" if known and sum(known) >= 1 else ""
    return f"compiling, first run of this shape{about}:"


def kept_folder(devices: Sequence[Device]) -> Path | None:
    """The folder where runs keep executables for later ones, which then need not even trace.

    It lies in the compilation cache. None without a cache, for devices of another machine and for
    several processes.
    """
    cache = jax.config.jax_compilation_cache_dir
    if not cache or not jax.config.jax_enable_compilation_cache:
        return None
    return Path(cache) / KEPT if set(devices) <= set(jax.local_devices()) else None


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program.

    Attributes:
        seconds: time it took to compile.
        cached: whether it came from JAX's cache.
    """

    executable: jax.stages.Compiled
    seconds: float
    cached: bool


def compile_all(programs: Sequence[Program], threads: int) -> list[Built]:
    """Lowers the programs in order, and compiles them on `threads` threads meanwhile.

    Raises:
        Stopping: the process was asked to end.
    """

    def compile_one(lowered: jax.stages.Lowered, options: CompilerOptions | None) -> Built:
        stopping.check()
        start, hits = time.perf_counter(), cache_hits_of_this_thread()
        executable = lowered.compile(options)
        seconds = time.perf_counter() - start
        return Built(executable, seconds, cache_hits_of_this_thread() > hits)

    # The compiler releases Python's global lock, so it works while the next program is lowered.
    with ThreadPoolExecutor(threads) as pool:
        compiling = []
        for program in programs:
            stopping.check()
            with _ONE_TRACES:
                lowered = program.lower()
            options = program.fields.get("compiler_options")
            compiling.append(pool.submit(compile_one, lowered, options))
        return [one.result() for one in compiling]


def compile_into(programs: Sequence[Program], folder: Path, *, threads: int = 1) -> list[str]:
    """Compiles the programs that `folder` does not hold whole, and writes them there.

    Returns:
        The names of the new manifests.

    Raises:
        OSError: the folder cannot be written.
    """
    missing = []
    for program in programs:
        path = folder / program.manifest_name
        try:
            if path.exists():
                artifacts.read_artifact(path.name, lambda name: open_regular(folder / name))
                continue
        except Refused as refused:
            print(f"{program.name}: compiling again, because {refused}")
        missing.append(program)
    with nullcontext() if _can_write_cached() else without_persistent_cache():
        compiled = compile_all(missing, threads)
    for program, built in zip(missing, compiled, strict=True):
        artifacts.write(program, built.executable, built.seconds, folder)
    return [program.manifest_name for program in missing]


def _find(
    program: Program, folder: Path, devices: Sequence[Device], *, named: bool
) -> jax.stages.Compiled | None:
    """The executable in a folder, or None; reports what it found if the user `named` the folder."""
    try:
        if not (folder / program.manifest_name).exists():
            why = (
                artifacts.why_none_matches(program, folder) if named else "first run of this shape"
            )
            print(f"{program.name}: {why}; compiling")
            return None
        executable = artifacts.load(program, folder, devices)
    except Refused as refused:
        print(f"{program.name}: refused {refused}; compiling")
        return None
    if named:
        print(f"{program.name}: executable {Path(program.manifest_name).stem}")
    return executable


def _keep(program: Program, built: Built, folder: Path) -> None:
    if built.cached and not _can_write_cached():
        return
    try:
        make_folder(folder)
        artifacts.write(program, built.executable, built.seconds, folder)
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        reason = printable(str(error))
        print(f"{program.name}: cannot keep the executable, so the next run compiles it: {reason}")


def _can_write_cached() -> bool:
    """Whether an executable that came from JAX's cache can be written.

    XLA's for CPUs load once more then, but lack functions when they run; TPUs' were not tried.
    """
    return jax.default_backend() == "gpu"
