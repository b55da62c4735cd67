"""The compiler options of each program, in one place, each with its reason and effect."""

import numpy as np

from runtime.chips import V5E, V6E
from runtime.jax_types import Device

CompilerOptions = dict[str, str | bool | float]

# 64 MiB, of 128, for the operands of one fusion instead of 32: matrix products of 11,392 rows keep
# theirs there. A block of the 5B transformer outside attention takes 7.0M cycles of a v6e, not 9.7M
# (compiler estimates). v5p has 64 MiB in all.
_ROOMY: CompilerOptions = {"xla_tpu_scoped_vmem_limit_kib": "65536"}

# The all-to-all of v travels while k is projected, and so on; by default they are synchronous.
_ASYNC: CompilerOptions = {"xla_tpu_enable_async_all_to_all": "true"}

# GPUs of one host copy to each other by their copy engines. NCCL's kernels would take
# multiprocessors from the products beside them, or wait for one of them to end. With `exchange`, a
# step of the 5B transformer on four H200s takes 1.64 s; with all-to-alls by NCCL it took 1.68 s.
_COPY: CompilerOptions = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}

# Otherwise XLA times algorithms on the device, and two compiles may round differently. On one H200
# a step takes 6.19 s instead of 6.27 and compiles in 18 s instead of 23; a decode takes 3.42 s
# instead of 3.28 and compiles in 13 s instead of 20.
_SAME_BITS: CompilerOptions = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_enable_triton_gemm": False,
}


def transformer_options(devices: np.ndarray) -> CompilerOptions:
    """Options of the denoising step on these devices."""
    device = devices.flat[0]
    if device.platform == "gpu":
        one_host = len({device.process_index for device in devices.flat}) == 1
        return _SAME_BITS | (_COPY if one_host else {})
    if device.platform != "tpu":
        return {}
    return _ASYNC | (_ROOMY if device.device_kind in (V5E.device_kind, V6E.device_kind) else {})


def vae_options(device: Device) -> CompilerOptions:
    """Options of the decoder's programs.

    At O1 the two of 768x1360 on a v6e-8 take 52 s of CPU time to compile and a decode takes
    0.745e9 cycles; at O0 it is 44 s and 0.776e9, by default 103 s and 0.678e9 (compiler estimates).
    The kernels are the same.
    """
    by_platform: dict[str, CompilerOptions] = {
        "tpu": {"optimization_level": "O1"},
        "gpu": _SAME_BITS,
    }
    return by_platform.get(device.platform, {})
