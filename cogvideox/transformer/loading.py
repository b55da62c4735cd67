"""The transformer's weights from mapped files into their shards, the layers of a block stacked.

Large parameters travel layer by layer, straight from the mapped files, and are stacked on the
devices: JAX pins host memory to copy from, at 2 GB/s on the host of an H200, so it should need
little of it and use that again.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cogvideox.model.config import TransformerConfig
from cogvideox.model.folder import StoredTensor
from cogvideox.transformer.block import GATED
from cogvideox.transformer.parameters import parameter_shapes, stack_shapes
from cogvideox.transformer.qk_norm import rotary_halves
from cogvideox.transformer.sharding import parameter_specs
from runtime import stopping
from runtime.executables import find_or_compile
from runtime.programs import Program, machine_fields

# The rows of these are reordered: each shard needs both halves of its gates, and rotary pairs lie
# half a head apart (see cogvideox/transformer/block.py).
# What is traced into the stacking programs, relative to the project.
SOURCES = ("cogvideox/transformer/loading.py",)

_GATED = re.compile(r"transformer_blocks\.ff\.net\.0\.proj\.(weight|bias)")
_ROTATED = re.compile(r"transformer_blocks\.attn1\.(to_q|to_k|norm_q|norm_k)\.(weight|bias)")
# Layers on their way at once, and the parameters that they may belong to.
_READERS, _PARAMETERS = 8, 2
# Layers of less travel stacked: a program to stack each would cost more than it saves.
STACKED_ON_DEVICES_BYTES = 1 << 20

# A part of a stored tensor, its rows in the order that the block wants.
RowOrder = Callable[[np.ndarray, tuple[slice, ...]], np.ndarray]


def _in_order(tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return tensor[index]


def _rotary_order(head_dim: int, tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return rotary_halves(tensor[index], head_dim)


def _gated_order(tensor: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Of a shard's rows, one half from each half of the tensor."""
    start, stop, _ = index[0].indices(tensor.shape[0])
    middle = tensor.shape[0] // 2
    halves = [slice(first + start // 2, first + stop // 2) for first in (0, middle)]
    return np.concatenate([tensor[(rows, *index[1:])] for rows in halves])


def stack_programs(
    config: TransformerConfig, mesh: jax.sharding.Mesh, dtype: jnp.dtype
) -> dict[str, Program]:
    """By parameter, the program that stacks its layers; those of one shape and place share one."""
    shapes = stack_shapes(parameter_shapes(config), config.num_layers)
    specs = parameter_specs(shapes)
    surroundings = machine_fields(mesh, (), SOURCES)
    axes = "".join(f"-{axis}{size}" for axis, size in mesh.shape.items())
    programs, shared = {}, {}
    for name, shape in shapes.items():
        layer, spec = shape[1:], specs[name]
        stacked = name.startswith("transformer_blocks.")
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
) -> dict[str, jax.Array]:
    """Reads the weights from mapped files straight into their shards.

    Neither the host nor a device ever holds more than a parameter or two beside the model's own.

    Args:
        executables: folder of artifacts, which may hold the `stack_programs`.

    Returns:
        The stacked parameters by name, placed as the sharding table says, in `dtype`.
    """
    shapes = stack_shapes(parameter_shapes(config), config.num_layers)
    specs = parameter_specs(shapes)
    programs = stack_programs(config, mesh, dtype)

    def order(name: str) -> RowOrder:
        if _ROTATED.fullmatch(name):
            return functools.partial(_rotary_order, config.attention_head_dim)
        if _GATED.fullmatch(name) and config.activation_fn in GATED:
            return _gated_order
        return _in_order

    loaded: dict[str, jax.Array] = {}
    on_the_way: collections.deque[tuple[str, list[Future]]] = collections.deque()
    with ThreadPoolExecutor(_READERS) as readers, ThreadPoolExecutor(1) as compiler:
        stacks = compiler.submit(_stacks, programs.values(), executables, mesh)

        def finish() -> None:
            name, parts = on_the_way.popleft()
            arrays = [part.result() for part in parts]
            program = programs.get(name)
            loaded[name] = stacks.result()[program.name](*arrays) if program else arrays[0]

        # The largest first: the last transfer is the one that nothing hides.
        for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
            sources, sharding = _sources(name, stored), NamedSharding(mesh, specs[name])
            if name in programs:
                sharding = NamedSharding(mesh, P(*specs[name][1:]))
                alone = [[source] for source in sources]
                read = functools.partial(_load, stacked=False, kept=False)
            else:
                alone = [sources]
                read = functools.partial(_load, stacked=name not in stored, kept=True)
            parts = [readers.submit(read, layers, sharding, dtype, order(name)) for layers in alone]
            on_the_way.append((name, parts))
            if len(on_the_way) == _PARAMETERS:
                finish()
        while on_the_way:
            finish()
    return {name: loaded[name] for name in shapes}


def _stacks(
    programs: Iterable[Program], executables: Path | None, mesh: jax.sharding.Mesh
) -> dict[str, Callable]:
    """The executables of `programs` by name."""
    different = {program.name: program for program in programs}
    found = find_or_compile(
        list(different.values()),
        executables,
        devices=list(mesh.devices.flat),
        threads=max(1, len(different)),
    )
    return dict(zip(different, found, strict=True))


def _sources(name: str, stored: Mapping[str, StoredTensor]) -> list[StoredTensor]:
    """The stored tensor of a parameter, or those of all its layers in order."""
    if name in stored:
        return [stored[name]]
    prefix, rest = name.split(".", 1)
    layers = []
    while (layer := stored.get(f"{prefix}.{len(layers)}.{rest}")) is not None:
        layers.append(layer)
    return layers


def _load(
    layers: list[StoredTensor],
    sharding: NamedSharding,
    dtype: jnp.dtype,
    order: RowOrder,
    *,
    stacked: bool,
    kept: bool,
) -> jax.Array:
    """Reads a tensor, or several as one with a leading axis, and waits until devices have it.

    What is not `kept` may lie in the mapped file, on CPUs.
    """
    stopping.check()
    shape = (len(layers), *layers[0].shape) if stacked else layers[0].shape
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        holders.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    placed = []
    for bounds, devices in holders.items():
        index = tuple(slice(*bound) for bound in bounds)
        if stacked:
            shard = np.stack([order(layer.mapped(), index[1:]) for layer in layers])
        else:
            shard = order(layers[0].mapped(), index)
        shard = np.array(shard, dtype) if kept else np.ascontiguousarray(shard, dtype)
        placed += [jax.device_put(shard, device) for device in devices]
    array = jax.make_array_from_single_device_arrays(shape, sharding, placed)
    return array.block_until_ready()
