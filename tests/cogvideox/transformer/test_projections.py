"""Projections that exchange heads and tokens equal those of the whole sequence, in float32.

1e-4 is rounding of sums over 96 and 192 numbers of magnitude one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cogvideox.transformer import projections

BATCH, TOKENS, WIDTH, ROWS = 2, 48, 96, 192
TOKENS_OF_SHARDS, HEADS_OF_SHARDS = P(None, "sp", None), P(None, None, "sp")


def over(shards, function, arguments, in_specs, out_spec):
    """`function` on `shards` devices along sp."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:shards]), ("sp",))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False
    )
    return jax.jit(mapped)(*arguments)


def random(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_projection(shards, biased):
    x, weight, bias = random((BATCH, TOKENS, WIDTH), (ROWS, WIDTH), (ROWS,))
    expected = x @ weight.T + (bias if biased else 0)

    def project(x, weight, bias):
        out = projections.project(jnp.swapaxes(x, 1, 2), weight, bias if biased else None)
        return projections.in_order(out)

    specs = (TOKENS_OF_SHARDS, P(), P())
    out = over(shards, project, (x, weight, bias), specs, HEADS_OF_SHARDS)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_projection_of_the_output(shards):
    x, weight = random((BATCH, TOKENS, ROWS), (WIDTH, ROWS))

    def project_out(x, weight):
        return projections.project_out(projections.own_first(x), weight)

    out = over(shards, project_out, (x, weight), (HEADS_OF_SHARDS, P()), TOKENS_OF_SHARDS)
    np.testing.assert_allclose(out, x @ weight.T, rtol=0, atol=1e-4)
