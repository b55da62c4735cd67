""".ci/pip_install, which `make setup` runs, is never silent for long and hides non-errors."""

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / ".ci/pip_install"


def install(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Runs .ci/pip_install with a shell script as pip."""
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\n{body}\n")
    pip.chmod(0o755)
    return subprocess.run([SCRIPT, pip, "install"], capture_output=True, text=True, timeout=60)


def test_it_says_what_pip_does(tmp_path):
    body = "echo 'WARNING: box'; echo '  Downloading torch-2.whl (900 MB)'; sleep 7"
    done = install(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "      5 s: Downloading torch-2.whl (900 MB)\n"


def test_it_shows_errors_and_keeps_the_status(tmp_path):
    done = install(tmp_path, "echo 'ERROR: No matching distribution found' >&2; exit 3")
    assert done.returncode == 3
    assert done.stderr == "ERROR: No matching distribution found\n"
