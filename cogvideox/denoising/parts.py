"""Parts of a denoising run: consecutive steps that one denoiser runs.

Steps that attend sparsely and steps that reuse the difference of guidance have denoisers of their
own over the same weights.
"""

import itertools
from typing import NamedTuple


class Part(NamedTuple):
    """The steps from `start` to before `stop`."""

    start: int
    stop: int
    sparse: bool
    gated: bool


def split_steps(steps: int, dense_steps: int | None, guided_steps: int | None) -> list[Part]:
    """Splits a run into its parts; the arguments are those of `scheduler.Schedule`."""
    dense, guided = (steps if n is None else n for n in (dense_steps, guided_steps))
    return [
        Part(start, stop, start >= dense, start >= guided)
        for start, stop in itertools.pairwise(sorted({0, dense, guided, steps}))
    ]
