"""Table of chips and machines, for estimates and compilers.

`splash_attention` has its own table of VMEM sizes, so it can be used alone.
"""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation; values are from its datasheet unless another source is named.

    Attributes:
        device_kind: `jax.Device.device_kind`.
        topology: libtpu's name of a topology of one chip.
        accelerator_type: accelerator type of a machine with this chip.
        clock_hz: bundles per second of a TensorCore.
        hbm_bytes: memory of a chip; for v6e, the memory that the compiler gives a program.
        link_bytes_per_second: sum over all neighbours.
        bfloat16_flops: peak of the matrix units per second.
    """

    name: str
    device_kind: str
    topology: str
    accelerator_type: str
    clock_hz: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    link_bytes_per_second: float
    bfloat16_flops: float


V5E = Chip("v5e", "TPU v5 lite", "v5e:1x1", "v5litepod-8", 1.5e9, 16 * 2**30, 819e9, 200e9, 197e12)
V5P = Chip("v5p", "TPU v5", "v5p:1x1x1", "v5p-8", 1.75e9, 95 * 2**30, 2765e9, 600e9, 459e12)
V6E = Chip(
    "v6e", "TPU v6 lite", "v6e:1x1", "v6e-8", 1.75e9, int(31.25 * 2**30), 1640e9, 448e9, 918e12
)
CHIPS = {chip.name: chip for chip in (V5E, V5P, V6E)}

# Chips for which stages.plan has kernel cycles, by device kind.
PLANNED = {V6E.device_kind: V6E}

# Achieved FLOP/s per device in a denoising step, by device kind. v6e: compiler
# estimate (0.94 s for a step of 768x1360x81 on eight chips). H200: measured (6.27 s for that step
# on one).
DENOISING_FLOPS = {V6E.device_kind: 3.94e14, "NVIDIA H200": 4.72e14}


class Machine(NamedTuple):
    """A TPU machine: libtpu's topology, and the chips of one host along x, y and z.

    Without the bounds, libtpu models a v6e-8 as two hosts of four chips, which changes the
    executables.
    """

    topology: str
    chips_per_host: tuple[int, int, int]


MACHINES = {
    "v6e-1": Machine("v6e:1x1", (1, 1, 1)),
    "v6e-4": Machine("v6e:2x2", (2, 2, 1)),
    "v6e-8": Machine("v6e:2x4", (2, 4, 1)),
    "v6e-16": Machine("v6e:4x4", (2, 2, 1)),
}
