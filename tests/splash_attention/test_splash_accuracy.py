"""The kernel in TPU interpret mode against float64 softmax: lengths, head sizes, layouts, windows.

Tolerances: bfloat16 rounds q once more and p once, 2^-9 each, and leaves 3e-3 of unit normal
inputs; float32 leaves roundings of sums, under 1e-6.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attention import (
    BlockSizes,
    query_scale,
    sequence_minor_attention,
    splash_attention,
)
from splash_attention.reference import reference_attention
from tests.splash_attention.softmax import attend, relative_error

TOLERANCE = {"bfloat16": 4e-3, "float32": 2e-6}


def normal(shape, dtype="float32", seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def natural(q, k, v, scale=None, window=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q = q * query_scale(q.shape[-1], scale)
    return attend(q.swapaxes(-1, -2), k, v.swapaxes(-1, -2), window).swapaxes(-1, -2)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "dtype"),
    [
        (1, 1000, "bfloat16"),
        (127, 1, "bfloat16"),
        (226, 4097, "bfloat16"),
        (4097, 127, "bfloat16"),
        (1, 127, "float32"),
        (226, 1000, "float32"),
        (1000, 226, "float32"),
    ],
)
def test_lengths(q_len, kv_len, dtype):
    q = normal((2, q_len, 64), dtype, 0)
    k, v = (normal((2, kv_len, 64), dtype, seed) for seed in (1, 2))
    out = splash_attention(q, k, v, interpret=True)
    assert out.dtype == q.dtype
    assert relative_error(out, natural(q, k, v)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [8, 80, 128, 192, 256])
def test_head_sizes(head_dim):
    q, k, v = (normal((1, 140, head_dim), "bfloat16", seed) for seed in range(3))
    out = splash_attention(q, k, v, interpret=True)
    assert relative_error(out, natural(q, k, v)) <= TOLERANCE["bfloat16"]


def test_leading_axes_and_scale():
    q, k, v = (normal((2, 3, 40, 64), seed=seed) for seed in range(3))
    out = splash_attention(q, k, v, scale=0.3, interpret=True)
    assert relative_error(out, natural(q, k, v, 0.3)) <= TOLERANCE["float32"]
    alone = splash_attention(q[1, 2], k[1, 2], v[1, 2], scale=0.3, interpret=True)
    np.testing.assert_array_equal(alone, out[1, 2])


@pytest.mark.parametrize(
    ("heads", "head_dim"), [(4, 64), (3, 64), (2, 128), (4, 16), (3, 32)], ids=str
)
def test_keys_side_by_side(heads, head_dim):
    """They give what natural keys give, to the bit, also where they are transposed first."""
    q, k, v = (normal((2, heads, 100, head_dim), "bfloat16", seed) for seed in range(3))
    q, v = q.swapaxes(2, 3), v.swapaxes(2, 3)
    beside = k.swapaxes(1, 2).reshape(2, 100, heads * head_dim)
    expected = sequence_minor_attention(q / 8, k, v, interpret=True)
    assert relative_error(expected, attend(q / 8, k, v)) <= TOLERANCE["bfloat16"]
    np.testing.assert_array_equal(
        sequence_minor_attention(q / 8, beside, v, interpret=True), expected
    )


# Keys: two blocks of two bodies. At 20 whole chunks lie outside, at 0 only the diagonal counts.
@pytest.mark.parametrize("factor", [1.0, 60.0], ids=["bounded", "online"])
@pytest.mark.parametrize("window", [0, 20, 300])
def test_window(window, factor):
    q, k, v = (normal((1, 500, 64), seed=seed) for seed in range(3))
    # Whole numbers make every score exact.
    q, k = jnp.round(q), jnp.round(k) * factor
    sizes = BlockSizes(block_q=128, block_kv=256, chunk=128, unroll=1)
    q, v = q.swapaxes(1, 2), v.swapaxes(1, 2)
    out = sequence_minor_attention(q, k, v, window_size=window, block_sizes=sizes, interpret=True)
    assert relative_error(out, attend(q, k, v, window)) <= TOLERANCE["float32"]


def test_a_window_over_everything_is_none():
    q, k, v = (normal((1, 100, 64), "bfloat16", seed) for seed in range(3))
    np.testing.assert_array_equal(
        splash_attention(q, k, v, window_size=2**40, interpret=True),
        splash_attention(q, k, v, interpret=True),
    )


def test_reference_in_blocks_of_queries(monkeypatch):
    """More scores than are held at once: the last block overlaps the one before."""
    q, k, v = (normal((2, 37, 16), seed=seed) for seed in range(3))
    monkeypatch.setattr("splash_attention.reference._MAX_SCORES", 2 * 37 * 10)
    for window in (None, 4):
        out = reference_attention(q, k, v, window_size=window)
        assert relative_error(out, natural(q, k, v, window=window)) <= TOLERANCE["float32"]
