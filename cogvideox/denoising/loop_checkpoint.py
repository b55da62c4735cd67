"""The state of the denoising loop on disk, from which a killed run goes on bit for bit.

The noise generator is not saved: its draws depend on the seed alone and are drawn again.
"""

import dataclasses
from pathlib import Path

import numpy as np
import safetensors
from safetensors.numpy import save

from runtime.files import atomic_path


@dataclasses.dataclass(frozen=True)
class LoopCheckpoint:
    """The loop after `steps` steps.

    Attributes:
        latents: [B, T, C, H, W] in the run's dtype, padding frames included.
        previous_x0: the same in float32, the last step's prediction, which DPM uses.
    """

    steps: int
    latents: np.ndarray
    previous_x0: np.ndarray


def write_checkpoint(path: Path, checkpoint: LoopCheckpoint, fingerprint: str) -> None:
    """Writes atomically; `fingerprint` says of which run it is."""
    tensors = {"latents": checkpoint.latents, "previous_x0": checkpoint.previous_x0}
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    stamp = {"fingerprint": fingerprint, "steps": str(checkpoint.steps)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata=stamp))


def read_checkpoint(path: Path, fingerprint: str) -> LoopCheckpoint | None:
    """The state to go on from; None, with a printed reason, if another run's or damaged."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            stamp = file.metadata() or {}
            if stamp.get("fingerprint") != fingerprint:
                print(f"not going on from {path}: it is of another run")
                return None
            tensors = (file.get_tensor(name) for name in ("latents", "previous_x0"))
            return LoopCheckpoint(int(stamp["steps"]), *tensors)
    except (OSError, safetensors.SafetensorError) as error:
        print(f"not going on from {path}: {error}")
        return None
