"""Device meshes: valid (dp, sp, tp) shapes for a model and a batch, and the best one."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from runtime.jax_types import Device

AXES = ("dp", "sp", "tp")


MeshShape = tuple[int, int, int]


def fitting_meshes(batch: int, num_heads: int, num_devices: int) -> list[MeshShape]:
    """Returns valid (dp, sp, tp): dp divides `batch` and sp * tp divides `num_heads`.

    The best shape is first: most devices; then largest dp, which needs no communication inside a
    block; then largest sp, which moves a quarter of tp's bytes.
    """
    meshes = [
        (dp, sp, tp)
        for dp in range(1, min(batch, num_devices) + 1)
        if batch % dp == 0
        for sp in range(1, num_devices // dp + 1)
        for tp in range(1, num_devices // (dp * sp) + 1)
        if num_heads % (sp * tp) == 0
    ]
    return sorted(meshes, key=lambda m: (m[0] * m[1] * m[2], m[0], m[1]), reverse=True)


def choose_mesh(
    dp: int | None,
    sp: int | None,
    tp: int | None,
    *,
    batch: int,
    num_heads: int,
    num_devices: int,
) -> MeshShape:
    """Returns the requested mesh shape; unset sizes take the best value.

    Raises:
        ValueError: no valid mesh matches; the message lists the valid ones.
    """
    asked = (dp, sp, tp)
    fitting = fitting_meshes(batch, num_heads, num_devices)
    for mesh in fitting:
        if all(wish in (None, size) for wish, size in zip(asked, mesh, strict=True)):
            return mesh
    wishes = " ".join(f"--{axis} {n}" for axis, n in zip(AXES, asked, strict=True) if n)
    listed = ", ".join("x".join(map(str, mesh)) for mesh in fitting[:12])
    raise ValueError(
        f"{wishes} does not fit {num_devices} device(s), a batch of {batch} (classifier-free "
        f"guidance included) and {num_heads} heads; dp x sp x tp that fit: {listed}"
    )


def all_devices(dp: int | None, tp: int | None, available: int) -> MeshShape:
    """Returns a (dp, 1, tp) over all `available` devices, for work that any number can share.

    Raises:
        ValueError: the requested sizes need more devices than are available.
    """
    dp = dp or max(1, available // (tp or available))
    tp = tp or max(1, available // dp)
    if dp * tp > available:
        raise ValueError(f"--dp {dp} --tp {tp} needs {dp * tp} devices; there are {available}")
    return dp, 1, tp


def make_mesh(shape: MeshShape, devices: Sequence[Device] | None = None) -> jax.sharding.Mesh:
    """Makes a mesh of the first `devices` in order; by default of all hosts, host by host.

    Raises:
        ValueError: a running process would have no device in the mesh.
    """
    chosen = (jax.devices() if devices is None else devices)[: math.prod(shape)]
    idle = jax.process_count() - len({device.process_index for device in chosen})
    if chosen[0] in jax.devices() and idle:
        raise ValueError(
            f"a mesh of {len(chosen)} devices leaves {idle} of {jax.process_count()} processes "
            "without one; ask for a larger --dp, --sp or --tp, or start fewer processes"
        )
    return jax.sharding.Mesh(np.asarray(chosen).reshape(shape), AXES)


def place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Places a host array on devices; every process has the full array and sends its shards.

    Unlike `jax.device_put`, it does not first compare the processes' arrays over the network.
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def with_sharding(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns the same array under another sharding of its devices or of some; copies nothing.

    Raises:
        ValueError: a device would hold another part of the array.
    """
    before = array.sharding.devices_indices_map(array.shape)
    after = sharding.devices_indices_map(array.shape)
    if any(before.get(device) != index for device, index in after.items()):
        raise ValueError(f"{sharding} gives devices other parts than {array.sharding}")
    shards = [shard.data for shard in array.addressable_shards if shard.device in after]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)
