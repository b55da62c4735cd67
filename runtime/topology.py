"""TPU machines by name, to compile for where there is none: libtpu holds the whole compiler."""

import dataclasses
import os

import jax
import numpy as np

# Machine: libtpu's topology, and the chips of one host along x, y and z. Without the bounds libtpu
# models a v6e-8 as two hosts of four chips, which gives other executables.
MACHINES = {
    "v6e-1": ("v6e:1x1", (1, 1, 1)),
    "v6e-4": ("v6e:2x2", (2, 2, 1)),
    "v6e-8": ("v6e:2x4", (2, 4, 1)),
    "v6e-16": ("v6e:4x4", (2, 2, 1)),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip offers, by its datasheet but for the memory, which is the compiler's figure."""

    hbm_bytes: int
    clock_hz: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # to all neighbours together


CHIPS = {"TPU v6 lite": Chip(int(31.25 * 2**30), 1.75e9, 1640e9, 448e9)}


def machine_devices(name: str) -> np.ndarray:
    """The devices of a machine that need not be there, for a mesh to compile with.

    Call it before anything else touches JAX: libtpu reads its environment once.

    Raises:
        ValueError: an unknown machine.
    """
    if name not in MACHINES:
        raise ValueError(f"unknown machine {name!r}; known: {', '.join(MACHINES)}")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": name,
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Several processes may then compile at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    topology, bounds = MACHINES[name]
    description = topologies.get_topology_desc(
        topology, platform="tpu", chips_per_host_bounds=bounds
    )
    return np.asarray(description.devices)
