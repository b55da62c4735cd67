"""Devices of TPU machines that need not be there: libtpu holds the whole compiler."""

import importlib.util
import os

import jax
import numpy as np

from runtime.chips import MACHINES, Chip
from runtime.jax_types import Device


def machine_devices(name: str) -> np.ndarray:
    """The devices of a machine of `runtime.chips.MACHINES`, for a mesh to compile with.

    Call it before anything else touches JAX: libtpu reads its environment once.

    Raises:
        ValueError: unknown machine, or libtpu is not installed.
    """
    if name not in MACHINES:
        raise ValueError(f"unknown machine {name!r}; known: {', '.join(MACHINES)}")
    machine = MACHINES[name]
    return _devices(machine.topology, name, machine.chips_per_host)


def chip_device(chip: Chip) -> Device:
    """One chip to compile for, like `machine_devices`."""
    return _devices(chip.topology, chip.accelerator_type, (1, 1, 1)).flat[0]


def _devices(
    topology: str, accelerator_type: str, chips_per_host: tuple[int, int, int]
) -> np.ndarray:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for a TPU that is not here needs libtpu, which exists for Linux: "
            "make setup ACCELERATOR=tpu"
        )
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        # Several processes may then compile at once.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        topology, platform="tpu", chips_per_host_bounds=chips_per_host
    )
    return np.asarray(description.devices)
