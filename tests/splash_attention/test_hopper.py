"""The Hopper kernel's numbers. They need a Hopper GPU:

JAX_PLATFORMS=cuda python -m pytest tests/splash_attention/test_hopper.py
"""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from cogvideox.transformer.backends import CpuBackend, GpuBackend, HopperBackend
from cogvideox.transformer.backends.base import Bounds, Listed
from splash_attention import (
    BlockLists,
    hopper_attention,
    query_scale,
    reference_attention,
    splash_attention,
)
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


def random_lists(rng, queries, keys, block_q=256, chunk=256, rules=2):
    """Lists of some chunks in any order, each with padding of its own."""
    chunks = -(-keys // chunk)
    valid = [int(n) for n in rng.integers(1, chunk + 1, size=chunks)]
    valid[-1] = min(valid[-1], keys - (chunks - 1) * chunk)
    valid[1] = chunk
    lists = [
        [
            [int(c) for c in rng.permutation(chunks)[: rng.integers(1, chunks + 1)]]
            for _ in range(-(-queries // block_q))
        ]
        for _ in range(rules)
    ]
    return BlockLists.from_lists(lists, block_q=block_q, chunk=chunk, valid=valid)


def masked(q, k, v, lists, rule):
    """Dense attention of [B, S, N, D] masked by the lists, scores in powers of two."""
    q, k, v = (x.astype(jnp.float32).swapaxes(1, 2) for x in (q, k, v))
    out = reference_attention(q, k, v, scale=float(np.log(2)), block_lists=lists, rule=rule)
    return out.swapaxes(1, 2)


def poisoned(x, lists):
    return x.at[:, ~np.asarray(lists.valid_keys())[: x.shape[1]]].set(jnp.nan)


@pytest.mark.parametrize("path", ["bounded", "online"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("queries", "keys", "block_q", "chunk", "head_dim"),
    [
        (1000, 1500, 512, 256, 64),
        (700, 900, 128, 128, 64),
        (800, 1300, 384, 256, 64),
        (1000, 1500, 512, 256, 128),
        (300, 700, 256, 256, 40),
    ],
)
def test_random_lists(queries, keys, block_q, chunk, head_dim, dtype, path):
    """Padded keys and values hold NaN."""
    rng = np.random.default_rng(queries)
    lists = random_lists(rng, queries, keys, block_q, chunk)
    q = normals(2, queries, 3, head_dim, dtype=dtype, deviation=0.2)
    k, v = (normals(2, keys, 3, head_dim, dtype=dtype, seed=i) for i in (1, 2))
    rule = jnp.asarray(rng.integers(0, 2, size=(2, 3)), jnp.int32)
    out, _ = hopper_attention(
        *(q, poisoned(k, lists), poisoned(v, lists)),
        factor=1.0,
        block_lists=lists,
        rule=rule,
        **forced(path, q),
    )
    assert relative_error(out, masked(q, k, v, lists, rule)) <= ERRORS[dtype]


@pytest.mark.parametrize("path", ["bounded", "online"])
@pytest.mark.parametrize(("keys", "head_dim"), [(1280, 64), (1293, 64), (1100, 128)])
def test_a_list_of_every_chunk_equals_the_dense_kernel_bit_for_bit(keys, head_dim, path):
    q, k, v = (normals(2, n, 3, head_dim, seed=n) for n in (1000, keys, keys))
    chunks = -(-keys // 256)
    valid = [256] * (chunks - 1) + [keys - 256 * (chunks - 1)]
    lists = BlockLists.from_lists([[list(range(chunks))] * 2], block_q=512, chunk=256, valid=valid)
    dense, listed = (
        hopper_attention(q, k, v, factor=1.0, **forced(path, q), **more)
        for more in ({}, {"block_lists": lists})
    )
    for ours, theirs in zip(listed, dense, strict=True):
        np.testing.assert_array_equal(*(x.astype(jnp.float32) for x in (ours, theirs)))


@pytest.mark.parametrize("scale", [1, 64], ids=["bounded", "online"])
def test_the_public_function_over_lists(scale):
    """It finds the bounds without the padding, which holds NaN."""
    rng = np.random.default_rng(5)
    keys = 16900
    lists = random_lists(rng, 600, keys, block_q=512)
    q, k, v = (normals(2, n, 64, seed=n) for n in (600, keys, keys))
    rule = jnp.array([1, 0])
    q = q * scale
    out = splash_attention(q, poisoned(k, lists), poisoned(v, lists), block_lists=lists, rule=rule)
    expected = reference_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), block_lists=lists, rule=rule
    )
    assert relative_error(out, expected) <= ERRORS["bfloat16"]


def test_the_backend_over_lists():
    """q, k and v of a block, through the reference and through this kernel."""
    heads, head_dim, tokens = 4, 64, 1000
    lists = random_lists(np.random.default_rng(6), tokens, tokens, block_q=512)
    q, k, v = (normals(2, tokens, heads * head_dim, seed=i) for i in range(3))
    listed = Listed(lists, jnp.array([0, 1, 1, 0]))
    mesh = jax.make_mesh((1,), ("sp",))
    results = []
    for backend in (CpuBackend(), HopperBackend()):
        scaled = (q.astype(jnp.float32) * backend.query_scale(head_dim)).astype(q.dtype)
        attend = jax.shard_map(
            lambda q, k, v, backend=backend: backend.attend(
                q, k, v, head_dim, listed, Bounds(jnp.float32(40), jnp.abs(v).max(1))
            ),
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), jax.P()),
            out_specs=jax.P(),
            check_vma=False,
        )
        results.append(np.asarray(jax.jit(attend)(scaled, k, v).astype(jnp.float32)))
    assert relative_error(results[1], results[0]) <= 2 * ERRORS["bfloat16"]


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


def test_an_executable_can_be_loaded_in_another_process(tmp_path):
    q, k, v = (normals(2, 200, 64, seed=i) for i in range(3))
    compiled = jax.jit(splash_attention).lower(q, k, v).compile()
    (tmp_path / "executable").write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    np.save(tmp_path / "inputs.npy", np.stack([x.astype(jnp.float32) for x in (q, k, v)]))
    program = """
import pickle, sys
from pathlib import Path
import jax.numpy as jnp, numpy as np
from jax.experimental import serialize_executable
from splash_attention.hopper.attention import load_runtime

folder = Path(sys.argv[1])
load_runtime()
made = pickle.loads((folder / "executable").read_bytes())
q, k, v = jnp.asarray(np.load(folder / "inputs.npy"), jnp.bfloat16)
out = serialize_executable.deserialize_and_load(*made)(q, k, v)
np.save(folder / "out.npy", out.astype(jnp.float32))
"""
    # The allocator of this process leaves a quarter of the memory.
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    expected = np.asarray(compiled(q, k, v).astype(jnp.float32))
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
