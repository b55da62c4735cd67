"""Backends: one class for each kind of hardware that runs a block."""

from cogvideox.transformer.backends.base import Backend
from cogvideox.transformer.backends.cpu import CpuBackend
from cogvideox.transformer.backends.gpu import GpuBackend, HopperBackend
from cogvideox.transformer.backends.tpu.backend import TpuBackend
from splash_attention.hopper.attention import COMPUTE_CAPABILITY

__all__ = ["Backend", "CpuBackend", "GpuBackend", "HopperBackend", "TpuBackend", "choose_backend"]


def choose_backend(
    attention: str, platform: str, dtype: str, compute_capability: str | None = None
) -> Backend:
    """Returns the backend for `attention`: auto, splash, cudnn or reference.

    Args:
        platform: platform of the devices: "tpu", "gpu" or "cpu".
        dtype: dtype of the run.
        compute_capability: of the GPUs, such as "9.0".

    Raises:
        ValueError: the devices cannot run this attention kernel.
    """
    on_gpu, on_hopper = platform == "gpu", compute_capability == COMPUTE_CAPABILITY
    if attention == "auto":
        if platform == "tpu":
            attention = "splash"
        elif on_gpu and dtype == "bfloat16":
            attention = "splash" if on_hopper else "cudnn"
        else:
            attention = "reference"
    if attention == "splash" and on_gpu and not on_hopper:
        raise ValueError(
            f"--attention splash needs a TPU or a GPU of compute capability {COMPUTE_CAPABILITY}, "
            f"this GPU has {compute_capability}; use auto or cudnn"
        )
    needed = {"splash": ("tpu", "gpu"), "cudnn": ("gpu",)}.get(attention, (platform,))
    if platform not in needed:
        raise ValueError(
            f"--attention {attention} needs a {' or a '.join(map(str.upper, needed))}, this is a "
            f"{platform.upper()}; use auto or reference"
        )
    if on_gpu and attention in ("splash", "cudnn") and dtype != "bfloat16":
        raise ValueError(
            f"--attention {attention} computes bfloat16 only on a GPU, not {dtype}; use reference"
        )
    if attention == "splash":
        return HopperBackend() if on_gpu else TpuBackend()
    return GpuBackend() if attention == "cudnn" else CpuBackend()
