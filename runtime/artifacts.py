"""Executables as files that are checked before they are read.

An artifact is two files: `NAME-<fingerprint>.json`, the manifest, and the executable that the
manifest names, with its checksum. The manifest is renamed into place last, so a reader that finds
one finds the whole artifact, even while other processes write it. Weights are arguments of the
programs, so one artifact serves every checkpoint of its shape.

An executable is code, and reading it unpickles it: use only artifacts from people you trust. The
checksum detects damage, not malice.
"""

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from runtime.files import atomic_path, write_json
from runtime.hlo_costs import memory
from runtime.jax_types import Device
from runtime.programs import Program

FORMAT = "cogvideox-tpu executable, version 1"


class Refused(Exception):
    """An artifact that cannot be used; the message names it and says why."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A checked artifact: its manifest, and its files in the order to write them."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]


def read_artifact(manifest_name: str, read: Callable[[str], bytes]) -> Artifact:
    """Reads and checks an artifact; unpickles nothing.

    Args:
        read: returns the bytes of a file of the artifact's folder.

    Raises:
        Refused: it is damaged, incomplete, or not an artifact of this project.
    """
    try:
        text = read(manifest_name)
        manifest = parse_manifest(manifest_name, text)
        file = manifest["executable"]["file"]
        data = read(file)
    except OSError as error:
        raise Refused(f"{manifest_name}: {error}") from error
    if hashlib.sha256(data).hexdigest() != manifest["executable"]["sha256"]:
        raise Refused(f"{file}: it is damaged; its checksum differs from that in {manifest_name}")
    return Artifact(manifest, {file: data, manifest_name: text})


def parse_manifest(name: str, text: bytes) -> dict[str, Any]:
    """Parses and checks a manifest.

    Raises:
        Refused: it is damaged or not a manifest of this project.
    """
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise Refused(f"{name}: it is not valid JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Refused(f"{name}: it is not a manifest of the format {FORMAT!r}")
    executable = manifest.get("executable")
    kinds = {"program": str, "fingerprint": str, "fields": dict}
    if (
        not isinstance(executable, dict)
        or not all(isinstance(executable.get(key), str) for key in ("file", "sha256"))
        or not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items())
    ):
        raise Refused(f"{name}: parts of the manifest are missing")
    if Path(executable["file"]).name != executable["file"]:
        raise Refused(f"{name}: it names a file outside its folder")
    return manifest


def load(program: Program, folder: Path, devices: Sequence[Device]) -> jax.stages.Compiled:
    """Loads a program's executable onto `devices`.

    Raises:
        Refused: the artifact is damaged, belongs to another program, or does not load on these
            devices.
    """
    artifact = read_artifact(program.manifest_name, lambda name: (folder / name).read_bytes())
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
    except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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


def why_none_matches(program: Program, folder: Path) -> str:
    """The fields in which the nearest artifact of a folder differs, as a sentence."""
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
    there, here = flatten_fields(there), flatten_fields(here)
    return [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]


def flatten_fields(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as one level of dotted names."""
    # As JSON stores them: tuples become lists.
    fields = json.loads(json.dumps(fields))
    flat = {}
    for name, value in fields.items():
        inner = isinstance(value, dict)
        flat |= flatten_fields(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat
