"""Noise as diffusers draws it: torch's CPU generator, in the run's dtype, over the padded latents.

Importing torch takes as long as everything else that comes before the first step. A process of its
own can import it beside all that, and draw there (`drawing_beside`).

This file is also that process's program; it imports nothing of the project.
"""

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np

_process: subprocess.Popen | None = None


def draw_noise(
    seed: int, shape: tuple[int, ...], dtype: np.dtype, draws: Sequence[int]
) -> Iterator[np.ndarray]:
    """Standard normal noise [B, T, C, H, W] in `dtype`, bfloat16 or float32.

    Args:
        draws: how often diffusers draws in each step; the last draw counts.

    Yields:
        The initial noise, then that of each step: zeros where the step adds none.
    """
    values = (
        _torch_draws(seed, shape, dtype.name) if _process is None else _received(seed, shape, dtype)
    )
    yield next(values)
    unused = np.zeros(shape, dtype)
    for count in draws:
        drawn = unused
        for _ in range(count):
            drawn = next(values)
        yield drawn


def _torch_draws(seed: int, shape: Sequence[int], dtype: str) -> Iterator[np.ndarray]:
    """Endlessly; bfloat16 as numpy has it."""
    import torch  # only here: it takes seconds

    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        noise = torch.randn(shape, generator=generator, dtype=getattr(torch, dtype))
        if dtype == "bfloat16":
            import ml_dtypes

            yield noise.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield noise.numpy()


@contextlib.contextmanager
def drawing_beside() -> Iterator[None]:
    """Inside, one run's noise is drawn by another process, unless this one has imported torch."""
    global _process
    if "torch" in sys.modules:
        yield
        return
    # Signals of the terminal are for this process alone: the other ends when its pipes do.
    _process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        _process.kill()
        _process.communicate()
        _process = None


def _received(seed: int, shape: Sequence[int], dtype: np.dtype) -> Iterator[np.ndarray]:
    """What the other process draws.

    Raises:
        RuntimeError: it has ended.
    """
    asked = json.dumps({"seed": seed, "shape": list(shape), "dtype": dtype.name})
    _process.stdin.write(asked.encode() + b"\n")
    _process.stdin.flush()
    while True:
        noise = np.empty(shape, dtype)
        if _process.stdout.readinto(noise.view(np.uint8).reshape(-1)) < noise.nbytes:
            raise RuntimeError(f"the process that draws noise ended with code {_process.wait()}")
        yield noise


def _draw_for_another() -> None:
    """The other process: a request on stdin, noise on stdout until nobody reads it."""
    gc.disable()  # a tenth of what importing takes
    import torch  # noqa: F401 (while the request is still being thought of)

    request = sys.stdin.readline()
    with contextlib.suppress(BrokenPipeError):
        for noise in _torch_draws(**json.loads(request)) if request else ():
            sys.stdout.buffer.write(noise.view(np.uint8).data)


if __name__ == "__main__":
    _draw_for_another()
