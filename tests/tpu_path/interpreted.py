"""Put the TPU backend and layers, interpreted, where a stage chooses its own."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

import cogvideox.transformer.attention as attention
import cogvideox.vae.decode as decode
from cogvideox.transformer.attention import AttentionKernel
from cogvideox.transformer.modulated_norm import norm_and_modulate_tpu
from cogvideox.transformer.tpu.token_shards import (
    join_values_tpu,
    norm_and_rotate_tpu,
    part_tokens_tpu,
)
from cogvideox.vae.tpu.layers import ColumnLayers
from splash_attention.block_sizes import chip_named, choose_block_sizes


def pack_elementwise(xs: list[jax.Array], *, packed_dtype: jnp.dtype) -> jax.Array:
    """`pltpu.pack_elementwise` of float32 to bfloat16, which has no rule on a CPU.

    The first array takes the low half of each 32-bit word, the second the high half.
    """
    low, high = (
        jax.lax.bitcast_convert_type(x.astype(packed_dtype), jnp.uint16).astype(jnp.uint32)
        for x in xs
    )
    return low | (high << 16)


def _tpu_kernel() -> AttentionKernel:
    def sizes(head_dim: int, queries: int, keys: int, dtype: str) -> dict[str, int]:
        chip = chip_named("v6e")
        return dataclasses.asdict(
            choose_block_sizes(chip, head_dim, queries, keys, jnp.dtype(dtype))
        )

    on = functools.partial
    return dataclasses.replace(
        attention.KERNELS["splash"],
        attend=on(attention._splash, interpret=True),
        norm_and_modulate=on(norm_and_modulate_tpu, interpret=True),
        queries=on(norm_and_rotate_tpu, interpret=True),
        keys=on(norm_and_rotate_tpu, transposed=True, interpret=True),
        block_sizes=sizes,
    )


@contextlib.contextmanager
def tpu_path() -> Iterator[None]:
    """Inside, a stage runs with the TPU code path, interpreted."""
    kernel = _tpu_kernel()
    with contextlib.ExitStack() as stack:

        def patch(target: object, name: str, value: object) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        patch(pltpu, "pack_elementwise", pack_elementwise)
        patch(attention, "join_values_tpu", functools.partial(join_values_tpu, interpret=True))
        patch(attention, "part_tokens_tpu", functools.partial(part_tokens_tpu, interpret=True))
        patch(attention, "choose_attention", lambda *_: kernel)
        patch(
            decode.Decoder,
            "_layers",
            lambda self, shards: ColumnLayers(shards, self.config.norm_num_groups, interpret=True),
        )
        yield
