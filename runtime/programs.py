"""A program to compile, and the fields that decide its executable."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from runtime.jax_types import Device

PROJECT = Path(__file__).parents[1]
_PLUGINS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin"),
    "cpu": (),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
        name: identifies the program, such as "stage2_transformer".
        label: its sizes, for the name of its file.
        fields: everything that decides the executable, as JSON values; "compiler_options" are
            passed to the compiler.
        lower: traces and lowers it; may take seconds.
    """

    name: str
    label: str
    fields: Mapping[str, Any]
    lower: Callable[[], jax.stages.Lowered]

    @property
    def fingerprint(self) -> str:
        text = json.dumps([self.name, self.fields], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def manifest_name(self) -> str:
        return f"{self.name}-{self.label}-{self.fingerprint[:12]}.json"


def machine_fields(
    mesh: jax.sharding.Mesh, libraries: Sequence[str], sources: Sequence[str]
) -> dict[str, Any]:
    """The fields that every program has: devices, mesh, versions, flags and source.

    Args:
        libraries: distributions besides JAX that are traced into the program.
        sources: files and folders of this project that are traced into the program, relative to
            its root. Changes to other files leave the fields as they are.
    """
    device = mesh.devices.flat[0]
    versions = {}
    for name in ("jax", "jaxlib", *_PLUGINS[device.platform], *libraries):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # one of the two CUDA plugins
    fields = {
        "device": device.device_kind,
        "mesh": {axis: size for axis, size in mesh.shape.items()},
        "devices": [_place(device) for device in mesh.devices.flat],
        "versions": versions,
        "sources": list(sources),
        "source": source_hash(tuple(sources), PROJECT),
        "flags": {
            name: sorted(os.environ.get(name, "").split())
            for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
        },
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "x64": jax.config.jax_enable_x64,
    }
    if device.platform == "cpu":
        fields["processor"] = _processor_hash()
    if device.platform == "gpu":
        fields["platform"] = device.client.platform_version
    return fields


def source_files(sources: Sequence[str], root: Path = PROJECT) -> list[Path]:
    """The Python files that `sources` name, sorted.

    Raises:
        FileNotFoundError: a source does not exist.
    """
    found: set[Path] = set()
    for source in sources:
        path = root / source
        if not path.exists():
            raise FileNotFoundError(f"{path} is declared as source of a program but does not exist")
        found.update(path.glob("**/*.py") if path.is_dir() else [path])
    return sorted(found)


@functools.cache
def source_hash(sources: tuple[str, ...], root: Path) -> str:
    """A hash of the names and contents of the files that `sources` name."""
    digest = hashlib.sha256()
    for path in source_files(sources, root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _place(device: Device) -> list[Any]:
    return [device.id, device.process_index, *getattr(device, "coords", ())]


def _processor_hash() -> str:
    """Identifies the instructions of this CPU; its executables hold some that others may lack."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():  # macOS
        return hashlib.sha256(" ".join(os.uname()[2:]).encode()).hexdigest()[:16]
    lines = cpuinfo.read_text().splitlines()
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:16]
