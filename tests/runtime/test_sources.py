"""A program's fingerprint covers the files that are traced into it, and no others."""

import contextlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compile_ahead
from runtime import executables, programs
from runtime.programs import PROJECT, Program, source_files, source_hash
from tests.tiny_models import save_tiny_model

ROOMS = ("cogvideox", "jobs", "runtime", "splash_attention", "stages")


# JAX reports to its listeners while it lowers; they only count.
LISTENERS = PROJECT / "runtime/compilation.py"


class Captured(Exception):
    """Raised when the programs reach the compiler."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def programs_of(model, tmp_path, monkeypatch) -> Callable[..., list[Program]]:
    """Returns the programs that compile_ahead.py would compile for a stage."""

    def find(*arguments: str) -> list[Program]:
        found = []

        def capture(given: list[Program], _: int) -> None:
            found.extend(given)
            raise Captured

        monkeypatch.setattr(executables, "compile_all", capture)
        options = ["--model_id", str(model), "--executables", str(tmp_path / "executables")]
        options += ["--sizes", "64x80x17", "--dtype", "float32", *arguments]
        with pytest.raises(Captured):
            compile_ahead.run(compile_ahead.parse_arguments(options))
        return found

    return find


def fingerprints(found: list[Program]) -> list[str]:
    return [program.fingerprint for program in found]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """Copies the project and makes the fingerprints from the copy."""
    copy = tmp_path / "project"
    for room in ROOMS:
        shutil.copytree(PROJECT / room, copy / room)
    monkeypatch.setattr(programs, "PROJECT", copy)
    return copy


def edit(path: Path) -> None:
    source_hash.cache_clear()
    path.write_text(path.read_text() + "\n# A comment.\n")


def test_files_that_are_not_traced_leave_every_fingerprint_as_it_was(project, programs_of):
    stages = (("--stages", "2"), ("--stages", "3"), ("--stages", "3", "--decoder", "flax"))
    before = [fingerprints(programs_of(*stage)) for stage in stages]
    for folder in ("cogvideox/video", "cogvideox/text", "stages", "jobs", "runtime"):
        for path in (project / folder).glob("**/*.py"):
            edit(path)
    assert [fingerprints(programs_of(*stage)) for stage in stages] == before


def test_the_block_is_in_the_fingerprint_of_the_step_alone(project, programs_of):
    step, decoder = (programs_of("--stages", stage) for stage in "23")
    edit(project / "cogvideox/transformer/block.py")
    changed = programs_of("--stages", "2")
    by_name = {program.name: program.fingerprint for program in changed}
    for program in step:
        is_step = program.name == "stage2_transformer"
        assert (by_name[program.name] != program.fingerprint) == is_step, program.name
    assert fingerprints(programs_of("--stages", "3")) == fingerprints(decoder)


@pytest.mark.parametrize(
    "file", ["layers.py", "xla/layers.py", "tpu/layers.py", "tpu/causal_conv.py"]
)
def test_the_vae_is_in_the_fingerprints_of_the_decoder_alone(file, project, programs_of):
    step, decoder = (programs_of("--stages", stage) for stage in "23")
    edit(project / "cogvideox/vae" / file)
    assert fingerprints(programs_of("--stages", "2")) == fingerprints(step)
    assert not set(fingerprints(programs_of("--stages", "3"))) & set(fingerprints(decoder))


def test_the_attention_kernel_is_in_the_fingerprint_of_the_step(project, programs_of):
    (step,) = (p for p in programs_of("--stages", "2") if p.name == "stage2_transformer")
    edit(project / "splash_attention/bodies.py")
    (changed,) = (p for p in programs_of("--stages", "2") if p.name == "stage2_transformer")
    assert changed.fingerprint != step.fingerprint


def files_traced_by(program: Program) -> set[Path]:
    """Returns the files of this project that run while a program is traced and lowered."""
    found = set()

    def note(frame, event: str, _: object) -> None:
        # A module that is first imported here only defines things.
        if event == "call" and frame.f_code.co_name != "<module>":
            found.add(frame.f_code.co_filename)

    with contextlib.ExitStack() as stack:
        stack.callback(sys.setprofile, sys.getprofile())
        sys.setprofile(note)
        program.lower()
    paths = (Path(name) for name in found if name.endswith(".py"))
    inside = {path for path in paths if path.is_relative_to(PROJECT)}
    # A virtual environment may lie in the project, as `make setup` puts it.
    installed = {path for path in inside if path.is_relative_to(sys.prefix)}
    tests = {path for path in inside if path.is_relative_to(PROJECT / "tests")}
    return inside - installed - tests - {LISTENERS}


@pytest.mark.parametrize(
    "stage",
    [("--stages", "2"), ("--stages", "3"), ("--stages", "3", "--decoder", "flax")],
    ids=lambda stage: "-".join(stage[1::2]),
)
def test_every_traced_file_is_declared(stage, programs_of):
    for program in programs_of(*stage):
        traced = files_traced_by(program)
        assert traced, program.name
        undeclared = traced - set(source_files(program.fields["sources"]))
        assert not {str(path.relative_to(PROJECT)) for path in undeclared}, program.name


def test_a_source_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_file"):
        source_files(("no_such_file.py",), tmp_path)
