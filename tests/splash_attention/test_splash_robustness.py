"""Padding is inert, no input gives NaN or infinity, nothing races.

Scores here are whole numbers where they are large, so that they are exact in float32 and the
tolerance of small ones, roundings of sums, holds for all.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from splash_attention import BlockSizes, sequence_minor_attention
from splash_attention.bounds import bounded_heads, largest_scores, largest_values
from splash_attention.kernel import attention_kernel
from tests.splash_attention.softmax import attend, relative_error

FLOAT32 = 2e-6
# Of 300 keys: two blocks, the first of two bodies of one chunk.
SIZES = BlockSizes(block_q=128, block_kv=256, chunk=128, unroll=1)
RNG = np.random.default_rng(0)
HEADS, KEYS, QUERIES, D = 2, 300, 140, 64


def whole(*shape, most=3):
    return RNG.integers(-most, most + 1, size=shape).astype(np.float32)


def inputs():
    q, k = whole(HEADS, D, QUERIES), whole(HEADS, KEYS, D)
    return q, k, RNG.normal(size=(HEADS, D, KEYS)).astype(np.float32)


def large_norms():
    q, k, v = inputs()
    return q * 16, k * 16, v


def very_negative():
    q, k, v = inputs()
    return abs(q), -8 * abs(k), v


def very_positive():
    q, k, v = inputs()
    return abs(q), 8 * abs(k), v


def constant_rows():
    q, k, v = inputs()
    return np.full_like(q, 5), np.full_like(k, -7), v


def nearly_infinite():
    q, k, v = inputs()
    return np.full_like(q, 2.0**60), np.full_like(k, -(2.0**61)), v


def rising():
    """Every block of keys far above the one before: no shift of a group holds."""
    q, k, v = inputs()
    q[:, 0], k[:, :, 0] = 1, 4 * np.arange(KEYS)
    return q, k, v


def falling():
    q, k, v = rising()
    return q, k[:, ::-1].copy(), v


def one_key_wins():
    q, k, v = inputs()
    q[:, 0], k[:, :, 0] = 1, 0
    k[:, 299, 0] = 4000
    return q, k, v


def heads_differ():
    """The first head is bounded, the second is not."""
    q, k, v = inputs()
    k[0] = 0
    k[0, :, 0] = whole(KEYS)
    k[1] *= 64
    return q, k, v


def tiny_values():
    q, k, v = inputs()
    return q, k, v * np.float32(2.0**-100)


def huge_values():
    q, k, v = inputs()
    return q, k, v * np.float32(2.0**110)


def zeros():
    q, k, v = inputs()
    return np.zeros_like(q), np.zeros_like(k), v


ADVERSARIAL = (
    large_norms,
    very_negative,
    very_positive,
    constant_rows,
    nearly_infinite,
    rising,
    falling,
    one_key_wins,
    heads_differ,
    tiny_values,
    huge_values,
    zeros,
)


@pytest.mark.parametrize("make", ADVERSARIAL, ids=lambda f: f.__name__)
def test_adversarial(make):
    q, k, v = make()
    out = sequence_minor_attention(q, k, v, block_sizes=SIZES, interpret=True)
    assert relative_error(out, attend(q, k, v)) <= FLOAT32


def test_the_path_is_chosen_head_by_head():
    q, k, v = map(jnp.asarray, heads_differ())
    largest = largest_scores(q, k, KEYS)

    def paths(scores, v):
        return bounded_heads(scores, largest_values(v, KEYS), KEYS).tolist()

    assert paths(largest, v) == [1, 0]
    # No head is bounded when its values leave no room, or anything is infinite.
    assert paths(largest, v * 2.0**120) == [0, 0]
    assert paths(largest, v.at[0, 0, 0].set(jnp.inf)) == [0, 0]
    assert paths(largest_scores(q.at[0, 0, 0].set(jnp.inf), k, KEYS), v) == [0, 0]
    # The bound holds, and is no wider than its formula.
    scores = np.abs(np.einsum("nds,nkd->nks", q, k)).max((1, 2))
    assert (scores <= np.asarray(largest)).all()


def test_bounds_of_the_caller_choose_the_path():
    """Scores over 128 overflow the bounded path, so the two paths can be told apart."""
    q, k, v = large_norms()
    call = dict(block_sizes=SIZES, interpret=True)
    high = sequence_minor_attention(q, k, v, largest_score=jnp.array([1e6, 1e6]), **call)
    assert relative_error(high, attend(q, k, v)) <= FLOAT32
    wrong = sequence_minor_attention(q, k, v, largest_score=jnp.array([1.0, 1e6]), **call)
    assert not np.isfinite(wrong[0]).all()
    np.testing.assert_array_equal(wrong[1], high[1])


@pytest.mark.parametrize("factor", [1, 64], ids=["bounded", "online"])
def test_nan_stays_in_its_query_and_its_channel(factor):
    q, k, v = inputs()
    q, k = q / 8, k * factor
    clean = sequence_minor_attention(q, k, v, block_sizes=SIZES, interpret=True)
    q[0, 3, 70], v[0, 5, 290] = np.nan, np.nan
    got = np.asarray(sequence_minor_attention(q, k, v, block_sizes=SIZES, interpret=True))
    expected = np.zeros(got.shape, bool)
    expected[0, :, 70], expected[0, 5] = True, True
    np.testing.assert_array_equal(np.isnan(got), expected)
    assert relative_error(got[~expected], np.asarray(clean, np.float64)[~expected]) <= FLOAT32


@pytest.mark.parametrize(
    ("kv_len", "poison", "factor"),
    [(1, np.nan, 1), (200, np.inf, 1), (256, 1e30, 1), (200, np.nan, 64), (256, np.inf, 64)],
)
def test_padding_is_inert(kv_len, poison, factor):
    """To the bit, whatever it holds; factor 1 takes the bounded path, 64 the online one."""
    q, k, v = inputs()
    k = k / 8 * factor
    padded_k, padded_v = k.copy(), v.copy()
    padded_k[:, kv_len:], padded_v[..., kv_len:] = poison, poison
    got = sequence_minor_attention(
        q, padded_k, padded_v, kv_len=kv_len, block_sizes=SIZES, interpret=True
    )
    clean = sequence_minor_attention(
        q, k[:, :kv_len], v[..., :kv_len], block_sizes=SIZES, interpret=True
    )
    assert np.isfinite(got).all()  # NaN equals NaN below, and a short last block holds NaN
    np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("smooth_k", [False, True])
def test_padding_is_inert_for_int8_and_smoothing(smooth_k):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
    options = dict(block_sizes=SIZES, precision="int8_qk", smooth_k=smooth_k, interpret=True)
    got = sequence_minor_attention(
        q / 8, k.at[:, 200:].set(jnp.nan), v.at[..., 200:].set(jnp.nan), kv_len=200, **options
    )
    clean = sequence_minor_attention(q / 8, k[:, :200], v[..., :200], **options)
    np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize(("kv_len", "bounded"), [(3, True), (3, False), (129, False), (300, True)])
def test_length_known_only_on_the_device(kv_len, bounded):
    q, k, v = inputs()
    out, log_total = attention_kernel(
        q / 8,
        k,
        v,
        bounded,
        jnp.array([kv_len], jnp.int32),
        always_valid=0,
        most_valid=KEYS,
        window_size=None,
        block_sizes=SIZES,
        vmem_limit_bytes=2**25,
        out_dtype=jnp.float32,
        with_log_total=True,
        interpret=pltpu.InterpretParams(),
    )
    assert relative_error(out, attend(q / 8, k[:, :kv_len], v[..., :kv_len])) <= FLOAT32
    scores = k[:, :kv_len].astype(np.float64) @ (q / 8)
    # A relative error of a sum is an absolute one of its logarithm.
    np.testing.assert_allclose(
        log_total[:, 0], np.log2(np.exp2(scores).sum(1)), rtol=1e-6, atol=2 * FLOAT32
    )


@pytest.mark.parametrize("factor", [1, 64], ids=["bounded", "online"])
def test_nothing_races(factor):
    q, k, v = inputs()
    beside = np.swapaxes(k, 0, 1).reshape(1, KEYS, -1)[0] * factor / 8
    out = sequence_minor_attention(
        q, beside, v, block_sizes=SIZES, interpret=pltpu.InterpretParams(detect_races=True)
    )
    assert np.isfinite(out).all()
    assert interpret_pallas_call.races is not None
    assert not interpret_pallas_call.races.races_found


def test_what_cannot_be_is_refused():
    q, k, v = inputs()

    def refused(error, match, *arrays, **options):
        with pytest.raises(error, match=match):
            sequence_minor_attention(*arrays, interpret=True, **options)

    refused(
        ValueError,
        r"needs 257.0 MiB of VMEM; v6e offers 120.0 MiB",
        q,
        k,
        v,
        block_sizes=BlockSizes(512, 2**17, 256, 64),
    )
    refused(ValueError, "kv_len is 301; k and v have 300", q, k, v, kv_len=301)
    refused(ValueError, "kv_len is 0", q, k, v, kv_len=0)
    refused(ValueError, r"largest_score is \(3,\)", q, k, v, largest_score=jnp.zeros(3))
    refused(ValueError, "'int4'", q, k, v, precision="int4")
    refused(ValueError, r"got .*\(2, 299, 64\)", q, k[:, 1:], v)
    refused(ValueError, "query 139 sees no key", q, k, v, kv_len=100, window_size=39)
    long_heads = (np.repeat(x, 5, axis) for x, axis in ((q, 1), (k, 2), (v, 1)))
    refused(ValueError, "head size is 320; at most 256", *long_heads)
    refused(TypeError, "float32, bfloat16, float32", q, k.astype(jnp.bfloat16), v)
    refused(ValueError, "empty", q[..., :0], k, v)
    refused(ValueError, r"\(64, 140\), \(300,\), \(64, 300\)", q[0], k[0, :, 0], v[0])
    refused(TypeError, "window_size is 1.5", q, k, v, window_size=1.5)
    refused(TypeError, "it must be a BlockSizes", q, k, v, block_sizes=(128, 128, 128, 1))


def test_without_a_tpu_it_says_what_would_run():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="interpret=True"):
        sequence_minor_attention(q, k, v)
