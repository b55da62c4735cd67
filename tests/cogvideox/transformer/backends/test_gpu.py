"""The part of the GPU's attention that runs anywhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cogvideox.transformer.backends import CpuBackend, HopperBackend, gpu
from cogvideox.transformer.backends.base import Bounds, Listed
from cogvideox.transformer.backends.gpu import add_keys
from splash_attention import BlockLists, reference_attention


def test_keys_added_outside_the_kernel():
    """Attention over all keys equals that over some, extended; values reach 10, in float32."""
    shapes = {"q": 37, "k": 301, "v": 301}
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        3 * jax.random.normal(key, (2, n, 4, 64))
        for key, n in zip(keys, shapes.values(), strict=True)
    )
    attend = jax.nn.dot_product_attention
    out, log_total = attend(q, k[:, :256], v[:, :256], return_residual=True)
    np.testing.assert_allclose(
        add_keys(out, log_total, q, k[:, 256:], v[:, 256:]), attend(q, k, v), rtol=0, atol=2e-5
    )
    assert jnp.abs(out - attend(q, k, v)).max() > 0.1  # the further keys matter


def test_lists_are_of_queries_in_order(monkeypatch):
    """Each of four devices along sp has the queries of its own tokens first, as on the CPU."""

    def kernel(q, k, v, *, factor, block_lists, rule, largest_score, largest_value):
        assert largest_score.shape == largest_value.shape == (2, 2)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        scale = factor * math.log(2)
        out = reference_attention(q, k, v, scale=scale, block_lists=block_lists, rule=rule)
        return out.swapaxes(1, 2), None

    monkeypatch.setattr(gpu, "hopper_attention", kernel)
    lists = BlockLists.from_lists(
        [[[0], [1]], [[1], [0, 1]]], block_q=128, chunk=128, valid=[128, 100]
    )
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 256, 2 * 64)) for i in range(3))
    listed = Listed(lists, jnp.array([0, 1]))
    mesh = jax.make_mesh((4,), ("sp",))
    found = []
    for backend in (CpuBackend(), HopperBackend()):

        def attend(q, k, v, backend=backend):
            bounds = Bounds(jnp.float32(40), jnp.abs(v).max(1))
            return backend.attend(q * backend.query_scale(64), k, v, 64, listed, bounds)

        whole = jax.shard_map(
            attend, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("sp"), check_vma=False
        )
        found.append(jax.jit(whole)(q, k, v))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-6)
