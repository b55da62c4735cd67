"""The persistent compilation cache, and what compiling cost."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from runtime.errors import InputError
from runtime.text import printable
from runtime.trusted_folders import check_trusted, make_folder

# Where runs keep their executables, in the cache's folder.
KEPT = "executables"


def cache_folder() -> Path:
    """The folder of the compilation cache: `JAX_COMPILATION_CACHE_DIR`, or the user's cache folder.

    Raises:
        InputError: a variable that names it is empty or relative, or names no folder of this
            machine.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named:
        if "://" in named:
            raise InputError(f"JAX_COMPILATION_CACHE_DIR {printable(named)} is not a local folder")
        return Path(named).expanduser().absolute()
    variable = "XDG_CACHE_HOME" if "XDG_CACHE_HOME" in os.environ else "HOME"
    value = os.environ.get(variable, "")
    if not os.path.isabs(value):
        # A relative one would take executables from whatever folder the command is run in.
        state = f"is relative ({printable(value)})" if value else "is empty or not set"
        raise InputError(
            f"{variable} {state}, so there is no folder for the compilation cache; name one with "
            "JAX_COMPILATION_CACHE_DIR"
        )
    return Path(value, "" if variable == "XDG_CACHE_HOME" else ".cache", "cogvideox-tpu", "jax")


def enable_persistent_cache() -> Path:
    """Turns on JAX's persistent compilation cache for every program, however small.

    Raises:
        InputError: there is no folder for it, or others can change its files.
        OSError: the folder cannot be made or written.
    """
    folder = cache_folder()
    make_folder(folder)
    for used in (folder, folder / KEPT):
        if used.is_dir():
            check_trusted(used, "compilation cache")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The defaults skip programs under 1 s: dozens of small ones would compile on every start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


@contextlib.contextmanager
def without_persistent_cache() -> Iterator[None]:
    """Compiles anew whatever is compiled inside."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # which remembers whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


_CACHE_HIT = "/jax/compilation_cache/cache_hits"


class _Hits(threading.local):
    count = 0


_hits = _Hits()


def _count_hit(event: str, **_: object) -> None:
    _hits.count += event == _CACHE_HIT


jax.monitoring.register_event_listener(_count_hit)


def cache_hits_of_this_thread() -> int:
    """How many programs that this thread compiled came from the cache."""
    return _hits.count


@dataclasses.dataclass
class CompilationLog:
    """Counts of this process's compilations since the log was made."""

    compiled: int = 0
    cache_hits: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self._programs = 0
        jax.monitoring.register_event_listener(self._on_event)
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)

    def _on_event(self, event: str, **_: object) -> None:
        if event == _CACHE_HIT:
            self.cache_hits += 1
            self.compiled = self._programs - self.cache_hits

    def _on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        # JAX reports this for every program, read from the cache or compiled.
        if event == "/jax/core/compile/backend_compile_duration":
            self._programs += 1
            self.seconds += duration_secs
            self.compiled = self._programs - self.cache_hits

    def summary(self) -> dict[str, float]:
        return {
            "compilations": self.compiled,
            "cache_hits": self.cache_hits,
            "seconds": round(self.seconds, 3),
        }

    def sentence(self) -> str:
        """One line for people: what was compiled, what the cache gave, and the seconds."""
        return (
            f"{self.compiled} compilations, {self.cache_hits} cache hits, {self.seconds:.1f} s "
            f"compiling or reading the cache"
        )
