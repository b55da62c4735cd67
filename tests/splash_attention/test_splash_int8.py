"""int8 Q.K: its error is known, and smoothing is what keeps it when keys have a common offset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attention import reference_attention, splash_attention
from splash_attention.quantize import quantize
from tests.splash_attention.rounding import exp2_as_on_a_tpu
from tests.splash_attention.softmax import relative_error


def inputs(offset, deviations):
    """[2, 500, 64] unit normal; a quarter of the channels of k is offset, q has `deviations`."""
    q, k, v = (
        jax.random.normal(key, (2, 500, 64)) for key in jax.random.split(jax.random.key(0), 3)
    )
    q, k = q * deviations, k + offset * (jnp.arange(64) % 4 == 0)
    return [x.astype(jnp.bfloat16) for x in (q, k, v)]


def error(offset, deviations=1, **options):
    q, k, v = inputs(offset, deviations)
    out = splash_attention(q, k, v, interpret=True, **options)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / 8
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return relative_error(out, p @ v / p.sum(-1, keepdims=True))


# Most of it is the bfloat16 of the scores, coarser where they are larger, and of exp2.
@pytest.mark.parametrize(
    ("offset", "deviations", "tolerance"), [(0, 1, 1e-2), (8, 1, 1e-2), (0, 2.5, 2e-2)]
)
def test_error_with_smoothing(offset, deviations, tolerance):
    assert error(offset, deviations, precision="int8_qk", smooth_k=True) <= tolerance


def test_error_without_smoothing():
    """An offset of 8 deviations leaves a third of the steps for what tells keys apart."""
    smooth = error(8, precision="int8_qk", smooth_k=True)
    assert 1.3 * smooth < error(8, precision="int8_qk") <= 2e-2


@pytest.mark.parametrize("smooth_k", [False, True])
def test_the_kernel_rounds_as_the_reference(smooth_k):
    """Both round to int8 and bfloat16 in the same places, so only sums in float32 differ."""
    options = {"precision": "int8_qk", "smooth_k": smooth_k}
    q, k, v = (x.astype(jnp.float32) for x in inputs(8, 1))
    with exp2_as_on_a_tpu():
        out = splash_attention(q, k, v, interpret=True, **options)
    expected = np.asarray(reference_attention(q, k, v, **options), np.float64)
    assert relative_error(out, expected) < 1e-6


def test_smoothing_leaves_bfloat16_as_it_is():
    assert error(8, smooth_k=True) <= 4e-3


def test_products_of_int8_are_the_scores():
    """A pair of int8 is as good as a step a third of one int8's, whose products are off by 1e-2."""
    q = jax.random.normal(jax.random.key(0), (4, 64, 10)) * jnp.arange(1, 11)
    k = jax.random.normal(jax.random.key(1), (2, 50, 128))
    k = k.at[:, 40:].set(jnp.nan)
    q8, k8, scale = quantize(q, k, 40)
    assert q8.dtype == k8.dtype == jnp.int8
    assert k8.shape == (2, 64, 256)
    # Powers of two.
    assert (np.frexp(np.asarray(scale, np.float32))[0] == 0.5).all()
    by_head = k8[:, :40].reshape(2, 40, 2, 128).swapaxes(1, 2).reshape(4, 40, 128).astype(float)
    got = jnp.einsum("nkd,nds->nks", by_head, q8.astype(float)) * scale.astype(float)
    natural = k[:, :40].reshape(2, 40, 2, 64).swapaxes(1, 2).reshape(4, 40, 64)
    exact = jnp.einsum("nkd,nds->nks", natural, q, precision="highest")
    assert relative_error(got, np.asarray(exact, np.float64)) < 4e-3


def test_zeros_stay_zeros():
    q8, k8, scale = quantize(jnp.zeros((1, 64, 4)), jnp.zeros((1, 32, 64)), 32)
    assert not q8.any() and not k8.any() and jnp.isfinite(scale).all()
