"""Main program of the process that draws noise for another (see `noise.NoiseSource`).

To start fast, it imports only torch, numpy and the standard library.
"""

import contextlib
import gc
import itertools
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np


def torch_draws(
    seed: int, shape: Sequence[int], dtype: str, before: Sequence[Sequence[int]] = ()
) -> Iterator[np.ndarray]:
    """Yields standard normal noise from torch's CPU generator without end, as numpy arrays.

    Args:
        before: shapes of the first draws; all others have `shape`.
    """
    import torch  # takes seconds

    generator = torch.Generator("cpu").manual_seed(seed)
    for size in itertools.chain(before, itertools.repeat(shape)):
        noise = torch.randn(size, generator=generator, dtype=getattr(torch, dtype))
        if dtype == "bfloat16":
            import ml_dtypes

            yield noise.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield noise.numpy()


def main() -> None:
    """Reads one request from stdin and writes noise to stdout until the reader closes it."""
    gc.disable()  # saves a tenth of the import time
    import torch  # noqa: F401 (before the request arrives)

    request = sys.stdin.readline()
    with contextlib.suppress(BrokenPipeError):
        for noise in torch_draws(**json.loads(request)) if request else ():
            sys.stdout.buffer.write(noise.view(np.uint8).data)


if __name__ == "__main__":
    main()
