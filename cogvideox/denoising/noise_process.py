"""The program of the process that draws noise for another (see `noise.NoiseSource`).

It imports nothing of the project, and torch alone of what takes long.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np


def torch_draws(seed: int, shape: Sequence[int], dtype: str) -> Iterator[np.ndarray]:
    """Draws standard normal noise with torch's CPU generator, endlessly; bfloat16 as numpy's."""
    import torch  # takes seconds

    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        noise = torch.randn(shape, generator=generator, dtype=getattr(torch, dtype))
        if dtype == "bfloat16":
            import ml_dtypes

            yield noise.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield noise.numpy()


def main() -> None:
    """Reads one request from stdin and writes noise to stdout until nobody reads it."""
    gc.disable()  # a tenth of what importing takes
    import torch  # noqa: F401 (before the request arrives)

    request = sys.stdin.readline()
    with contextlib.suppress(BrokenPipeError):
        for noise in torch_draws(**json.loads(request)) if request else ():
            sys.stdout.buffer.write(noise.view(np.uint8).data)


if __name__ == "__main__":
    main()
