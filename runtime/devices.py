"""Start-up of JAX on the devices of this machine."""

import collections
import glob
import os
from collections.abc import Sequence

from runtime import processes
from runtime.errors import InputError
from runtime.jax_types import Device

PLATFORMS = ("tpu", "gpu", "cpu")
# What the driver of each kind makes.
_DEVICE_FILES = {
    "tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"),
    "gpu": ("/dev/nvidia[0-9]*",),
}
_JAX_NAMES = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}


def has_devices(platform: str) -> bool:
    """Whether this machine has a TPU or a GPU with its driver; starts nothing."""
    return any(glob.glob(pattern) for pattern in _DEVICE_FILES[platform])


def insist_on(platform: str) -> None:
    """Makes JAX use devices of one kind. Call it before JAX is imported.

    Args:
        platform: one of PLATFORMS.

    Raises:
        InputError: this machine has none.
    """
    if platform != "cpu" and not has_devices(platform):
        files = ", ".join(_DEVICE_FILES[platform])
        raise InputError(f"--platform {platform}: this machine has no {platform.upper()} ({files})")
    os.environ["JAX_PLATFORMS"] = _JAX_NAMES[platform]


def describe_devices(devices: Sequence[Device]) -> str:
    """ "8 x TPU v6 lite", "1 x NVIDIA H100 80GB HBM3", or "CPU" and why it is no other."""
    if devices[0].platform != "cpu":
        counts = collections.Counter(device.device_kind for device in devices)
        return ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    found = [platform.upper() for platform in _DEVICE_FILES if has_devices(platform)]
    if not found:
        return f"{count}CPU (no TPU or GPU found)"
    chosen = os.environ.get("JAX_PLATFORMS") == "cpu"
    why = "chosen by --platform or JAX_PLATFORMS" if chosen else "JAX cannot use it"
    return f"{count}CPU (the {found[0]} of this machine is not used: {why})"


def start_jax(dtype: str, devices: Sequence[Device] | None = None) -> None:
    """Starts JAX: finds the devices, opens the compilation cache, sets the matmul precision.

    Prints the cache's folder and the devices.

    Args:
        devices: those to print; None prints this machine's.
        dtype: "float32" makes matrix products exact; TPUs and GPUs otherwise multiply float32 in
            bfloat16 or TF32.

    Raises:
        ValueError: JAX finds no device, the cache folder cannot be written, or this is one host of
            several and the processes have not joined.
    """
    # libtpu prints five lines of errors where it finds no TPU.
    if not any(has_devices(platform) for platform in _DEVICE_FILES):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    # By default JAX first reserves three quarters of a GPU's memory: 1.5 s on an H200.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    import jax

    from runtime.compilation import enable_persistent_cache

    try:
        print(f"compilation cache: {enable_persistent_cache()}")
    except OSError as error:
        raise ValueError(f"JAX_COMPILATION_CACHE_DIR: {error}") from error
    try:
        here: Sequence[Device] = jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device: {error}") from error
    print(f"device: {describe_devices(here if devices is None else devices)}")
    if jax.process_count() > processes.count():
        raise ValueError(
            f"this is one of {jax.process_count()} hosts of a slice; start the same command on "
            "every host, with --distributed"
        )
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
