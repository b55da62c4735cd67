"""Checkpoints of the denoising loop; a killed run resumes from one bit for bit.

The noise generator is not saved: its draws depend only on the seed and are repeated.
"""

import dataclasses
import os
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
    """

    steps: int
    latents: np.ndarray
    previous_x0: np.ndarray


def write_checkpoint(path: Path, checkpoint: LoopCheckpoint, fingerprint: str) -> None:
    """Writes the checkpoint atomically; `fingerprint` identifies the run."""
    tensors = {"latents": checkpoint.latents, "previous_x0": checkpoint.previous_x0}
    write_tensors(path, tensors, {"fingerprint": fingerprint, "steps": str(checkpoint.steps)})


def read_checkpoint(
    path: Path, fingerprint: str, *, shape: tuple[int, ...], dtype: str, total: int
) -> LoopCheckpoint | None:
    """Reads the checkpoint to resume from.

    Args:
        shape: shape of the latents [B, T, C, H, W].
        dtype: dtype of the latents.
        total: number of steps of the run.

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
        holds = {name: (tensor.shape, tensor.dtype.name) for name, tensor in file.tensors.items()}
        if holds != {"latents": (shape, dtype), "previous_x0": (shape, "float32")}:
            raise ValueError(printable(f"its tensors are {holds}")[:300])
        steps = int(file.metadata.get("steps", "0"))
        if not 0 < steps < total:
            raise ValueError(f"it is after {steps} of {total} steps")
        tensors = file.read()
    except ValueError as error:
        print(f"ignoring checkpoint {path}: {printable(str(error))}")
        return None
    return LoopCheckpoint(steps, tensors["latents"], tensors["previous_x0"])
