"""Noise as diffusers draws it: torch's CPU generator, in the run's dtype, over the padded latents.

Importing torch takes as long as everything else that comes before the first step. A second process
can import it at the same time, and draw there.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from cogvideox.denoising import noise_process


class NoiseSource:
    """Draws in this process; as a context manager, in another until the context ends.

    The other process serves one `draw`, and none is started if this one has imported torch.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "NoiseSource":
        if "torch" not in sys.modules:
            # The terminal's signals are for this process alone: the other ends when its pipes do.
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
        self, seed: int, shape: tuple[int, ...], dtype: np.dtype, draws: Sequence[int]
    ) -> Iterator[np.ndarray]:
        """Draws standard normal noise [B, T, C, H, W] in `dtype`, bfloat16 or float32.

        Args:
            draws: how often diffusers draws in each step; the last draw counts.

        Yields:
            The initial noise, then that of each step: zeros where the step adds none.

        Raises:
            RuntimeError: the other process has ended.
        """
        if self._process is None:
            values = noise_process.torch_draws(seed, shape, dtype.name)
        else:
            values = _received(self._process, seed, shape, dtype)
        yield next(values)
        unused = np.zeros(shape, dtype)
        for count in draws:
            drawn = unused
            for _ in range(count):
                drawn = next(values)
            yield drawn


def _received(
    process: subprocess.Popen[bytes], seed: int, shape: Sequence[int], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yields what the other process draws."""
    assert process.stdin is not None and process.stdout is not None
    request = json.dumps({"seed": seed, "shape": list(shape), "dtype": dtype.name})
    process.stdin.write(request.encode() + b"\n")
    process.stdin.flush()
    while True:
        noise = np.empty(shape, dtype)
        # A buffered reader fills the array unless the stream ends.
        if process.stdout.readinto(noise.view(np.uint8).reshape(-1)) < noise.nbytes:  # type: ignore[attr-defined]
            raise RuntimeError(f"the process that draws noise ended with code {process.wait()}")
        yield noise
