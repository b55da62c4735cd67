"""Folders of executables that others can change are refused by name and reason."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from runtime import compilation, sharing, trusted_folders
from runtime.compilation import CompilationLog, cache_folder, enable_persistent_cache
from runtime.errors import InputError
from runtime.executables import compile_into
from runtime.trusted_folders import check_trusted, make_folder, manifest_digest
from tests.runtime.test_executables import Bomb, call, find, make_program, manifest_of

OTHER = 12345


def belong_to_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives `path` to another user, or, without that right, pretends to be another user."""
    if os.geteuid() == 0:
        os.chown(path, OTHER, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: OTHER)


@pytest.fixture
def shared(tmp_path) -> Path:
    """Makes a user's folder in one like /tmp: everybody can write, but remove only their own.

    pytest's own folders can be entered by the user alone, so permissions below would not matter.
    """
    folder = Path(os.path.realpath("/tmp")) / f"trusted-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    folder.chmod(0o1777)
    mine = folder / "mine"
    mine.mkdir(0o755)
    yield mine
    shutil.rmtree(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError, match="may not hold executables, which are code") as raised:
        check_trusted(folder, "--executables")
    message = str(raised.value)
    assert message.startswith(f"--executables {folder} ") and "\n" not in message
    return message


def test_a_folder_of_the_user_is_trusted(shared):
    (shared / "file").write_text("")
    check_trusted(shared, "--executables")


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o757])
def test_a_folder_that_everybody_can_write_is_refused(mode, shared):
    shared.chmod(mode)
    assert f"{shared} can be written by everybody (mode {mode:o})" in refusal(shared)


def test_a_folder_that_a_group_can_write_is_refused(shared, monkeypatch):
    shared.chmod(0o775)
    monkeypatch.setattr(trusted_folders, "_is_private_group", lambda *_: False)
    assert f"{shared} can be written by group" in refusal(shared)


def test_a_private_group_is_the_user(shared):
    """The umask 002 of many systems gives the user's own group the right to write."""
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid())
    group = grp.getgrgid(user.pw_gid)
    if group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
        pytest.skip("this user has no private group")
    os.chown(shared, -1, user.pw_gid)
    shared.chmod(0o775)
    check_trusted(shared, "--executables")
    if os.geteuid() == 0:
        os.chown(shared, -1, OTHER)
        assert f"by group {OTHER}" in refusal(shared)


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_folder_above_matters(mode, shared):
    """Users who can write it can rename what is below, unless it is sticky."""
    folder = shared / "executables"
    folder.mkdir()
    shared.chmod(mode)
    if mode & 0o1000:
        check_trusted(folder, "--executables")
    else:
        assert f"{shared} can be written by everybody" in refusal(folder)


@pytest.mark.parametrize("level", ["above", "itself", "file"])
def test_what_belongs_to_another_user_is_refused(level, shared, monkeypatch):
    folder = shared / "executables"
    folder.mkdir()
    (folder / "file").write_text("")
    path = {"above": shared, "itself": folder, "file": folder / "file"}[level]
    belong_to_another(path, monkeypatch)
    assert "belongs to user" in refusal(folder)


def test_a_file_that_everybody_can_write_is_refused(shared):
    (shared / "file").write_text("")
    (shared / "file").chmod(0o666)
    assert f"{shared / 'file'} can be written by everybody" in refusal(shared)
    shared.chmod(0o700)  # nobody else reaches it
    check_trusted(shared, "--executables")


def test_links_are_followed(shared, tmp_path):
    """A link in a folder that nobody else can enter does not make its target safe."""
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)
    private = shared / "private"
    private.mkdir(0o700)
    for link, target in (
        (private / "folder", shared / "open"),
        (private / "relative", Path("..", "open")),
        (private / "twice", private / "folder"),
    ):
        link.symlink_to(target)
        assert "can be written by everybody" in refusal(link)
    (shared / "open" / "file").write_text("")
    (shared / "links").mkdir()
    (shared / "links" / "file").symlink_to(shared / "open" / "file")
    assert "can be written by everybody" in refusal(shared / "links")
    (shared / "loop").symlink_to("loop")
    with pytest.raises(InputError):
        check_trusted(shared / "loop", "--executables")


@pytest.mark.parametrize("umask", [0, 0o002])
def test_folders_are_made_that_nobody_else_can_write(umask, shared):
    before = os.umask(umask)
    try:
        make_folder(shared / "a" / "b")
    finally:
        os.umask(before)
    check_trusted(shared / "a" / "b", "cache")


# The cache's folder -----------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_cache_lies_in_the_users_cache_folder(environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/cogvideox-tpu/jax"
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/cogvideox-tpu/jax"
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
@pytest.mark.parametrize("value", ["", ".", "cache", None])
def test_relative_and_empty_variables_are_refused(variable, value, environment):
    """They would take executables from the folder that a command happens to be run in."""
    if value is not None:
        environment.setenv(variable, value)
    elif variable == "HOME":
        environment.delenv("HOME")
    else:
        pytest.skip("not set is the usual case")
    with pytest.raises(InputError, match=f"^{variable} is (relative|empty or not set)"):
        cache_folder()


@pytest.mark.parametrize("below", ["", compilation.KEPT])
def test_a_cache_that_others_can_write_is_refused(below, environment, shared):
    folder = shared / "cache" / below
    folder.mkdir(parents=True)
    folder.chmod(0o1777)
    environment.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "cache"))
    with pytest.raises(InputError, match=r"compilation cache .* can be written by everybody"):
        enable_persistent_cache()


# Executables ------------------------------------------------------------------------------------


@pytest.fixture
def executables(shared) -> Path:
    """Makes a folder of executables that everybody can write."""
    folder = shared / "executables"
    compile_into([make_program()], folder)
    folder.chmod(0o1777)
    return folder


def plant(folder: Path) -> Path:
    """Replaces the executable by one that writes a file, with its checksum; returns that file."""
    exploded = folder / "exploded"
    (file,) = folder.glob("*.executable")
    data = pickle.dumps(Bomb(exploded))
    file.write_bytes(data)
    manifest = json.loads(manifest_of(folder).read_text())
    manifest["executable"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest_of(folder).write_text(json.dumps(manifest))
    return exploded


def test_an_executable_that_others_could_plant_is_not_loaded(executables):
    exploded = plant(executables)
    with pytest.raises(InputError, match="can be written by everybody"):
        find(make_program(), executables)
    assert not exploded.exists()
    executables.chmod(0o755)  # the planted file is valid: only the folder's rights protect from it
    find(make_program(), executables)
    assert exploded.exists()


def test_a_pull_from_a_folder_that_others_can_write_is_refused(executables, shared):
    with pytest.raises(InputError, match=r"^--pull .* can be written by everybody"):
        sharing.pull(str(executables), shared / "mine")
    assert not (shared / "mine").exists()


def digest_of(folder: Path) -> str:
    return manifest_digest({path.name: path.read_bytes() for path in folder.glob("*.json")})


def test_the_digest_is_that_of_sha256sum(executables):
    compile_into([make_program(16), make_program(32)], executables)
    command = "LC_ALL=C sha256sum *.json | sha256sum"
    run = subprocess.run(command, shell=True, cwd=executables, capture_output=True, text=True)
    assert run.stdout.split()[0] == digest_of(executables)


def test_executables_of_a_known_digest_are_taken(executables, shared):
    copies = sharing.trusted_copy(executables, digest_of(executables), shared / "cache")
    log = CompilationLog()
    call(find(make_program(), copies))
    assert log.compiled == 0
    # They are the user's own: what changes in the folder later does not reach them.
    plant(executables)
    call(find(make_program(), copies))


def test_copies_that_nobody_has_used_for_a_month_are_deleted(executables, shared):
    trusted = shared / "cache" / "trusted"
    folders = {name: trusted / name for name in ("a" * 64, "b" * 64, "notes")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "x.json").write_text("{}")
    sharing.trusted_copy(executables, digest_of(executables), shared / "cache")
    month = 31 * 86400
    for name, age in (("a" * 64, month), ("b" * 64, 60), ("notes", month)):
        os.utime(folders[name], (time.time() - age,) * 2)
    (trusted / ("c" * 64)).symlink_to(shared)
    os.utime(trusted / ("c" * 64), (0, 0), follow_symlinks=False)
    copies = trusted / digest_of(executables)
    os.utime(copies, (0, 0))
    assert sharing.trusted_copy(executables, copies.name, shared / "cache") == copies
    assert {path.name for path in trusted.iterdir()} == {"b" * 64, "c" * 64, "notes", copies.name}
    assert shared.is_dir() and time.time() - copies.stat().st_mtime < 60


def test_executables_of_another_digest_are_refused(executables, shared):
    digest = digest_of(executables)
    exploded = plant(executables)
    with pytest.raises(InputError, match=f"not {digest} of --trust_executables"):
        sharing.trusted_copy(executables, digest, shared / "cache")
    with pytest.raises(InputError, match=f"not {digest} of --trust_executables"):
        sharing.pull(str(executables), shared / "mine", digest)
    assert not exploded.exists() and not (shared / "mine").exists()


def test_an_executable_changed_under_a_known_manifest_is_not_copied(executables, shared, capsys):
    digest = digest_of(executables)
    (file,) = executables.glob("*.executable")
    file.write_bytes(file.read_bytes()[::-1])
    assert sharing.pull(str(executables), shared / "mine", digest) == []
    assert "it is damaged" in capsys.readouterr().out
