"""The TPU's backend, interpreted, equals the CPU's on one device and over shards, in float32.

2e-6 is the attention kernel's own bound for float32, a few roundings of sums over hundreds of keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cogvideox.transformer.backends import Backend, CpuBackend, TpuBackend
from cogvideox.transformer.backends.base import Bounds
from cogvideox.transformer.precision import Precision
from splash_attention import query_scale
from tests.splash_attention.rounding import exp2_as_on_a_tpu

HEAD_DIM, TOKENS, KEYS = 64, 384, 301
TPU = TpuBackend(interpret=True)


@pytest.mark.parametrize("chip", [None, "v5e"])
@pytest.mark.parametrize(("heads", "poison"), [(1, np.nan), (2, np.inf), (4, np.nan)])
def test_attention_equals_the_reference(heads, poison, chip):
    rng = np.random.default_rng(heads)
    q, k, v = rng.normal(size=(3, 2, heads * HEAD_DIM, TOKENS)).astype(np.float32)
    k = np.swapaxes(k, 1, 2)
    padded_k, padded_v = k.copy(), v.copy()
    padded_k[:, KEYS:] = poison
    padded_v[..., KEYS:] = poison
    scaled = jnp.asarray(q * np.float32(query_scale(HEAD_DIM)))

    # Loose enough for any of these inputs; a kernel told 1e6 must take the other path.
    for largest_score in (np.float32(100), np.float32(1e6)):
        bounds = Bounds(jnp.asarray(largest_score), jnp.abs(v).max(-1))
        backend = TpuBackend(interpret=True, chip=chip)
        got = backend.attend(
            scaled, *map(jnp.asarray, (padded_k, padded_v)), HEAD_DIM, KEYS, bounds
        )
        tokens_first = (jnp.asarray(x) for x in (np.swapaxes(q, 1, 2), k, np.swapaxes(v, 1, 2)))
        expected = CpuBackend().attend(*tokens_first, HEAD_DIM, KEYS, bounds)
        expected = np.swapaxes(expected, 1, 2)
        assert got.shape == q.shape
        assert np.linalg.norm(got - expected) <= 2e-6 * np.linalg.norm(expected)


def test_the_largest_channel_bounds_a_heads_values():
    """Scores of 90 powers of two times values of 1e20 overflow unless the kernel subtracts."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, HEAD_DIM, TOKENS)).astype(np.float32)
    v[:, 3] *= 1e20
    q *= 90 / np.abs(np.einsum("bcq,bck->bqk", q, k)).max()  # in powers of two: see query_scale
    bounds = Bounds(jnp.float32(91), jnp.abs(v).max(-1))
    k = np.swapaxes(k, 1, 2)
    got = TPU.attend(*map(jnp.asarray, (q, k, v)), HEAD_DIM, TOKENS, bounds)
    tokens_first = (np.swapaxes(q / query_scale(HEAD_DIM), 1, 2), k, np.swapaxes(v, 1, 2))
    expected = CpuBackend().attend(*map(jnp.asarray, tokens_first), HEAD_DIM, TOKENS, bounds)
    expected = np.swapaxes(expected, 1, 2)
    # The scores reach 90 here, so float32 scores have 1e-5 of error.
    np.testing.assert_allclose(
        got / np.abs(v).max(-1, keepdims=True),
        expected / np.abs(v).max(-1, keepdims=True),
        rtol=0,
        atol=1e-4,
    )


def test_block_sizes_are_those_of_the_chip():
    for chip in ("v5e", "v6e"):
        sizes = TpuBackend(chip=chip).block_sizes(HEAD_DIM, 45_568, 45_106, "bfloat16")
        assert sizes and all(isinstance(size, int) for size in sizes.values())
    assert TPU.block_sizes(HEAD_DIM, 45_568, 45_106, "bfloat16") == sizes


@pytest.mark.parametrize("shards", [1, 2])
def test_bounds_on_values_are_the_largest_magnitudes(shards):
    """Kernels skip overflow checks by them: one number too small is wrong."""
    x = jax.random.normal(jax.random.key(3), (2, shards, 128, 256))
    x = x.at[:, :, :, 7].mul(50)  # one token is far larger than the rest
    joined, largest = TPU.values(x)
    expected = jnp.swapaxes(x, 1, 2).reshape(2, 128, -1)
    np.testing.assert_array_equal(joined, expected)
    np.testing.assert_array_equal(largest, jnp.abs(expected).max(-1))
    assert largest.min() > 0.5


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_output_tokens_go_to_their_shards(shards):
    """`project_out` returns each device the tokens that it holds, of all heads."""
    rng = np.random.default_rng(shards)
    out = jnp.asarray(rng.normal(size=(2, 128 * shards, 192)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(96, 192)), jnp.float32)
    got = _over(
        shards,
        lambda out, weight: TPU.project_out(jnp.swapaxes(out, 1, 2), weight),
        (out, weight),
        (P(None, None, "sp"), P()),
    )
    # Sums over 192 products of numbers of magnitude one.
    np.testing.assert_allclose(got, out @ weight.T, rtol=0, atol=1e-4)


# In bf16 the scores reach 100, so float32 scores have 1e-5 of error. In int8 they are smaller, and
# the last bit of a norm moves a few numbers to the next step; without int8 the error is 6e-3.
@pytest.mark.parametrize(
    ("shards", "precision", "size", "tolerance"),
    [(shards, "bf16", 1.0, 2e-5) for shards in (1, 2, 4)] + [(2, "int8_qk", 0.3, 5e-4)],
)
def test_attention_of_a_block_equals_the_cpus(shards, precision, size, tolerance):
    """From modulated tokens to projected output, with rotary tables, biases and padding."""
    tokens, heads, width, keys = 128 * shards, 4, 96, 128 * shards - 37
    rows = heads * HEAD_DIM
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    arguments = (
        normal(2, tokens, width),
        [normal(rows, width) / width**0.5 for _ in range(3)],
        [normal(rows) for _ in range(3)],
        [normal(HEAD_DIM) * size for _ in range(4)],
        (normal(HEAD_DIM // 2, tokens), normal(HEAD_DIM // 2, tokens)),
        normal(width, rows) / rows**0.5,
    )

    def attention(backend: Backend):
        def run(x, weights, biases, norms, rotary, out_weight):
            scale = backend.query_scale(HEAD_DIM)
            x = jnp.swapaxes(x, 1, 2)
            q, k, v = (backend.project(x, w, b) for w, b in zip(weights, biases, strict=True))
            norm_q = norms[0] * scale, norms[1] * scale
            q, k = backend.queries_and_keys(q, k, norm_q, norms[2:], rotary, keys)
            v, largest = backend.values(v)
            bounds = Bounds(jnp.float32(1e6 if precision == "bf16" else 40), largest)
            out = backend.attend(q, k, v, HEAD_DIM, keys, bounds)
            return backend.project_out(out, out_weight)

        return _over(shards, run, arguments, (P(None, "sp", None), P(), P(), P(), P(), P()))

    how = Precision(precision)
    expected = attention(CpuBackend(how))
    with exp2_as_on_a_tpu():
        difference = np.linalg.norm(attention(TpuBackend(how, interpret=True)) - expected)
    assert difference <= tolerance * np.linalg.norm(expected)
    if precision != "bf16":
        assert np.linalg.norm(attention(CpuBackend()) - expected) > 5 * difference


def _over(shards, function, arguments, in_specs):
    """Runs `function` on `shards` devices along sp; the result's tokens are split over them."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:shards]), ("sp",))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=P(None, "sp", None), check_vma=False
    )
    return jax.jit(mapped)(*arguments)
