"""Backends: one class for each kind of hardware that runs a block."""

from cogvideox.transformer.backends.base import Backend
from cogvideox.transformer.backends.cpu import CpuBackend
from cogvideox.transformer.backends.gpu import GpuBackend
from cogvideox.transformer.backends.tpu.backend import TpuBackend

__all__ = ["Backend", "CpuBackend", "GpuBackend", "TpuBackend", "choose_backend"]


def choose_backend(attention: str, platform: str, dtype: str) -> Backend:
    """Returns the backend for `attention`: auto, splash, cudnn or reference.

    Args:
        platform: platform of the devices: "tpu", "gpu" or "cpu".
        dtype: dtype of the run.

    Raises:
        ValueError: the platform cannot run this attention kernel.
    """
    if attention == "auto":
        cudnn_runs = platform == "gpu" and dtype == "bfloat16"
        attention = "splash" if platform == "tpu" else "cudnn" if cudnn_runs else "reference"
    needed = {"splash": "tpu", "cudnn": "gpu"}.get(attention, platform)
    if needed != platform:
        raise ValueError(
            f"--attention {attention} needs a {needed.upper()}, this is a {platform.upper()}; "
            "use auto or reference"
        )
    if attention == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"--attention cudnn computes bfloat16 only, not {dtype}; use reference")
    return {"splash": TpuBackend, "cudnn": GpuBackend, "reference": CpuBackend}[attention]()
