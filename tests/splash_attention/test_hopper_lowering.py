"""What of the Hopper kernel can be checked without a GPU: tiles, arguments, and its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attention import attention, hopper_attention, splash_attention
from splash_attention.hopper.attention import choose_config
from splash_attention.hopper.tiles import ROW_MULTIPLE, Keys, last_row_read


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("kv_len", [1, 5, 8, 63, 64, 65, 127, 128, 129, 131, 250, 256, 1000, 45106])
def test_every_key_is_in_one_tile(kv_len, block):
    keys = Keys(kv_len, block)
    low, high = keys.first_valid
    seen = np.zeros(kv_len, int)
    for i in range(keys.tiles):
        start = int(keys.start(jnp.int32(i)))
        assert start % ROW_MULTIPLE == 0
        valid = slice(start + low, start + high) if i == 0 else slice(start, start + block)
        assert valid.stop <= kv_len
        seen[valid] += 1
    assert (seen == 1).all()
    assert 0 <= low < high <= block
    assert last_row_read(kv_len, block) == max(block, -(-kv_len // ROW_MULTIPLE) * ROW_MULTIPLE)


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
        {"block_lists": object()},
        {"rule": jnp.zeros(2, jnp.int32)},
        {"precision": "int8_qk"},
        {"smooth_k": True},
    ],
)
def test_options_of_the_tpu_kernel_are_refused(options, monkeypatch):
    monkeypatch.setattr(attention, "runs_on_hopper", lambda: True)
    with pytest.raises(ValueError, match="no option except scale"):
        splash_attention(*[zeros(2, 8, 64)] * 3, **options)


def test_other_devices_are_named():
    with pytest.raises(ValueError, match="needs a TPU or a GPU of compute capability 9.0"):
        splash_attention(*[zeros(2, 8, 64)] * 3)


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
