"""Executables of earlier compiles: files in a folder, found by everything that decides them.

compile_ahead.py fills a folder that the stages are told of; without one, each run keeps what it
compiled for the next, in the compilation cache.

An artifact is two files: `NAME-<fingerprint>.json`, the manifest, and the executable that it names
by its checksum. The manifest is renamed into place last, so whoever finds one finds all of it, also
while other processes write the same artifact. Weights are arguments of the programs, so one
artifact serves every checkpoint of its shape.

An executable is code, and reading it unpickles it: use only artifacts from people you trust. The
checksum tells damage from health, not friend from foe.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from runtime import stopping
from runtime.compilation import cache_hits_of_this_thread, without_persistent_cache
from runtime.files import atomic_path, write_json
from runtime.fingerprint import fingerprint
from runtime.hlo_costs import memory

FORMAT = "cogvideox-tpu executable, version 1"
# The packages whose source makes the programs.
_SOURCES = ("cogvideox", "splash_attention", "runtime")
_PLUGINS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin"),
    "cpu": (),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
        name: which one it is, such as "stage2_transformer".
        label: its sizes, for the name of its file.
        fields: everything that decides the executable, as JSON values; "compiler_options" go to
            the compiler.
        lower: lowers it; may take seconds.
    """

    name: str
    label: str
    fields: Mapping[str, Any]
    lower: Callable[[], jax.stages.Lowered]

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.name, self.fields])

    @property
    def manifest_name(self) -> str:
        return f"{self.name}-{self.label}-{self.fingerprint[:12]}.json"


class Refused(Exception):
    """An artifact that cannot be used; the message names it and says why."""


# What decides an executable ---------------------------------------------------------------------


def machine_fields(mesh: jax.sharding.Mesh, libraries: Sequence[str]) -> dict[str, Any]:
    """The fields that every program has: devices, mesh, versions, flags and source.

    Args:
        libraries: distributions beside JAX that trace the program.
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
        "source": source_hash(),
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


def _place(device: jax.Device) -> list[Any]:
    return [device.id, device.process_index, *getattr(device, "coords", ())]


@functools.cache
def source_hash() -> str:
    """A hash of every Python file of the packages that make programs."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(path for name in _SOURCES for path in (root / name).glob("**/*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def _processor_hash() -> str:
    """What a CPU can do: its executables hold instructions that others may lack."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:16]


# Finding ----------------------------------------------------------------------------------------


def find_or_compile(
    programs: Sequence[Program],
    folder: Path | None,
    *,
    devices: Sequence[jax.Device],
    threads: int = 1,
) -> list[jax.stages.Compiled]:
    """The executables of `programs`, from a folder where they match, else compiled.

    Args:
        folder: of artifacts; says on stdout which were found, and for the others why none matched.
            None: those that earlier runs kept, and what is compiled is kept for later ones.
        devices: the mesh's, in its order.
        threads: programs to compile at once.
    """
    named = folder is not None
    folder = folder or kept_folder(devices)
    found = {p.name: _find(p, folder, devices, named=named) for p in programs} if folder else {}
    missing = [program for program in programs if found.get(program.name) is None]
    for program, built in zip(missing, compile_all(missing, threads), strict=True):
        found[program.name] = built.executable
        if folder and not named:
            _keep(program, built, folder)
    return [found[program.name] for program in programs]


def kept_folder(devices: Sequence[jax.Device]) -> Path | None:
    """Where runs keep executables for later ones, which then need not even trace.

    It lies in the compilation cache. None without a cache, for devices of another machine and for
    several processes.
    """
    cache = jax.config.jax_compilation_cache_dir
    if not cache or not jax.config.jax_enable_compilation_cache:
        return None
    return Path(cache) / "executables" if set(devices) <= set(jax.local_devices()) else None


@dataclasses.dataclass(frozen=True)
class Built:
    """What compiling gave.

    Attributes:
        seconds: that it took.
        cached: it came from JAX's cache.
    """

    executable: jax.stages.Compiled
    seconds: float
    cached: bool


def compile_all(programs: Sequence[Program], threads: int) -> list[Built]:
    """Each program compiled."""

    def compile_one(
        lowered: jax.stages.Lowered, options: Mapping[str, str | float] | None
    ) -> Built:
        stopping.check()
        start, hits = time.perf_counter(), cache_hits_of_this_thread()
        executable = lowered.compile(options)
        seconds = time.perf_counter() - start
        return Built(executable, seconds, cache_hits_of_this_thread() > hits)

    lowered = []
    for program in programs:
        stopping.check()
        lowered.append(program.lower())
    options = [program.fields.get("compiler_options") for program in programs]
    # The compiler holds no lock of Python's.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(compile_one, lowered, options))


def _find(
    program: Program, folder: Path, devices: Sequence[jax.Device], *, named: bool
) -> jax.stages.Compiled | None:
    """The executable in a folder, which the user `named` and wants to hear about, or None."""
    try:
        if not (folder / program.manifest_name).exists():
            if named:
                print(f"{program.name}: {_why_none_matches(program, folder)}; compiling")
            return None
        executable = _load(program, folder, devices)
    except Refused as refused:
        print(f"{program.name}: refused {refused}; compiling")
        return None
    if named:
        print(f"{program.name}: executable {Path(program.manifest_name).stem}")
    return executable


def _keep(program: Program, built: Built, folder: Path) -> None:
    if built.cached and not _writes_what_was_cached():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(program, built, folder)
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        print(f"{program.name}: the next run will compile again, the executable is lost: {error}")


def _load(program: Program, folder: Path, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """A program's executable, loaded onto `devices`.

    Raises:
        Refused: the artifact is damaged, foreign, or not for these devices' runtime.
    """
    artifact = read_artifact(program.manifest_name, lambda name: (folder / name).read_bytes())
    file = artifact.manifest["executable"]["file"]
    if artifact.manifest["fingerprint"] != program.fingerprint:
        raise Refused(f"{program.manifest_name}: its name is not that of its fingerprint")
    try:
        payload, in_tree, out_tree = pickle.loads(artifact.files[file])
        return serialize_executable.deserialize_and_load(
            payload,
            in_tree,
            out_tree,
            backend=devices[0].client,
            execution_devices=devices,
        )
    except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refused(f"{file}: the runtime does not load it: {reason}") from error


def _why_none_matches(program: Program, folder: Path) -> str:
    """The fields in which the nearest artifact differs, for people."""
    nearest: list[str] | None = None
    for path in sorted(folder.glob("*.json")):
        try:
            manifest = parse_manifest(path.name, path.read_bytes())
        except Refused as refused:
            print(f"{program.name}: refused {refused}")
            continue
        if manifest["program"] == program.name:
            found = differences(manifest["fields"], program.fields)
            nearest = found if nearest is None or len(found) < len(nearest) else nearest
    if nearest is None:
        return f"no executable in {folder} is for this program"
    return f"no executable matches: {', '.join(nearest[:4])}" + (", ..." if nearest[4:] else "")


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """ "mesh.dp 1 there, 2 here" for every field that differs."""
    there, here = _flat(there), _flat(here)
    return [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    # As JSON has them: tuples are lists there.
    fields = json.loads(json.dumps(fields))
    flat = {}
    for name, value in fields.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


# Artifacts --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A checked artifact: its manifest, and its files in the order to write them."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]


def read_artifact(manifest_name: str, read: Callable[[str], bytes]) -> Artifact:
    """Reads and checks an artifact; unpickles nothing.

    Args:
        read: gives the bytes of a file of the artifact's folder.

    Raises:
        Refused: it is damaged, incomplete, or no artifact of this project.
    """
    try:
        text = read(manifest_name)
        manifest = parse_manifest(manifest_name, text)
        file = manifest["executable"]["file"]
        data = read(file)
    except OSError as error:
        raise Refused(f"{manifest_name}: {error}") from error
    if hashlib.sha256(data).hexdigest() != manifest["executable"]["sha256"]:
        raise Refused(f"{file}: it is damaged, its checksum is not the one in {manifest_name}")
    return Artifact(manifest, {file: data, manifest_name: text})


def parse_manifest(name: str, text: bytes) -> dict[str, Any]:
    """A manifest's contents.

    Raises:
        Refused: it is damaged or no manifest of this project.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise Refused(f"{name}: it is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Refused(f"{name}: it is no manifest of the format {FORMAT!r}")
    executable = manifest.get("executable")
    kinds = {"program": str, "fingerprint": str, "fields": dict, "executable": dict}
    whole = all(isinstance(manifest.get(key), kind) for key, kind in kinds.items())
    if not whole or not all(isinstance(executable.get(key), str) for key in ("file", "sha256")):
        raise Refused(f"{name}: it lacks parts of a manifest")
    if Path(executable["file"]).name != executable["file"]:
        raise Refused(f"{name}: it names a file outside its folder")
    return manifest


def compile_into(programs: Sequence[Program], folder: Path, *, threads: int = 1) -> list[str]:
    """Compiles into `folder` what it does not hold whole.

    Returns:
        The names of the manifests made now.

    Raises:
        OSError: the folder cannot be written.
    """
    missing = []
    for program in programs:
        path = folder / program.manifest_name
        try:
            if path.exists():
                read_artifact(path.name, lambda name: (folder / name).read_bytes())
                continue
        except Refused as refused:
            print(f"{program.name}: made anew: {refused}")
        missing.append(program)
    with nullcontext() if _writes_what_was_cached() else without_persistent_cache():
        compiled = compile_all(missing, threads)
    for program, built in zip(missing, compiled, strict=True):
        _write(program, built, folder)
    return [program.manifest_name for program in missing]


def _writes_what_was_cached() -> bool:
    """Whether an executable that came from JAX's cache can be written.

    XLA's for CPUs load once more then, but lack functions when they run; TPUs' were not tried.
    """
    return jax.default_backend() == "gpu"


def _write(program: Program, built: Built, folder: Path) -> None:
    data = pickle.dumps(serialize_executable.serialize(built.executable))
    checksum = hashlib.sha256(data).hexdigest()
    path = folder / program.manifest_name
    file = path.with_name(f"{path.stem}-{checksum[:12]}.executable")
    with atomic_path(file) as temporary:
        temporary.write_bytes(data)
    manifest = {
        "format": FORMAT,
        "program": program.name,
        "label": program.label,
        "fingerprint": program.fingerprint,
        "executable": {"file": file.name, "bytes": len(data), "sha256": checksum},
        "compile_seconds": round(built.seconds, 2),
        "hbm_bytes_per_device": memory(built.executable),
        "fields": program.fields,
        "arguments": describe_arguments(built.executable),
    }
    write_json(path, manifest)


def describe_arguments(compiled: jax.stages.Compiled) -> dict[str, str]:
    """Shape, dtype and placement of every argument, by its path."""
    infos = jax.tree_util.tree_leaves_with_path(compiled.args_info)
    shardings = jax.tree.leaves(compiled.input_shardings)
    return {
        jax.tree_util.keystr(path): f"{info.dtype}{list(info.shape)} {sharding.spec}"
        for (path, info), sharding in zip(infos, shardings, strict=True)
    }
