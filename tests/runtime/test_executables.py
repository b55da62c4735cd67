"""Executables in a folder are used if everything matches, else refused or skipped by name."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from runtime import artifacts, executables, programs, sharing, stopping
from runtime.compilation import CompilationLog
from runtime.errors import InputError, RunError
from runtime.executables import compile_into, find_or_compile
from runtime.mesh import make_mesh
from runtime.programs import Program, machine_fields

ROOT = Path(__file__).parents[2]


def make_program(size: int = 8, mesh: tuple[int, int, int] = (2, 1, 1)) -> Program:
    """Makes a small sharded program, with a tree of arguments and a donated one."""
    mesh = make_mesh(mesh)
    rows = NamedSharding(mesh, PartitionSpec("dp"))
    x = jax.ShapeDtypeStruct((size, 4), jnp.float32, sharding=rows)

    def function(donated: jax.Array, tree: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return donated + tree["x"].sum(0), jnp.tanh(tree["x"])

    fields = {"size": size, **machine_fields(mesh, ("numpy",), ("runtime",))}
    lower = jax.jit(function, donate_argnums=0).lower
    return Program("sums", f"{size}", fields, lambda: lower(x, {"x": x}))


def find(program: Program, folder: Path | None) -> jax.stages.Compiled:
    return find_or_compile([program], folder, devices=jax.devices()[: mesh_size(program)])[0]


def mesh_size(program: Program) -> int:
    return len(program.fields["devices"])


def call(compiled: jax.stages.Compiled) -> list[np.ndarray]:
    (donated, tree), _ = compiled.input_shardings
    x = np.random.default_rng(0).standard_normal((8, 4), np.float32)
    placed = jax.device_put(x, donated), {"x": jax.device_put(x, tree["x"])}
    return [np.asarray(result) for result in compiled(*placed)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    compile_into([make_program()], tmp_path)
    return tmp_path


def manifest_of(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def executable_of(folder: Path) -> Path:
    (path,) = folder.glob("*.executable")
    return path


def rewrite(folder: Path, **changed: object) -> dict:
    """Changes fields of the manifest, and updates its name and fingerprint."""
    path = manifest_of(folder)
    manifest = json.loads(path.read_text())
    manifest["fields"] |= changed
    other = dataclasses.replace(make_program(), fields=manifest["fields"])
    manifest["fingerprint"] = other.fingerprint
    path.unlink()
    (folder / other.manifest_name).write_text(json.dumps(manifest))
    return manifest


def test_the_executable_of_another_program_object_is_found_and_equal(folder, capsys):
    expected = call(find(make_program(), None))
    program, log = make_program(), CompilationLog()
    results = call(find(program, folder))
    assert log.summary() == {"compilations": 0, "cache_hits": 0, "seconds": 0.0}
    for result, same in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, same)
    assert f"sums: executable sums-8-{program.fingerprint[:12]}" in capsys.readouterr().out


@pytest.fixture
def cache(tmp_path):
    """Sets a private compilation cache."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "cache"), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_program_in_the_compilation_cache_is_compiled_anew(cache, tmp_path):
    """XLA's CPU executables from JAX's persistent cache load but do not run if saved again."""
    make_program().lower().compile()
    assert list(cache.iterdir())
    log = CompilationLog()
    compile_into([make_program()], tmp_path / "executables")
    assert log.summary()["compilations"] == 1
    find(make_program(), None)
    assert log.cache_hits == 1  # the cache is in use again
    assert not (cache / "executables").exists()  # and what it gave was not kept
    call(find(make_program(), tmp_path / "executables"))


def test_what_a_run_compiles_is_kept_for_the_next(cache, capsys):
    expected = call(find(make_program(), None))
    log = CompilationLog()
    results = call(find(make_program(), None))
    assert log.summary() == {"compilations": 0, "cache_hits": 0, "seconds": 0.0}
    for result, same in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, same)
    find(make_program(16), None)
    assert len(list((cache / "executables").glob("*.json"))) == 2
    # Once for each shape: the second run of the first one said nothing.
    assert capsys.readouterr().out == "sums: first run of this shape; compiling\n" * 2


def test_a_kept_executable_that_is_damaged_is_refused_and_kept_anew(cache, capsys):
    expected = call(find(make_program(), None))
    executable_of(cache / "executables").write_bytes(b"")
    (entry,) = cache.glob("*-cache")
    entry.unlink()
    for refusals in (1, 0):
        results = call(find(make_program(), None))
        assert capsys.readouterr().out.count("refused") == refusals
        for result, same in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, same)


def test_an_executable_that_cannot_be_kept_is_said(cache, capsys):
    cache.mkdir()
    (cache / "executables").write_text("in the way")
    call(find(make_program(), None))
    assert (
        "sums: cannot keep the executable, so the next run compiles it" in capsys.readouterr().out
    )


def test_a_process_that_is_ending_neither_traces_nor_compiles(cache, monkeypatch):
    monkeypatch.setattr(stopping, "asked", threading.Event())
    program, log = make_program(), CompilationLog()
    lowered = []

    def lower_and_be_asked():
        lowered.append(program.lower())
        stopping.asked.set()
        return lowered[-1]

    asked_while_lowering = dataclasses.replace(program, lower=lower_and_be_asked)
    for _ in range(2):
        with pytest.raises(stopping.Stopping):
            find(asked_while_lowering, None)
    assert len(lowered) == 1 and log.compiled == 0


def test_a_manifest_is_complete(folder):
    manifest = json.loads(manifest_of(folder).read_text())
    data = executable_of(folder).read_bytes()
    assert manifest["fingerprint"] == make_program().fingerprint
    assert manifest["executable"] == {
        "file": executable_of(folder).name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    assert manifest["compile_seconds"] > 0
    assert manifest["hbm_bytes_per_device"]["arguments"] == 2 * 8 * 4 * 4 / 2
    assert list(manifest["arguments"]) == ["[0][0]", "[0][1]['x']"]
    assert set(manifest["arguments"].values()) == {"float32[8, 4] P('dp',)"}
    fields = manifest["fields"]
    assert fields["mesh"] == {"dp": 2, "sp": 1, "tp": 1}
    assert {"jax", "jaxlib", "numpy"} <= fields["versions"].keys()
    assert {"device", "devices", "source", "flags", "matmul_precision"} <= fields.keys()


def test_building_twice_gives_the_same_fingerprint_and_is_not_done_twice(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert compile_into([make_program()], folder) == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_changing_any_field_changes_the_fingerprint():
    program = make_program()
    flat = artifacts.flatten_fields(program.fields)
    seen = {program.fingerprint}
    for name in flat:
        fields = copy.deepcopy(dict(program.fields))
        *outer, last = name.split(".")
        inner = fields
        for key in outer:
            inner = inner[key]
        inner[last] = "another"
        seen.add(Program(program.name, program.label, fields, program.lower).fingerprint)
    seen.add(Program("other", program.label, program.fields, program.lower).fingerprint)
    assert len(seen) == len(flat) + 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("XLA_FLAGS", lambda patch: patch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")),
        ("LIBTPU_INIT_ARGS", lambda patch: patch.setenv("LIBTPU_INIT_ARGS", "--xla_something=1")),
        ("versions.jaxlib", lambda patch: patch.setattr(
            programs.metadata, "version", lambda name: "0.10.1" if name == "jaxlib" else "1")),
        ("source", lambda patch: patch.setattr(programs, "source_hash", lambda *_: "other")),
    ],
)  # fmt: skip
def test_what_surrounds_a_program_is_among_its_fields(name, change, folder, monkeypatch, capsys):
    change(monkeypatch)
    assert executables._find(make_program(), folder, jax.devices()[:2], named=True) is None
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"size": 16}, "size 8 there, 16 here"),
        ({"mesh": (1, 1, 1)}, "mesh.dp 2 there, 1 here"),
    ],
)
def test_another_size_or_mesh_says_what_differs(asked, said, folder, capsys):
    find(make_program(**asked), folder)
    out = capsys.readouterr().out
    assert "no executable matches" in out and said in out and "; compiling" in out


def test_the_right_one_of_several_sizes_is_taken(folder, capsys):
    compile_into([make_program(16), make_program(32)], folder)
    log = CompilationLog()
    call(find(make_program(8), folder))
    assert log.compiled == 0


def test_another_version_says_so(folder, capsys):
    versions = make_program().fields["versions"] | {"jaxlib": "0.10.1"}
    rewrite(folder, versions=versions)
    find(make_program(), folder)
    assert "versions.jaxlib 0.10.1 there" in capsys.readouterr().out


def test_the_nearest_is_told(folder, capsys):
    compile_into([make_program(16, (1, 1, 1))], folder)
    find(make_program(16, (2, 1, 1)), folder)
    assert "no executable matches: size 8 there, 16 here;" in capsys.readouterr().out


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_foreign_executable_is_never_unpickled(folder, capsys):
    exploded = folder / "exploded"
    executable_of(folder).write_bytes(pickle.dumps(Bomb(exploded)))
    call(find(make_program(), folder))
    assert not exploded.exists()
    out = capsys.readouterr().out
    assert f"refused {executable_of(folder).name}: it is damaged" in out


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_executable_is_refused_by_name(kept, folder, capsys):
    file = executable_of(folder)
    file.write_bytes(file.read_bytes()[:kept])
    call(find(make_program(), folder))
    assert f"refused {file.name}" in capsys.readouterr().out


def test_a_missing_executable_is_refused_by_name(folder, capsys):
    executable_of(folder).unlink()
    call(find(make_program(), folder))
    assert f"refused {manifest_of(folder).name}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "another"}', "\x00\xff"])
def test_a_damaged_manifest_is_refused_by_name(text, folder, capsys):
    manifest_of(folder).write_text(text, "latin-1")
    call(find(make_program(), folder))
    assert f"refused {manifest_of(folder).name}" in capsys.readouterr().out


def test_the_artifact_of_another_program_under_this_ones_name_is_refused(folder, capsys):
    asked = make_program(16)
    manifest_of(folder).rename(folder / asked.manifest_name)
    find(asked, folder)
    assert "its name does not match its fingerprint" in capsys.readouterr().out


def test_a_manifest_that_names_a_file_elsewhere_is_refused(folder, capsys):
    path = manifest_of(folder)
    manifest = json.loads(path.read_text())
    manifest["executable"]["file"] = f"../{folder.name}/{executable_of(folder).name}"
    path.write_text(json.dumps(manifest))
    call(find(make_program(), folder))
    assert "names a file that is no *.executable of its folder" in capsys.readouterr().out


def test_an_executable_that_the_runtime_does_not_load_is_refused(folder, capsys):
    """Its checksum is right, but its content is of another kind."""
    payload, *trees = pickle.loads(executable_of(folder).read_bytes())
    data = pickle.dumps((payload[: len(payload) // 2], *trees))
    executable_of(folder).write_bytes(data)
    path = manifest_of(folder)
    manifest = json.loads(path.read_text())
    manifest["executable"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(manifest))
    call(find(make_program(), folder))
    assert "the runtime does not load it" in capsys.readouterr().out


def test_a_damaged_artifact_is_made_anew(folder, capsys):
    executable_of(folder).write_bytes(b"")
    assert compile_into([make_program()], folder) == [make_program().manifest_name]
    log = CompilationLog()
    call(find(make_program(), folder))
    assert log.compiled == 0


def test_a_folder_that_is_only_read_serves(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was written")

    for name in ("atomic_path", "write_json"):
        monkeypatch.setattr(artifacts, name, refuse)
    call(find(make_program(), folder))
    find(make_program(16), folder)


def test_two_processes_write_at_once(tmp_path):
    code = (
        "from tests.runtime.test_executables import *\n"
        "import sys, time\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "compile_into([make_program()], Path(sys.argv[1]))\n"
    )
    start = str(time.time() + 6)
    command = [sys.executable, "-c", code, str(tmp_path), start]
    both = [subprocess.Popen(command, cwd=ROOT, env=os.environ) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    log = CompilationLog()
    call(find(make_program(), tmp_path))
    assert log.compiled == 0
    assert not list(tmp_path.glob(".*"))


# Sharing ----------------------------------------------------------------------------------------


def test_pushed_and_pulled_artifacts_are_found(folder, tmp_path):
    shared, mine = f"file://{tmp_path}/shared", tmp_path / "mine"
    (name,) = sharing.push(folder, shared)
    assert sharing.push(folder, shared) == []
    assert sharing.pull(shared, mine) == [name]
    assert sharing.pull(shared, mine) == []
    log = CompilationLog()
    call(find(make_program(), mine))
    assert log.compiled == 0


@pytest.mark.parametrize("way", ["push", "pull"])
def test_damaged_artifacts_are_not_passed_on(way, folder, tmp_path, capsys):
    executable_of(folder).write_bytes(b"damaged")
    other = tmp_path / "other"
    moved = sharing.push(folder, str(other)) if way == "push" else sharing.pull(str(folder), other)
    assert moved == []
    assert f"not {way}ed: {executable_of(folder).name}: it is damaged" in capsys.readouterr().out
    assert not list(other.glob("*"))


def test_pulling_from_nowhere_is_an_error(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        sharing.pull(str(tmp_path / "nowhere"), tmp_path)


def test_pulling_overwrites_nothing(folder, tmp_path_factory, capsys):
    """This includes an executable of the same name with other content."""
    mine = tmp_path_factory.mktemp("mine")
    (mine / executable_of(folder).name).write_bytes(b"mine")
    assert sharing.pull(str(folder), mine) == []
    assert "has another file of this name" in capsys.readouterr().out
    assert [path.read_bytes() for path in mine.iterdir()] == [b"mine"]


@pytest.mark.parametrize(
    "name", ["model.json", "../x.executable", ".x.executable", "x\0.executable", "é.executable"]
)
def test_a_manifest_names_an_executable_only(name, folder, tmp_path_factory, capsys):
    path, mine = manifest_of(folder), tmp_path_factory.mktemp("mine")
    manifest = json.loads(path.read_text())
    manifest["executable"]["file"] = name
    path.write_text(json.dumps(manifest))
    assert sharing.pull(str(folder), mine) == []
    assert "names a file that is no *.executable" in capsys.readouterr().out
    assert not list(mine.iterdir())


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "\x1b[31mred.json", "a b.json", ".json"])
def test_one_bad_name_does_not_end_a_pull(name, folder, tmp_path_factory, capsys):
    manifest, mine = manifest_of(folder), tmp_path_factory.mktemp("mine")
    (folder / name).write_bytes(manifest.read_bytes())
    assert sharing.pull(str(folder), mine) == [manifest.name]
    out = capsys.readouterr().out
    assert out.startswith("not pulled: ") and "\x1b" not in out


@pytest.mark.parametrize("where", ["manifest", "executable"])
def test_a_named_pipe_in_a_folder_of_executables_is_refused(where, folder, capsys):
    path = {"manifest": manifest_of, "executable": executable_of}[where](folder)
    path.unlink()
    os.mkfifo(path)
    call(find(make_program(), folder))
    assert "is a named pipe" in capsys.readouterr().out
    mine = folder / "mine"
    assert sharing.pull(str(folder), mine) == []
    assert "is a named pipe" in capsys.readouterr().out


def test_texts_of_manifests_do_not_reach_the_terminal_raw(folder, capsys):
    rewrite(folder, size="\x1b]0;title\x07" + "8" * 1000)
    find(make_program(), folder)
    out = capsys.readouterr().out
    assert r"size \x1b]0;title" in out and "\x1b" not in out
    assert max(map(len, out.splitlines())) < 400


@pytest.mark.parametrize("key", ["compile_seconds", "hbm_bytes_per_device", "fields", "executable"])
def test_a_manifest_with_a_part_of_another_type_is_refused(key, folder, capsys):
    manifest = json.loads(manifest_of(folder).read_text())
    manifest_of(folder).write_text(json.dumps(manifest | {key: "text"}))
    call(find(make_program(), folder))
    assert "are missing or of the wrong type" in capsys.readouterr().out


class Unreachable(LocalFileSystem):
    """Raises an exception outside fsspec's contract, as httpx does offline."""

    def makedirs(self, *_, **__):
        raise RuntimeError("no route\nto host")

    isdir = ls = makedirs


def test_an_unreachable_place_is_one_line(folder, monkeypatch):
    monkeypatch.setattr(sharing.fsspec, "url_to_fs", lambda url: (Unreachable(), url))
    for move in (
        lambda: sharing.push(folder, "gs://bucket"),
        lambda: sharing.pull("gs://bucket", folder),
    ):
        with pytest.raises(RunError, match="^cannot reach gs://bucket: no route.*to host$"):
            move()
