"""Atomic files survive exceptions and kills."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import RunError
from runtime.files import atomic_path, write_json


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_write_keeps_the_old_file(number: int, tmp_path: Path):
    path = tmp_path / "file.json"
    write_json(path, "old")
    program = f"""
import os, pathlib
from runtime.exit_codes import run_script
from runtime.files import atomic_path
def main():
    with atomic_path(pathlib.Path({str(path)!r})) as temporary:
        temporary.write_text('"ne')
        os.kill(os.getpid(), {int(number)})
run_script(main)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root)
    assert done.returncode == (-9 if number == signal.SIGKILL else 143)
    assert path.read_text() == '"old"\n'
    write_json(path, "new")
    assert path.read_text() == '"new"\n' and os.listdir(tmp_path) == ["file.json"]


def test_a_signal_dropped_by_a_gc_callback_comes_again():
    program = """
import gc, os, signal, time
from runtime.exit_codes import run_script
def callback(phase, _):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
def main():
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(5)
run_script(main)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 143 and done.stderr == "terminated\n"


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "short"])
def test_writes_every_name_that_the_file_system_takes(name: str, tmp_path: Path):
    write_json(tmp_path / name, 1)
    write_json(tmp_path / name, 2)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "2\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line(number: int, tmp_path: Path):
    path = tmp_path / "a\x1b.json"
    with pytest.raises(RunError) as failed, atomic_path(path) as temporary:
        temporary.write_text("ne")
        raise OSError(number, os.strerror(number))
    assert str(failed.value) == f"cannot write {tmp_path}/a\\x1b.json: {os.strerror(number)}"
    assert isinstance(failed.value, OSError) and failed.value.errno == number
    assert not os.listdir(tmp_path)


def test_a_name_or_folder_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("a" * 256), tmp_path / "file" / "x", Path("/proc/x/y")):
        with pytest.raises(RunError, match="^cannot write .*: "):
            write_json(path, 1)


def test_an_error_that_is_not_the_disks_passes(tmp_path: Path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        open("/nowhere/else")
