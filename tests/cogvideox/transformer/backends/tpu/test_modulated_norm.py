"""The TPU kernel of CogVideoXLayerNormZero, in interpret mode, equals what other backends run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox.transformer import norms
from cogvideox.transformer.backends.tpu import modulated_norm


@pytest.mark.parametrize("text_rows", [0, 37, 128, 256])
def test_modulated_norm(text_rows):
    x, scale, shift = (
        3 + jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(1), 3),
            [(2, 256, 384), (2, 2, 384), (2, 2, 384)],
            strict=True,
        )
    )
    arguments = (x, scale, shift, jnp.int32(text_rows), 1e-5)
    expected = norms.norm_and_modulate(*arguments)
    assert expected.shape == (2, 384, 256)
    np.testing.assert_allclose(
        modulated_norm.norm_and_modulate(*arguments, interpret=True), expected, rtol=0, atol=1e-5
    )
    layer_norm = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
    if text_rows == 0:
        video = layer_norm * scale[:, 1:] + shift[:, 1:]
        np.testing.assert_allclose(expected, video.swapaxes(1, 2), rtol=0, atol=1e-5)
