"""Start stages in separate processes, on the TPU path or on the CPU path."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _run(command: list[str], xla_flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags},
        capture_output=True,
        text=True,
        timeout=240,
    )


def start_on_tpu_path(stage: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Starts `python -m tests.tpu_path`; does not check its exit code."""
    return _run(["-m", "tests.tpu_path", stage, *map(str, arguments)], "")


def run_on_tpu_path(stage: str, *arguments: object) -> None:
    done = start_on_tpu_path(stage, *arguments)
    assert done.returncode == 0, done.stderr


def run_script(script: str, *arguments: object, devices: int = 1) -> None:
    """Runs a stage on the CPU path."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = _run([str(ROOT / script), *map(str, arguments)], flags)
    assert done.returncode == 0, done.stderr
