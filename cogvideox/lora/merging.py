"""Adding LoRAs to weights while these travel from the files to the devices.

W' = W + sum of weight * scale * up @ down, in float32, and then one rounding to the run's dtype. It
is done for the part of a weight that one device gets, so no process ever holds a whole merged
model. A LoRA is undone by reading the weights again, which gives the base model's bits.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from cogvideox.lora.reading import LoraFile, Update
from runtime.tensor_files import RowReader, StoredTensor


@dataclasses.dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A stored weight with the updates of LoRAs.

    Attributes:
        updates: each with the weight that the user gives its LoRA.
    """

    updates: tuple[tuple[Update, float], ...] = ()

    def part(self, index: tuple[slice, ...], read_rows: RowReader) -> np.ndarray:
        """A part of the merged weight, float32; see `StoredTensor.part`."""
        merged = super().part(index, read_rows).astype(np.float32)
        for update, weight in self.updates:
            # The same rows of the first factor, the same columns of the second.
            up = read_rows(update.up.mapped(), (index[0],)).astype(np.float32)
            up = up.reshape(len(merged), update.rank)
            up *= np.float32(weight * update.scale)
            down = update.down.mapped()[(slice(None), *index[1:])].astype(np.float32)
            merged += np.tensordot(up, down, axes=1)
        return merged


def merged(
    stored: Mapping[str, StoredTensor], loras: Sequence[tuple[LoraFile, float]]
) -> dict[str, StoredTensor]:
    """Returns a model's stored weights with LoRAs, each with its weight; reads no tensor."""
    updates: dict[str, list[tuple[Update, float]]] = {}
    for file, weight in loras:
        for name, update in file.updates.items():
            updates.setdefault(name, []).append((update, weight))
    return {
        name: MergedTensor(**vars(tensor), updates=tuple(updates[name]))
        if name in updates
        else tensor
        for name, tensor in stored.items()
    }
