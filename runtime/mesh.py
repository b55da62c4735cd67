"""Devices to mesh: which (dp, tp) shapes a model and a batch allow, and the best of them."""

from collections.abc import Sequence

import jax
import numpy as np

AXES = ("dp", "tp")


def fitting_meshes(batch: int, num_heads: int, num_devices: int) -> list[tuple[int, int]]:
    """Every (dp, tp) whose dp divides `batch`, whose tp divides `num_heads`, and that fits.

    The best comes first: most devices, then most data parallelism, because splitting the
    batch needs no communication inside a block.
    """
    meshes = [
        (dp, tp)
        for dp in range(1, min(batch, num_devices) + 1)
        if batch % dp == 0
        for tp in range(1, num_devices // dp + 1)
        if num_heads % tp == 0
    ]
    return sorted(meshes, key=lambda mesh: (mesh[0] * mesh[1], mesh[0]), reverse=True)


def choose_mesh(
    dp: int | None, tp: int | None, *, batch: int, num_heads: int, num_devices: int
) -> tuple[int, int]:
    """The mesh asked for, or the best one for the sizes left open.

    Raises:
        ValueError: no such mesh fits; the message lists those that do.
    """
    fitting = fitting_meshes(batch, num_heads, num_devices)
    chosen = [m for m in fitting if dp in (None, m[0]) and tp in (None, m[1])]
    if chosen:
        return chosen[0]
    asked = ", ".join(f"--{axis} {size}" for axis, size in zip(AXES, (dp, tp), strict=True) if size)
    listed = ", ".join(f"{d}x{t}" for d, t in fitting)
    raise ValueError(
        f"{asked} does not fit {num_devices} device(s), a batch of {batch} (classifier-free "
        f"guidance included) and {num_heads} heads; dp x tp that fit: {listed}"
    )


def all_devices(dp: int | None, tp: int | None) -> tuple[int, int]:
    """A (dp, tp) over all devices, for work that any number of them can share.

    Raises:
        ValueError: the sizes asked for need more devices than there are.
    """
    available = jax.device_count()
    dp = dp or max(1, available // (tp or available))
    tp = tp or max(1, available // dp)
    if dp * tp > available:
        raise ValueError(f"--dp {dp} --tp {tp} needs {dp * tp} devices; there are {available}")
    return dp, tp


def make_mesh(shape: Sequence[int], axes: Sequence[str] = AXES) -> jax.sharding.Mesh:
    """A mesh of the first prod(shape) devices, in the order the backend gives them."""
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.sharding.Mesh(np.asarray(devices).reshape(shape), tuple(axes))
