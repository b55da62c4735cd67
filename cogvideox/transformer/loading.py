"""Loading of the transformer's weights from memory-mapped files into stacked, sharded arrays.

Large parameters are sent layer by layer from the mapped files and stacked on the devices. JAX pins
the host memory that it copies from, at 2 GB/s on an H200's host. Small transfers reuse the pinned
memory.
"""

import collections
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.norms import rotary_halves
from cogvideox.transformer.ofs import FOLDED_INTO, ofs_embedding
from cogvideox.transformer.parameters import BLOCKS, parameter_table, stored_names
from runtime import stopping
from runtime.executables import find_or_compile
from runtime.jax_types import Device
from runtime.programs import Program, machine_fields
from runtime.tensor_files import RowReader, StoredTensor

# Files traced into the stacking programs, relative to the project.
SOURCES = ("cogvideox/transformer/loading.py",)

# Limits on concurrent transfers: layers, and parameters they belong to.
_READERS, _PARAMETERS = 8, 2
# Smaller layers are stacked on the host: a stacking program would cost more than it saves.
STACKED_ON_DEVICES_BYTES = 1 << 20


def _stored_order(tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return tensor[index]


def _rotary_order(head_dim: int, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return rotary_halves(tensor[index], head_dim)


def _gated_order(tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Reads half of a shard's rows from each half of the tensor."""
    start, stop, _ = index[0].indices(tensor.shape[0])
    middle = tensor.shape[0] // 2
    halves = [slice(first + start // 2, first + stop // 2) for first in (0, middle)]
    return np.concatenate([tensor[(rows, *index[1:])] for rows in halves])


def stack_programs(
    config: TransformerConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype
) -> dict[str, Program]:
    """Returns the stacking program of each parameter, by name; equal shapes share a program."""
    surroundings = machine_fields(mesh, (), SOURCES)
    axes = "".join(f"-{axis}{size}" for axis, size in mesh.shape.items())
    programs, shared = {}, {}
    for name, parameter in parameter_table(config).items():
        shape, spec = parameter.shape, parameter.spec
        layer, stacked = shape[1:], name.startswith(BLOCKS)
        if not stacked or math.prod(layer) * dtype.itemsize < STACKED_ON_DEVICES_BYTES:
            continue
        if (shape, spec) not in shared:
            size = "x".join(map(str, layer))
            split = "".join(f"_{axis}{i}" for i, axis in enumerate(spec[1:]) if axis)
            shared[shape, spec] = Program(
                f"stack_{size}{split}",
                f"{shape[0]}{axes}",
                {"layers": shape, "spec": list(spec), "dtype": dtype.name, **surroundings},
                functools.partial(_lower_stack, shape, dtype, mesh, spec),
            )
        programs[name] = shared[shape, spec]
    return programs


def _lower_stack(
    shape: tuple[int, ...], dtype: jnp.dtype, mesh: jax.sharding.Mesh, spec: P
) -> jax.stages.Lowered:
    def stack(*layers: jax.Array) -> jax.Array:
        return jnp.stack(layers)

    layer = jax.ShapeDtypeStruct(shape[1:], dtype, sharding=NamedSharding(mesh, P(*spec[1:])))
    return jax.jit(stack, out_shardings=NamedSharding(mesh, spec)).lower(*[layer] * shape[0])


def load_parameters(
    config: TransformerConfig,
    stored: Mapping[str, StoredTensor],
    mesh: jax.sharding.Mesh,
    dtype: jnp.dtype,
    executables: Path | None = None,
    names: Collection[str] | None = None,
) -> dict[str, jax.Array]:
    """Reads the weights from mapped files directly into their shards.

    Host and devices hold at most two parameters in addition to the model.

    Args:
        executables: folder of executables; it may contain the `stack_programs`.
        names: of the parameters to load; None loads all.

    Returns:
        The stacked parameters by name, sharded as in the table, in `dtype`.
    """
    table = parameter_table(config)
    table = {name: table[name] for name in table if names is None or name in names}
    programs = stack_programs(config, mesh, dtype)
    programs = {name: programs[name] for name in programs if name in table}
    readers_of_rows: dict[str, RowReader] = {
        "stored": _stored_order,
        "rotary": functools.partial(_rotary_order, config.attention_head_dim),
        "gated": _gated_order,
    }
    if config.ofs_embed_dim:
        ofs = ofs_embedding(config, stored)
        readers_of_rows["ofs"] = lambda bias, index: bias[index].astype(np.float32) + ofs[index]
    loaded: dict[str, jax.Array] = {}
    on_the_way: collections.deque[tuple[str, list[Future]]] = collections.deque()
    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as compiler:
        stacks = compiler.submit(_stacks, programs.values(), executables, mesh)

        def finish() -> None:
            name, parts = on_the_way.popleft()
            arrays = [part.result() for part in parts]
            program = programs.get(name)
            loaded[name] = stacks.result()[program.name](*arrays) if program else arrays[0]

        # Largest first: nothing overlaps the last transfer.
        for name in sorted(table, key=lambda name: -math.prod(table[name].shape)):
            parameter = table[name]
            sources = [stored[source] for source in stored_names(name, parameter)]
            folded = config.ofs_embed_dim and name == FOLDED_INTO
            sharding, rows = (
                NamedSharding(mesh, parameter.spec),
                readers_of_rows["ofs" if folded else parameter.row_order],
            )
            if name in programs:
                sharding = NamedSharding(mesh, P(*parameter.spec[1:]))
                alone = [[source] for source in sources]
                read = functools.partial(_load, stacked=False, kept=False)
            else:
                alone = [sources]
                read = functools.partial(_load, stacked=name.startswith(BLOCKS), kept=True)
            parts = [readers.submit(read, layers, sharding, dtype, rows) for layers in alone]
            on_the_way.append((name, parts))
            if len(on_the_way) == _PARAMETERS:
                finish()
        while on_the_way:
            finish()
    return {name: loaded[name] for name in table}


def _stacks(
    programs: Iterable[Program], executables: Path | None, mesh: jax.sharding.Mesh
) -> dict[str, Callable]:
    """Returns the executables of `programs` by name."""
    different = {program.name: program for program in programs}
    found = find_or_compile(
        list(different.values()),
        executables,
        devices=list(mesh.devices.flat),
        threads=max(1, len(different)),
    )
    return dict(zip(different, found, strict=True))


def _load(
    layers: list[StoredTensor],
    sharding: NamedSharding,
    dtype: jnp.dtype,
    read_rows: RowReader,
    *,
    stacked: bool,
    kept: bool,
) -> jax.Array:
    """Reads one tensor, or several along a leading axis, and waits for the transfer.

    On CPUs the result may alias the mapped file unless `kept`.
    """
    stopping.check()
    shape = (len(layers), *layers[0].shape) if stacked else layers[0].shape
    holders: dict[tuple, list[Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # None only for shardings of unknown size
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    placed = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        if stacked:
            shard = np.stack([layer.part(index[1:], read_rows) for layer in layers])
        else:
            shard = layers[0].part(index, read_rows)
        shard = np.array(shard, dtype) if kept else np.ascontiguousarray(shard, dtype)
        placed += [jax.device_put(shard, device) for device in devices]
    array = jax.make_array_from_single_device_arrays(shape, sharding, placed)
    return array.block_until_ready()
