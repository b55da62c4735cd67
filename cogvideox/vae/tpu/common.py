"""Definitions shared by the decoder's two kernels: sizes, products, and the ring of columns.

Reason for kernels: XLA copies full-size activations into the layout of its convolutions. 128 -> 128
channels on 8 frames of 768 x 176 take 9.5M cycles (5.4M of convolution) and 4 to 16 s to compile.
These kernels read every activation once and write the result once, in natural order: 3.6M cycles,
including norm, activation and group sums (compiler estimates for v6e).

Method: the grid iterates over the columns of one device. Step i reads column i of every frame into
a ring of three columns in VMEM, then convolves column i - 1. Channels are multiples of 128.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from cogvideox.vae.norm import precision

LANES = 128
BORDER = 8  # rows of zeros above and below the products: the frame's border
VMEM_BYTES = 100 * 2**20  # of 128 MiB on v6e; the largest layer of the published VAE needs 60

# False compiles for TPU. True, or options of Pallas' TPU interpreter, runs on any backend, slowly.
Interpret = bool | pltpu.InterpretParams


def compiler_params() -> pltpu.CompilerParams:
    """Returns compiler parameters for a sequential grid (batch, columns + 1)."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies [M, K] x [K, N] into float32."""
    return jnp.dot(x, weight, preferred_element_type=jnp.float32, precision=precision(x.dtype))


def clear_border(products: jax.Array, height: int) -> None:
    """Zeroes the rows of the ref `products` above and below the `height` rows of the frame."""
    border = jnp.zeros((BORDER, products.shape[1]), jnp.float32)
    products[:BORDER] = border
    products[BORDER + height :] = border
