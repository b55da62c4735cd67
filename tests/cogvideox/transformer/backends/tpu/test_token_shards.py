"""The kernels around the all-to-alls, in interpret mode, equal what other backends run.

float32; 2e-6 of the largest number is a few roundings of the norm's sums over 64 rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox.transformer import norms
from cogvideox.transformer.backends.tpu.token_shards import (
    join_values,
    norm_and_rotate,
    part_tokens,
)

HEAD_DIM = 64


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 128, 128), (1, 3, 192, 1408), (1, 1, 256, 1408)],
    ids=["short", "more than a chunk", "one shard"],
)
def test_layout_kernels(shape, rotated):
    batch, shards, rows, tokens = shape
    x, weight, bias, *tables = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 5),
            [shape, (HEAD_DIM,), (HEAD_DIM,), *[(HEAD_DIM // 2, shards * tokens)] * 2],
            strict=True,
        )
    )
    rotary = tuple(tables) if rotated else None
    q = norm_and_rotate(x, weight, bias, rotary, interpret=True)
    k = norm_and_rotate(x, weight, bias, rotary, transposed=True, interpret=True)
    joined = jnp.swapaxes(x, 2, 3).reshape(batch, -1, rows)
    expected = norms.norm_and_rotate(joined, weight, bias, rotary)
    tolerance = 2e-6 * float(jnp.abs(expected).max())
    np.testing.assert_allclose(q, jnp.swapaxes(expected, 1, 2), rtol=0, atol=tolerance)
    np.testing.assert_allclose(k, expected, rtol=0, atol=tolerance)

    if shards == 1:
        return  # nothing to join
    v, largest = join_values(x, interpret=True)
    np.testing.assert_array_equal(v, jnp.swapaxes(joined, 1, 2))
    np.testing.assert_array_equal(largest, jnp.abs(joined).max(1))
    np.testing.assert_array_equal(part_tokens(v, shards, interpret=True), x)
