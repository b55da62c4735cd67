"""Executables as files that are checked before they are read.

An artifact is two files: `NAME-<fingerprint>.json`, the manifest, and the executable that the
manifest names, with its checksum. The manifest is renamed into place last, so a reader that finds
one finds the whole artifact, even while other processes write it. Weights are arguments of the
programs, so one artifact serves every checkpoint of its shape.

An executable is code: loading it unpickles it and runs it. `runtime.trusted_folders` decides which
folders are read. The checksum detects damage, not malice.
"""

import dataclasses
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
from jax.experimental import serialize_executable

from runtime.errors import InputError
from runtime.files import atomic_path, open_regular, write_json
from runtime.hlo_costs import memory
from runtime.jax_types import Device
from runtime.json_files import parse_json_object
from runtime.programs import Program
from runtime.text import printable

FORMAT = "cogvideox-tpu executable, version 1"
MAX_MANIFEST_BYTES = 1 << 20
# Room for a temporary name beside it.
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_+.-]{0,159}\.(json|executable)")

# What damaged pickles raise, by Python's documentation, and JAX's reader.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)


class Refused(Exception):
    """An artifact that cannot be used; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A checked artifact: its manifest, and its files in the order to write them."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]


def read_artifact(manifest_name: str, open_file: Callable[[str], BinaryIO]) -> Artifact:
    """Reads and checks an artifact; unpickles nothing.

    Args:
        open_file: opens a file of the artifact's folder.

    Raises:
        Refused: it is damaged, incomplete, or not an artifact of this project.
    """
    shown = printable(manifest_name)
    try:
        text = read_manifest_bytes(manifest_name, open_file)
        manifest = parse_manifest(manifest_name, text)
        file, size = manifest["executable"]["file"], manifest["executable"]["bytes"]
        with open_file(file) as stream:
            data = stream.read(size + 1)
    except (OSError, InputError) as error:
        raise Refused(f"{shown}: {printable(str(error))}") from error
    if hashlib.sha256(data).hexdigest() != manifest["executable"]["sha256"]:
        raise Refused(f"{file}: it is damaged; its checksum differs from that in {shown}")
    return Artifact(manifest, {file: data, manifest_name: text})


def read_manifest_bytes(name: str, open_file: Callable[[str], BinaryIO]) -> bytes:
    """Reads a manifest, without parsing it.

    Raises:
        Refused: its name is none of an artifact.
        OSError, InputError: it cannot be read.
    """
    if not is_artifact_name(name, "json"):
        raise Refused(f"{printable(name)}: no manifest of this project has such a name")
    with open_file(name) as stream:
        return stream.read(MAX_MANIFEST_BYTES + 1)


def is_artifact_name(name: str, suffix: str) -> bool:
    """Whether a file of an artifact can have this name. It then is safe in a path and to print.

    Args:
        suffix: "json" for manifests, or "executable".
    """
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == suffix


def parse_manifest(name: str, text: bytes) -> dict[str, Any]:
    """Parses and checks a manifest.

    Raises:
        Refused: it is damaged or not a manifest of this project.
    """
    shown = printable(name)
    try:
        manifest: dict[str, Any] = parse_json_object(text, name, max_bytes=MAX_MANIFEST_BYTES)
    except InputError as error:
        raise Refused(str(error)) from error
    if manifest.get("format") != FORMAT:
        raise Refused(f"{shown}: it is not a manifest of the format {FORMAT!r}")
    kinds = {
        "program": str,
        "fingerprint": str,
        "fields": dict,
        "compile_seconds": int | float,
        "hbm_bytes_per_device": dict,
        "executable": dict,
    }
    whole = all(isinstance(manifest.get(key), kind) for key, kind in kinds.items())
    if not whole or not (
        all(isinstance(manifest["executable"].get(key), str) for key in ("file", "sha256"))
        and type(manifest["executable"].get("bytes")) is int
        and 0 <= manifest["executable"]["bytes"] < 1 << 40
        and type(manifest["hbm_bytes_per_device"].get("total")) is int
    ):
        raise Refused(f"{shown}: parts of the manifest are missing or of the wrong type")
    if not is_artifact_name(manifest["executable"]["file"], "executable"):
        raise Refused(f"{shown}: it names a file that is no *.executable of its folder")
    return manifest


def load(program: Program, folder: Path, devices: Sequence[Device]) -> jax.stages.Compiled:
    """Loads a program's executable onto `devices`.

    Raises:
        Refused: the artifact is damaged, belongs to another program, or does not load on these
            devices.
    """
    artifact = read_artifact(program.manifest_name, lambda name: open_regular(folder / name))
    file = artifact.manifest["executable"]["file"]
    if artifact.manifest["fingerprint"] != program.fingerprint:
        raise Refused(f"{program.manifest_name}: its name does not match its fingerprint")
    try:
        payload, in_tree, out_tree = pickle.loads(artifact.files[file])
        return serialize_executable.deserialize_and_load(
            payload,
            in_tree,
            out_tree,
            backend=devices[0].client,
            execution_devices=devices,
        )
    except (jax.errors.JaxRuntimeError, *_UNPICKLING_ERRORS) as error:
        reason = printable(str(error).splitlines()[0]) if str(error) else type(error).__name__
        raise Refused(f"{file}: the runtime does not load it: {reason}") from error


def write(
    program: Program, executable: jax.stages.Compiled, compile_seconds: float, folder: Path
) -> None:
    """Writes an artifact: the executable, then the manifest that names it."""
    data = pickle.dumps(serialize_executable.serialize(executable))
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
        "compile_seconds": round(compile_seconds, 2),
        "hbm_bytes_per_device": memory(executable),
        "fields": program.fields,
        "arguments": describe_arguments(executable),
    }
    write_json(path, manifest)


def describe_arguments(compiled: jax.stages.Compiled) -> dict[str, str]:
    """Shape, dtype and sharding of every argument, by its path in the argument tree."""
    infos = jax.tree_util.tree_leaves_with_path(compiled.args_info)
    shardings = jax.tree.leaves(compiled.input_shardings)
    return {
        jax.tree_util.keystr(path): f"{info.dtype}{list(info.shape)} {sharding.spec}"
        for (path, info), sharding in zip(infos, shardings, strict=True)
    }


def compile_seconds(folder: Path) -> dict[str, float]:
    """The longest time that each program of a folder took to compile, by the program's name."""
    longest: dict[str, float] = {}
    for path in folder.glob("*.json"):
        try:
            text = read_manifest_bytes(path.name, lambda name: open_regular(folder / name))
            manifest = parse_manifest(path.name, text)
        except (OSError, InputError, Refused):
            continue  # damaged ones are named when they are loaded
        name, seconds = manifest["program"], float(manifest["compile_seconds"])
        longest[name] = max(longest.get(name, 0.0), seconds)
    return longest


def why_none_matches(program: Program, folder: Path) -> str:
    """The fields in which the nearest artifact of a folder differs, as a sentence."""
    nearest: list[str] | None = None
    for path in sorted(folder.glob("*.json")):
        try:
            text = read_manifest_bytes(path.name, lambda name: open_regular(folder / name))
            manifest = parse_manifest(path.name, text)
        except (Refused, InputError) as refused:
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
    there, here = flatten_fields(there), flatten_fields(here)
    return [
        f"{_shown(name)} {_shown(there.get(name))} there, {_shown(here.get(name))} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def _shown(value: object) -> str:
    """A value of a manifest for a message: one line, without a terminal's control characters."""
    text = printable(str(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def flatten_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as one level of dotted names."""
    # As JSON stores them: tuples become lists.
    fields = json.loads(json.dumps(fields))
    flat = {}
    for name, value in fields.items():
        inner = isinstance(value, dict)
        flat |= flatten_fields(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat
