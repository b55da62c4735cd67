"""Start-up of JAX on the devices of this machine."""

import glob
import os

from runtime import processes

_ACCELERATOR_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*")


def start_jax(dtype: str) -> None:
    """Starts JAX: finds the devices, opens the compilation cache, sets the matmul precision.

    Args:
        dtype: "float32" makes matrix products exact; TPUs and GPUs otherwise multiply float32 in
            bfloat16 or TF32.

    Raises:
        ValueError: JAX finds no device, the cache folder cannot be written, or this is one host of
            several and the processes have not joined.
    """
    # libtpu prints five lines of errors where it finds no TPU.
    if not any(glob.glob(pattern) for pattern in _ACCELERATOR_FILES):
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
        jax.devices()
    except RuntimeError as error:
        raise ValueError(f"JAX finds no device: {error}") from error
    if jax.process_count() > processes.count():
        raise ValueError(
            f"this is one of {jax.process_count()} hosts of a slice; start the same command on "
            "every host, with --distributed"
        )
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
