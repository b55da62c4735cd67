"""Scripts end with the project's exit codes, in one line, and without Python's teardown."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import InputError, RunError
from runtime.exit_codes import run_main
from runtime.text import message_line

PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize(("error", "code"), [(InputError, 2), (RunError, 1)])
def test_a_long_message_is_cut_in_the_middle(error, code, capsys):
    def main():
        raise error("--prompt \x1b[31m" + "x" * 100_000 + " is the end")

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == code
    said = capsys.readouterr().err
    assert len(said) < 2100 and said.count("\n") == 1
    assert "--prompt \\x1b[31mxx" in said and said.endswith("x is the end\n")
    assert "(98028 characters left out)" in said


def test_a_message_of_twenty_lines_is_whole():
    assert message_line("x" * 2000) == "x" * 2000


def run(program: str) -> subprocess.CompletedProcess:
    program = f"import atexit, sys\nfrom runtime.exit_codes import run_script\n{program}"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('words')", 1),
        ("raise KeyError('a defect')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143),
    ],
)
def test_a_script_ends_after_the_callbacks_of_others_and_before_teardown(body, code):
    """`Slow` stands for the objects of torch and JAX, which take seconds to free."""
    done = run(
        f"""
class Slow:
    def __del__(self):
        print("teardown")
kept = Slow()
def main():
    atexit.register(print, "callback")
    {body}
run_script(main)
"""
    )
    assert (done.returncode, done.stdout) == (code, "callback\n"), done.stderr
    assert ("Traceback" in done.stderr) == ("KeyError" in body)


def test_output_that_cannot_be_written_is_no_success():
    """Buffered text is written at the end of a program."""
    program = """
sys.stdout = open("/dev/full", "w")
run_script(lambda: sys.stdout.write("x"))
"""
    assert run(program).returncode == 1
