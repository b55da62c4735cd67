"""Checkpoints of the denoising loop; a killed run resumes from one bit for bit.

The noise generator is not saved: its draws depend only on the seed and are repeated.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from runtime.tensor_files import check_header, read_header, write_tensors
from runtime.text import printable


@dataclasses.dataclass(frozen=True)
class LoopCheckpoint:
    """State of the loop after `steps` steps.

    Attributes:
        latents: [B, T, C, H, W] in the run's dtype, padding frames included.
        previous_x0: the last step's prediction, same shape, float32; DPM uses it.
        residual: of the video tokens [samples, T H W, E] in the run's dtype, if the next step
            reuses it.
        difference: of guidance, [B, T, C, H, W] float32, if the next step reuses it.
    """

    steps: int
    latents: np.ndarray
    previous_x0: np.ndarray
    residual: np.ndarray | None = None
    difference: np.ndarray | None = None

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays that the state has, by name."""
        names = ("latents", "previous_x0", "residual", "difference")
        found = {name: getattr(self, name) for name in names}
        return {name: array for name, array in found.items() if array is not None}


# Shape and dtype of each tensor of a checkpoint.
TensorTypes = Mapping[str, tuple[tuple[int, ...], str]]


def write_checkpoint(path: Path, checkpoint: LoopCheckpoint, fingerprint: str) -> None:
    """Writes the checkpoint atomically; `fingerprint` identifies the run."""
    stamp = {"fingerprint": fingerprint, "steps": str(checkpoint.steps)}
    write_tensors(path, checkpoint.tensors, stamp)


def read_checkpoint(
    path: Path, fingerprint: str, *, total: int, tensor_types: Callable[[int], TensorTypes]
) -> LoopCheckpoint | None:
    """Reads the checkpoint to resume from.

    Args:
        total: number of steps of the run.
        tensor_types: what a checkpoint holds after this many steps.

    Returns:
        The checkpoint; or None, after printing the reason, if it belongs to a different run, is
        damaged, or does not fit this run.
    """
    if not os.path.lexists(path):
        return None
    try:
        file = read_header(path)
        if file.metadata.get("fingerprint") != fingerprint:
            raise ValueError("it belongs to a different run")
        check_header(file)
        steps = int(file.metadata.get("steps", "0"))
        if not 0 < steps < total:
            raise ValueError(f"it is after {steps} of {total} steps")
        holds = {name: (tensor.shape, tensor.dtype.name) for name, tensor in file.tensors.items()}
        if holds != tensor_types(steps):
            raise ValueError(printable(f"its tensors are {holds}")[:300])
        tensors = file.read()
    except ValueError as error:
        print(f"ignoring checkpoint {path}: {printable(str(error))}")
        return None
    return LoopCheckpoint(steps, **tensors)
