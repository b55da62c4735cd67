"""Conversion to uint8 against diffusers'."""

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor

from cogvideox.video.pixels import to_uint8


def test_to_uint8_rounds_as_diffusers_does():
    values = np.linspace(0, 1, 3 * 5101, dtype=np.float32).reshape(1, 1, -1, 3)
    expected = np.asarray(VaeImageProcessor.numpy_to_pil(values)[0])
    np.testing.assert_array_equal(to_uint8(values)[0], expected)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_values_outside_the_range_are_refused(value):
    frames = np.full((1, 2, 2, 3), 0.5, np.float32)
    frames[0, 1, 0, 2] = value
    with pytest.raises(ValueError, match="within 0..1"):
        to_uint8(frames)
