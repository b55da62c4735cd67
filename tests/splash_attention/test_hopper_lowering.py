"""What of the Hopper kernel can be checked without a GPU: tiles, arguments, its lowering, and the
bounded path in interpret mode."""

import functools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attention import (
    BlockLists,
    attention,
    hopper_attention,
    reference_attention,
    splash_attention,
)
from splash_attention.hopper.attention import choose_config
from splash_attention.hopper.tiles import ROW_MULTIPLE, AllKeys, list_tables
from tests.splash_attention.hopper_interpreter import interpreted
from tests.splash_attention.softmax import relative_error

LISTS = [[[0, 2], [2, 1]], [[1], [0, 2, 1]]]  # [rule][tile] -> chunks


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("kv_len", [1, 5, 8, 63, 64, 65, 127, 128, 129, 131, 250, 256, 1000, 45106])
def test_every_key_is_in_one_tile(kv_len, block):
    keys = AllKeys(kv_len, block)
    seen = np.zeros(keys.end, int)
    for i in range(keys.tiles):
        start, valid = int(keys.start(jnp.int32(i))), int(keys.valid(jnp.int32(i)))
        assert start % ROW_MULTIPLE == 0
        assert 0 < valid <= block
        seen[start : start + valid] += 1
    assert (seen[:kv_len] == 1).all()
    assert not seen[kv_len:].any()
    assert keys.end - block < kv_len <= keys.end
    assert keys.padded == ("once" if kv_len % block else "never")


def test_a_list_visits_the_keys_of_its_chunks():
    """Tiles of padding alone are left out, and the last tile comes first."""
    lists = BlockLists.from_lists(LISTS, block_q=128, chunk=256, valid=[100, 256, 200])
    rule = jnp.zeros((1, 2), jnp.int32)
    tables = list_tables(lists, rule, 128)
    found = [
        [
            [(int(tables.starts[r, t, i]), int(tables.valid[r, t, i])) for i in range(count)]
            for t, count in enumerate(counts)
        ]
        for r, counts in enumerate(np.asarray(tables.counts))
    ]
    zero, one, two = [(0, 100)], [(256, 128), (384, 128)], [(512, 128), (640, 72)]
    assert found == [
        [[two[1], *zero, two[0]], [one[1], *two, one[0]]],
        [[one[1], one[0]], [one[1], *zero, *two, one[0]]],
    ]


def test_a_list_of_all_chunks_visits_the_tiles_of_the_dense_kernel():
    lists = BlockLists.from_lists([[[0, 1, 2]]], block_q=128, chunk=256, valid=[256, 256, 30])
    tables, keys = list_tables(lists, jnp.zeros((1, 1), jnp.int32), 128), AllKeys(542, 128)
    assert int(tables.counts[0, 0]) == keys.tiles
    for i in range(keys.tiles):
        assert int(tables.starts[0, 0, i]) == int(keys.start(jnp.int32(i)))
        assert int(tables.valid[0, 0, i]) == int(keys.valid(jnp.int32(i)))


def bounded(heads):
    return {"largest_score": jnp.full(heads, 10.0), "largest_value": jnp.ones(heads)}


def normals(*shape):
    rng = np.random.default_rng(shape)
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def test_lists_in_interpret_mode(monkeypatch):
    """Two rules, three warpgroups for tiles of two, and padding that holds NaN."""
    lists = BlockLists.from_lists(LISTS, block_q=128, chunk=128, valid=[100, 128, 60])
    q, k, v = normals(1, 160, 2, 64) * 0.2, normals(1, 376, 2, 64), normals(1, 376, 2, 64) + 1
    padding = ~np.asarray(lists.valid_keys())[:376]
    rule = jnp.array([[1, 0]])
    expected = reference_attention(
        *(x.swapaxes(1, 2).astype(jnp.float32) for x in (q, k, v)),
        scale=math.log(2),
        block_lists=lists,
        rule=rule,
    )
    k, v = (x.at[:, padding].set(jnp.nan) for x in (k, v))
    with interpreted(monkeypatch):
        out, _ = hopper_attention(
            *(q, k, v), factor=1.0, block_lists=lists, rule=rule, **bounded((1, 2))
        )
    assert relative_error(out.swapaxes(1, 2), expected) < 4e-3  # weights and output in bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("head_dim", "factor"), [(64, 1.0), (64, 0.18), (128, 1.0), (40, 0.2)])
def test_it_lowers_for_cuda(dtype, head_dim, factor):
    q, k = (jax.ShapeDtypeStruct((2, s, 3, head_dim), dtype) for s in (1001, 45106))
    attend = functools.partial(hopper_attention, factor=factor, kv_len=45101)
    lowered = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    out, log_total = lowered.out_info
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (log_total.shape, log_total.dtype) == ((2, 3, 1001), jnp.float32)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lists_lower_for_cuda(head_dim):
    """The lists are arguments, so another table runs the same program."""
    q, k = (jax.ShapeDtypeStruct((2, s, 3, head_dim), "bfloat16") for s in (1000, 600))
    lists = BlockLists.from_lists(LISTS, block_q=512, chunk=256, valid=[226, 255, 88])

    def attend(q, k, v, lists, rule):
        return hopper_attention(q, k, v, factor=1.0, block_lists=lists, rule=rule)

    rule = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    lowered = jax.jit(attend).trace(q, k, k, lists, rule).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    out, log_total = lowered.out_info
    assert (out.shape, log_total.shape) == (q.shape, (2, 3, 1000))


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("q", "k", "v", "options", "error", "said"),
    [
        (zeros(1, 8, 2, 64), zeros(1, 8, 3, 64), zeros(1, 8, 3, 64), {}, ValueError, "needs q"),
        (zeros(1, 8, 2, 64), zeros(1, 8, 2, 64), zeros(1, 9, 2, 64), {}, ValueError, "needs q"),
        (zeros(8, 2, 64), zeros(8, 2, 64), zeros(8, 2, 64), {}, ValueError, "needs q"),
        (zeros(1, 8, 2, 64), zeros(1, 0, 2, 64), zeros(1, 0, 2, 64), {}, ValueError, "empty"),
        (*[zeros(1, 8, 2, 64)] * 3, {"kv_len": 9}, ValueError, "kv_len is 9"),
        (*[zeros(1, 8, 2, 64)] * 3, {"kv_len": 0}, ValueError, "kv_len is 0"),
        (*[zeros(1, 8, 2, 136)] * 3, {}, ValueError, "head size is 136"),
        (*[zeros(1, 8, 2, 64, dtype=jnp.float32)] * 3, {}, TypeError, "got float32"),
        (*[zeros(1, 8, 2, 64)] * 2, zeros(1, 8, 2, 64, dtype=jnp.float16), {}, TypeError, "got"),
    ],
)
def test_bad_arguments_are_refused(q, k, v, options, error, said):
    with pytest.raises(error, match=said):
        hopper_attention(q, k, v, factor=1.0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 4},
        {"precision": "int8_qk"},
        {"smooth_k": True},
    ],
)
def test_options_of_the_tpu_kernel_are_refused(options, monkeypatch):
    monkeypatch.setattr(attention, "runs_on_hopper", lambda: True)
    with pytest.raises(ValueError, match="takes only scale, block_lists and rule"):
        splash_attention(*[zeros(2, 8, 64)] * 3, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": jnp.zeros(3, jnp.int32)}, r"rule is \(3,\); q has heads \(2,\)"),
        ({"queries": 300}, "block_lists are of 2 tiles of 128 queries"),
        ({"keys": 500}, "256 queries and 500 keys need"),
        ({"kv_len": 8}, "block_lists replace kv_len"),
    ],
)
def test_lists_that_do_not_fit_are_refused(options, said, monkeypatch):
    monkeypatch.setattr(attention, "runs_on_hopper", lambda: True)
    lists = BlockLists.from_lists(LISTS, block_q=128, chunk=128, valid=[128] * 3)
    options = {"queries": 256, "keys": 384, "rule": None, **options}
    q, k = zeros(2, options["queries"], 64), zeros(2, options["keys"], 64)
    with pytest.raises(ValueError, match=said):
        if "kv_len" in options:
            x = zeros(1, 256, 2, 64)
            hopper_attention(x, x, x, factor=1.0, kv_len=8, block_lists=lists)
        splash_attention(q, k, k, block_lists=lists, rule=options["rule"])


def test_other_devices_are_named():
    with pytest.raises(ValueError, match="needs a TPU or a GPU of compute capability 9.0"):
        splash_attention(*[zeros(2, 8, 64)] * 3)


def test_a_backend_loads_the_runtime_that_its_executables_need():
    """JAX names Mosaic GPU's runtime library to XLA when it imports Mosaic GPU, not before."""
    program = (
        "import sys; from cogvideox.transformer.backends import HopperBackend; "
        "name = 'jax.experimental.mosaic.gpu.core'; assert name not in sys.modules; "
        "HopperBackend(); assert name in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_head_size_has_a_layout():
    assert choose_config(1) == choose_config(64)
    assert choose_config(65) == choose_config(128)


@pytest.mark.parametrize(
    ("keys", "dtype", "deviations", "expected"),
    [
        (16384, "bfloat16", (0.25, 30), [1, 0]),
        (16383, "bfloat16", (0.25, 30), [0, 0]),
        (16384, "float16", (0.1, 2), [1, 0]),
    ],
)
def test_the_path_of_each_head(keys, dtype, deviations, expected, monkeypatch):
    """Few keys are not worth a bound; float16 holds fewer magnitudes of weights."""
    given = {}

    def kernel(q, k, v, bounded, *, kv_len, config, factor):
        given["bounded"] = bounded
        return q, jnp.zeros((1, 2, q.shape[1]))

    monkeypatch.setattr("splash_attention.hopper.kernel.hopper_kernel", kernel)
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(1, keys, 2, 64)), dtype) for _ in range(2))
    q = k[:, :64] * jnp.asarray(deviations, dtype)[:, None]
    hopper_attention(q, k, v, factor=0.125)
    np.testing.assert_array_equal(given["bounded"], [expected])


def test_padding_of_values_is_cleared(monkeypatch):
    """Rows that the kernel reads past the last key hold zeros, whatever they held."""
    given = {}

    def kernel(q, k, v, bounded, *, kv_len, config, factor):
        given["v"] = v
        return q, jnp.zeros((1, 2, q.shape[1]))

    monkeypatch.setattr("splash_attention.hopper.kernel.hopper_kernel", kernel)
    q, k = zeros(1, 8, 2, 64), zeros(1, 301, 2, 64)
    hopper_attention(q, k, (k + 1).at[:, 290:].set(jnp.nan), factor=1.0, kv_len=290)
    v = np.asarray(given["v"].astype(jnp.float32))
    assert v.shape[1] == 304
    assert (v[:, :290] == 1).all()
    assert (v[:, 290:296] == 0).all()


def test_a_negative_factor_moves_to_the_queries(monkeypatch):
    """The kernel takes the maximum of q.k before the factor, so it needs a positive one."""
    given = []

    def kernel(q, k, v, bounded, *, kv_len, config, factor):
        given.append((float(q[0, 0, 0, 0]), factor))
        return q, jnp.zeros((1, 2, q.shape[1]))

    monkeypatch.setattr("splash_attention.hopper.kernel.hopper_kernel", kernel)
    x = zeros(1, 8, 2, 64) + 3
    for factor in (0.5, -0.5, 0.0):
        hopper_attention(x, x, x, factor=factor)
    assert given == [(3.0, 0.5), (-3.0, 0.5), (0.0, 1.0)]
