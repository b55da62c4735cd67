"""The Hopper kernel's numbers. They need a Hopper GPU:

JAX_PLATFORMS=cuda python -m pytest tests/splash_attention/test_hopper.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from cogvideox.transformer.backends import GpuBackend, HopperBackend
from cogvideox.transformer.backends.base import Bounds
from splash_attention import hopper_attention, query_scale, reference_attention, splash_attention
from splash_attention.hopper.attention import largest_scores, runs_on_hopper
from tests.splash_attention.softmax import attend, relative_error
from tests.splash_attention.test_splash_robustness import ADVERSARIAL

pytestmark = pytest.mark.skipif(
    not runs_on_hopper(), reason="needs a GPU of compute capability 9.0 and JAX_PLATFORMS=cuda"
)
# Weights and output are rounded to 2^-9 and 2^-12.
ERRORS = {"bfloat16": 4e-3, "float16": 6e-4}
# The denominators are sums of weights rounded to 8 and 11 bits, in powers of two.
LOG_TOTALS = {"bfloat16": 2**-8 * np.log2(np.e), "float16": 2**-11 * np.log2(np.e)}


def normals(*shape, dtype="bfloat16", deviation=1.0, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(rng.normal(size=shape) * deviation, dtype)


def exact(q, k, v):
    """Attention of [B, S, N, D], scores in powers of two: output, log2 of the denominators."""
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    out = attend(q.swapaxes(-1, -2), k, v.swapaxes(-1, -2)).swapaxes(-1, -2)
    scores = q @ k.swapaxes(-1, -2)
    highest = scores.max(-1, keepdims=True)
    log_total = highest[..., 0] + np.log2(np.exp2(scores - highest).sum(-1))
    return out.swapaxes(1, 2), log_total


def forced(path, q):
    """Bounds that make every head take a path."""
    heads = (q.shape[0], q.shape[2])
    bound = {"bounded": 10.0, "online": np.inf}[path]
    return {
        "largest_score": jnp.full(heads, bound, jnp.float32),
        "largest_value": jnp.ones(heads, jnp.float32),
    }


@pytest.mark.parametrize("path", ["bounded", "online"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "kv_len", "heads", "head_dim"),
    [
        (1, 256, 256, 256, 2, 64),
        (2, 1000, 1128, 1123, 3, 64),
        (1, 200, 300, 5, 2, 64),
        (1, 1, 9, 9, 1, 64),
        (1, 77, 131, 131, 2, 64),
        (2, 130, 523, 517, 2, 128),
        (1, 64, 40, 3, 1, 128),
        (1, 100, 200, 200, 2, 32),
        (1, 100, 200, 197, 2, 96),
    ],
)
def test_all_shapes(batch, queries, keys, kv_len, heads, head_dim, dtype, path):
    """Padded keys and values hold NaN."""
    q = normals(batch, queries, heads, head_dim, dtype=dtype, deviation=0.2)
    k, v = (normals(batch, keys, heads, head_dim, dtype=dtype, seed=i) for i in (1, 2))
    out, log_total = hopper_attention(
        q,
        k.at[:, kv_len:].set(jnp.nan),
        v.at[:, kv_len:].set(jnp.nan),
        factor=1.0,
        kv_len=kv_len,
        **forced(path, q),
    )
    expected, expected_log_total = exact(q, k[:, :kv_len], v[:, :kv_len])
    assert relative_error(out, expected) <= ERRORS[dtype]
    np.testing.assert_allclose(log_total, expected_log_total, rtol=0, atol=LOG_TOTALS[dtype])


@pytest.mark.parametrize("make", ADVERSARIAL, ids=lambda f: f.__name__)
def test_adversarial(make):
    """The path that is chosen gives the online path's result."""
    q, k, v = make()
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    q, v = (x.swapaxes(1, 2) for x in (q, v))
    q, k, v = (x.swapaxes(0, 1)[None] for x in (q, k, v))
    out, _ = hopper_attention(q, k, v, factor=1.0, largest_score=largest_scores(q, k))
    online, _ = hopper_attention(q, k, v, factor=1.0, **forced("online", q))
    expected, _ = exact(q, k, v)
    assert relative_error(out, expected) <= ERRORS["bfloat16"]
    assert relative_error(online, expected) <= ERRORS["bfloat16"]


def test_the_path_is_chosen_head_by_head():
    """Scores of the second head leave the range of float32 unless they are shifted."""
    q, k, v = (normals(1, 200, 2, 64, seed=i) for i in range(3))
    q = q / 4
    k = k.at[:, :, 1].multiply(64)
    out, _ = hopper_attention(q, k, v, factor=1.0, largest_score=largest_scores(q, k))
    expected, _ = exact(q, k, v)
    assert relative_error(out, expected) <= ERRORS["bfloat16"]


@pytest.mark.parametrize("scale", [None, 0.5, 0.0, -0.25])
@pytest.mark.parametrize("shape", [(300, 64), (2, 3, 131, 64), (3, 250, 128), (16400, 64)])
def test_the_public_function(shape, scale):
    q, k, v = (normals(*shape, seed=i) for i in range(3))
    out = jax.jit(lambda *x: splash_attention(*x, scale=scale))(q, k, v)
    expected = reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)), scale=scale)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, expected) <= ERRORS["bfloat16"]


@pytest.mark.parametrize("path", ["bounded", "online"])
@pytest.mark.parametrize("deviation", [1.0, 2.5])
def test_as_accurate_as_cudnn(deviation, path):
    """Of the error against float32, 1.2 times cuDNN's at most."""
    q, k, v = (normals(1, 4096, 2, 64, dtype="float32", seed=i) for i in range(3))
    q, k, v, scaled = (
        x.astype(jnp.bfloat16) for x in (q * deviation, k, v, q * deviation * query_scale(64))
    )
    out, _ = hopper_attention(scaled, k, v, factor=1.0, **forced(path, q))
    theirs = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    theirs = relative_error(theirs, exact(q.astype(jnp.float32) * query_scale(64), k, v)[0])
    assert relative_error(out, exact(scaled, k, v)[0]) <= 1.2 * theirs


def test_two_runs_make_the_same_bits():
    q, k, v = (normals(1, 3000, 4, 64, seed=i) for i in range(3))
    first, second = (np.asarray(splash_attention(q, k, v).astype(jnp.float32)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_backends_agree():
    """q, k and v of a block, with padded tokens, through cuDNN and through this kernel."""
    heads, head_dim, keys = 4, 64, 1003
    q, k, v = (normals(2, 1008, heads * head_dim, seed=i) for i in range(3))
    values = jnp.abs(v).max(1)
    results = []
    for backend in (GpuBackend(), HopperBackend()):
        scaled = (q.astype(jnp.float32) * backend.query_scale(head_dim)).astype(q.dtype)
        bounds = Bounds(jnp.float32(40), values)
        results.append(
            jax.jit(backend.attend, static_argnums=(3, 4))(scaled, k, v, head_dim, keys, bounds)
        )
    theirs, ours = (np.asarray(x.astype(jnp.float32))[:, :keys] for x in results)
    assert relative_error(ours, theirs) <= 2 * ERRORS["bfloat16"]


def test_an_executable_can_be_saved():
    q, k, v = (normals(2, 200, 64, seed=i) for i in range(3))
    compiled = jax.jit(splash_attention).lower(q, k, v).compile()
    again = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    np.testing.assert_array_equal(
        *(np.asarray(f(q, k, v).astype(jnp.float32)) for f in (compiled, again))
    )
