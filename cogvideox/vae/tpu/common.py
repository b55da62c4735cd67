"""What both kernels of the decoder share: sizes, products, and the ring of columns.

Why kernels: XLA spends more on moving a full-size activation into the layout of its convolutions
than on the convolution. 128 -> 128 channels on 8 frames of 768 x 176 take 9.5M cycles, of which
5.4M convolve, and 4 to 16 s to compile. These kernels read every activation once and write the
result once, in their natural order: 3.6M cycles, norm, activation and group sums included
(compiler estimates for v6e).

How they work: the grid walks over the columns of one device. Step i brings column i of every frame
into a ring of three columns in VMEM, then convolves column i - 1. Channels are multiples of 128.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from cogvideox.vae.norm import precision

LANES = 128
BORDER = 8  # rows of zeros above and below the products: the border of the picture
VMEM_BYTES = 100 * 2**20  # of 128 MiB on v6e; the largest layer of the published VAE needs 60

# False compiles for TPU. True, or the options of Pallas' TPU interpreter, runs on any backend,
# slowly.
Interpret = bool | pltpu.InterpretParams


def compiler_params() -> pltpu.CompilerParams:
    """Returns the compiler's parameters for a grid (batch, columns + 1) that runs in order."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
    )


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiplies [M, K] x [K, N] into float32."""
    return jnp.dot(x, weight, preferred_element_type=jnp.float32, precision=precision(x.dtype))


def clear_border(products: jax.Array, height: int) -> None:
    """Zeroes the rows of the ref `products` above and below the `height` rows of the picture."""
    border = jnp.zeros((BORDER, products.shape[1]), jnp.float32)
    products[:BORDER] = border
    products[BORDER + height :] = border
