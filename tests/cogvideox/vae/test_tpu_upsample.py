"""The upsampling kernel in bfloat16, interpreted on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from cogvideox.vae.tpu.upsample import interleave_rows, upsample

INTERPRETERS = [True, pltpu.InterpretParams()]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_even_rows_come_first(dtype):
    even, odd = (jnp.arange(start, 32, 2.0).reshape(8, 2) for start in (0, 1))
    rows = interleave_rows(even, odd, jnp.dtype(dtype), interpret=True)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows[0::2].astype(jnp.float32), even)
    np.testing.assert_array_equal(rows[1::2].astype(jnp.float32), odd)


@pytest.mark.parametrize("interpret", INTERPRETERS, ids=["pallas", "tpu"])
def test_bfloat16_rows_are_those_of_float32(interpret):
    """bfloat16 rounds the result once, to 8 bits; operands are equal, sums are float32."""
    random = np.random.default_rng(0)
    channels, frames, columns, height = 128, 2, 2, 8

    def array(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    x = array(1, frames, columns, height, channels)
    left, right = (array(1, frames, 1, height, channels) for _ in range(2))
    weight = array(2, 2 * channels, 4 * channels) / 16
    operands = (x, left, right, weight, array(channels))

    def run(dtype):
        cast = (operand.astype(dtype) for operand in operands)
        return upsample(*cast, jnp.int32(columns), 2 * frames, interpret=interpret)

    (found, found_sums), (expected, expected_sums) = (
        jax.jit(run, static_argnums=0)(dtype) for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert found.dtype == jnp.bfloat16 and found.shape == expected.shape
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-4)
    np.testing.assert_allclose(found_sums, expected_sums, rtol=1e-4, atol=1e-2)
