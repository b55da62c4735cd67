"""Every stage names its devices, and --platform requires a kind of device."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import devices
from runtime.devices import describe_devices, insist_on
from runtime.errors import InputError

ROOT = Path(__file__).parents[2]


def some(count: int, platform: str, kind: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(platform=platform, device_kind=kind)] * count


def machine_with(monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """Makes this machine look as if it had these device files."""
    found = {pattern: [pattern] for pattern in files}
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: found.get(pattern, []))


def test_accelerators_are_counted_and_named():
    assert describe_devices(some(8, "tpu", "TPU v6 lite")) == "8 x TPU v6 lite"
    assert describe_devices(some(1, "gpu", "NVIDIA H100")) == "1 x NVIDIA H100"
    mixed = some(1, "gpu", "NVIDIA H100") + some(2, "gpu", "NVIDIA H200")
    assert describe_devices(mixed) == "1 x NVIDIA H100, 2 x NVIDIA H200"


def test_the_cpu_says_why(monkeypatch):
    cpu = some(1, "cpu", "cpu")
    machine_with(monkeypatch)
    assert describe_devices(cpu) == "CPU (no TPU or GPU found)"
    machine_with(monkeypatch, "/dev/nvidia[0-9]*")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    expected = "CPU (the GPU of this machine is not used: chosen by --platform or JAX_PLATFORMS)"
    assert describe_devices(cpu) == expected
    monkeypatch.delenv("JAX_PLATFORMS")
    assert describe_devices(cpu) == "CPU (the GPU of this machine is not used: JAX cannot use it)"


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_insisting_on_a_device_that_is_absent_is_an_error(platform, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "unchanged")
    machine_with(monkeypatch)
    with pytest.raises(InputError, match=f"--platform {platform}: this machine has no"):
        insist_on(platform)
    assert os.environ["JAX_PLATFORMS"] == "unchanged"


@pytest.mark.parametrize(
    ("platform", "file", "name"),
    [("tpu", "/dev/accel*", "tpu"), ("gpu", "/dev/nvidia[0-9]*", "cuda"), ("cpu", "", "cpu")],
)
def test_insisting_overrides_the_environment(platform, file, name, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "other")
    machine_with(monkeypatch, file)
    insist_on(platform)
    assert os.environ["JAX_PLATFORMS"] == name


def run(script: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.skipif(devices.has_devices("tpu"), reason="this machine has a TPU")
@pytest.mark.parametrize(
    "script", ["stage2_transformer.py", "stage3_vae_decoder.py", "generate.py", "compile_ahead.py"]
)
def test_a_script_ends_in_one_line_without_the_device(script):
    prompt = ["--prompt=a"] if script == "generate.py" else []
    done = run(script, *prompt, "--platform", "tpu", code=2)
    assert done.stderr.startswith("error: --platform tpu: this machine has no TPU")
    assert done.stderr.count("\n") == 1
