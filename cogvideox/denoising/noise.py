"""Noise as diffusers draws it: torch's CPU generator, in the run's dtype, for the padded latents.

Importing torch takes as long as everything else before the first step. So a second process can
import it in parallel and draw the noise.
"""

import itertools
import json
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cogvideox.denoising import noise_process

AHEAD = 8  # longer than the gaps of the masks


class NoiseSource:
    """Draws noise in this process or, as a context manager, in a second process.

    The second process serves one `draw`. It is not started if this process has imported torch.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "NoiseSource":
        if "torch" not in sys.modules:
            # Only this process gets the terminal's signals; the other ends when its pipes close.
            self._process = subprocess.Popen(
                [sys.executable, "-P", noise_process.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def draw(
        self,
        seed: int,
        shape: tuple[int, ...],
        dtype: np.dtype,
        draws: Sequence[int],
        before: Sequence[tuple[int, ...]] = (),
    ) -> Iterator[np.ndarray]:
        """Draws standard normal noise [B, T, C, H, W] in `dtype`, bfloat16 or float32.

        Args:
            draws: number of draws by diffusers in each step; the last draw is used.
            before: shapes of draws before all others: those of posteriors.

        Yields:
            The draws of `before`, the initial noise, then the noise of each step; zeros if the step
            adds none.

        Raises:
            RuntimeError: the second process has ended.
        """
        if self._process is None:
            values = noise_process.torch_draws(seed, shape, dtype.name, before)
        else:
            values = _received(self._process, seed, shape, dtype, before)
        for _ in range(len(before) + 1):
            yield next(values)
        unused = np.zeros(shape, dtype)
        for count in draws:
            drawn = unused
            for _ in range(count):
                drawn = next(values)
            yield drawn


def drawn_ahead(
    values: Iterator[np.ndarray], count: int = AHEAD
) -> Generator[np.ndarray, None, None]:
    """Yields `values`, up to `count` of which a thread computes before they are asked for.

    A step that skips the transformer takes less time than the noise of the next one, which two
    draws and a transposition make: 0.2 s at 768x1360x81.
    """
    pending: deque[Future[np.ndarray | None]] = deque()
    pool = ThreadPoolExecutor(1, "noise")
    try:
        for _ in range(count):
            pending.append(pool.submit(next, values, None))
        while (value := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, values, None))
            yield value
    finally:
        pool.shutdown(cancel_futures=True)


def _received(
    process: subprocess.Popen[bytes],
    seed: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    before: Sequence[tuple[int, ...]],
) -> Iterator[np.ndarray]:
    """Yields the noise that the second process draws."""
    assert process.stdin is not None and process.stdout is not None
    request = json.dumps({"seed": seed, "shape": shape, "dtype": dtype.name, "before": before})
    process.stdin.write(request.encode() + b"\n")
    process.stdin.flush()
    for size in itertools.chain(before, itertools.repeat(shape)):
        noise = np.empty(size, dtype)
        # A buffered reader returns fewer bytes only at the end of the stream.
        if process.stdout.readinto(noise.view(np.uint8).reshape(-1)) < noise.nbytes:  # type: ignore[attr-defined]
            raise RuntimeError(f"the process that draws noise ended with code {process.wait()}")
        yield noise
