"""Compiler options of each program, with the reason and effect of each."""

import numpy as np

from runtime.chips import V5E, V6E
from runtime.jax_types import Device

CompilerOptions = dict[str, str | bool | float]

# VMEM for the operands of one fusion: 64 of 128 MiB, instead of 32, holds those of products of
# 11,392 rows. A block of the 5B transformer outside attention takes 7.0M v6e cycles instead of 9.7M
# (compiler estimates). v5p has 64 MiB in total.
_ROOMY: CompilerOptions = {"xla_tpu_scoped_vmem_limit_kib": "65536"}

# Asynchronous all-to-alls: that of v overlaps the projection of k, etc. The default is synchronous.
_ASYNC: CompilerOptions = {"xla_tpu_enable_async_all_to_all": "true"}

# GPUs of one host exchange data with their copy engines. NCCL's kernels would take multiprocessors
# from concurrent products, or wait for one of them to end. A step of the 5B transformer on four
# H200s takes 1.64 s with `exchange`, and 1.68 s with all-to-alls by NCCL.
_COPY: CompilerOptions = {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}

# Without this, XLA times algorithms on the device, and two compiles may round differently. On one
# H200 a step takes 6.19 s instead of 6.27 and compiles in 18 s instead of 23; a decode takes 3.42 s
# instead of 3.28 and compiles in 13 s instead of 20.
_SAME_BITS: CompilerOptions = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_enable_triton_gemm": False,
}


def transformer_options(devices: np.ndarray) -> CompilerOptions:
    """Returns the options of the denoising step on these devices."""
    device = devices.flat[0]
    if device.platform == "gpu":
        one_host = len({device.process_index for device in devices.flat}) == 1
        return _SAME_BITS | (_COPY if one_host else {})
    if device.platform != "tpu":
        return {}
    return _ASYNC | (_ROOMY if device.device_kind in (V5E.device_kind, V6E.device_kind) else {})


def vae_options(device: Device) -> CompilerOptions:
    """Returns the options of the decoder's programs.

    At O1, the two programs of 768x1360 on a v6e-8 take 52 s of CPU time to compile and a decode
    takes 0.745e9 cycles; at O0, 44 s and 0.776e9; by default, 103 s and 0.678e9 (compiler
    estimates). The kernels are the same.
    """
    by_platform: dict[str, CompilerOptions] = {
        "tpu": {"optimization_level": "O1"},
        "gpu": _SAME_BITS,
    }
    return by_platform.get(device.platform, {})
