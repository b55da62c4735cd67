"""Sparse attention of one model on one mesh: lists of keys, and the rule of each device's heads.

Axis letters: L layers, N heads.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cogvideox.model.config import TransformerConfig
from cogvideox.transformer.block_rules import Rule, SparseAttention
from cogvideox.transformer.tiling import Tiling
from cogvideox.transformer.tokens import TokenLayout
from splash_attention import BlockLists
from splash_attention.block_lists import SCALAR_MEMORY


class SparseTables[Array](NamedTuple):
    """Arrays of a sparse step, int32; another table of the same shapes runs the same program.

    Attributes:
        lists: those of `BlockLists`, by name.
        rule: the rule of the head at each place, [L, N], or [N] of one layer.
        order: the head at each place, the same shape; None leaves the heads where they are.
    """

    lists: dict[str, Array]
    rule: Array
    order: Array | None


@dataclasses.dataclass(frozen=True)
class SparseStep:
    """A sparse step.

    Attributes:
        lists: the keys that each tile of queries sees, by rule.
        rules: the rule of each head in the model's order, [L, N].
        tables: the arrays that the program takes.
        fields: what determines the program, as JSON: everything except the values of the tables.
    """

    lists: BlockLists
    rules: np.ndarray
    tables: SparseTables[np.ndarray]
    fields: dict[str, Any]

    def density(self) -> float:
        """Returns the share of the blocks that a step computes, over all layers and heads."""
        lengths = np.asarray(self.lists.lengths).sum(1)
        valid = np.count_nonzero(self.lists.valid)
        return float(lengths[self.rules].mean() / (self.lists.lengths.shape[1] * valid))


def make_sparse_step(
    sparse: SparseAttention,
    config: TransformerConfig,
    layout: TokenLayout,
    tp: int,
    sp: int,
    precision: str = "bf16",
) -> SparseStep:
    """Makes the lists, and orders the heads such that devices work equally.

    Args:
        layout: with a tiling.
        tp: devices along tp; heads stay with theirs.
        sp: devices along sp; each gets as many heads of a device along tp.
        precision: of attention.

    Raises:
        ValueError: the rules are of a model with other layers or heads, or too many.
    """
    assert layout.tiling is not None
    rules = sparse.table(config.num_layers, config.num_attention_heads)
    heads = np.bincount(rules.reshape(-1), minlength=len(sparse.all_rules))
    lists = make_lists(sparse.all_rules, layout.tiling, layout.padded, heads.tolist(), precision)
    if lists.scalar_bytes > SCALAR_MEMORY:
        raise ValueError(
            f"the lists of {len(sparse.all_rules)} rules, of dense layers too, take "
            f"{lists.scalar_bytes >> 10} KiB of a TPU core's scalar memory at this size; at most "
            f"{SCALAR_MEMORY >> 10} KiB are possible, so use fewer rules"
        )
    arrays = {name: np.asarray(getattr(lists, name)) for name in ("chunks", "lengths", "valid")}
    costs = arrays["lengths"].sum(1)[rules]
    of_devices = costs.reshape(len(rules), tp, sp, -1).sum(-1)
    order, placed = None, rules
    if (of_devices != of_devices[..., :1]).any():
        order = np.stack([balanced_order(layer, tp, sp) for layer in costs])
        placed = np.take_along_axis(rules, order, 1)
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    fields = {
        **shapes,
        "tiling": dataclasses.asdict(layout.tiling),
        "unroll": lists.unroll,
        "least_valid": lists.least_valid,
        "ordered": order is not None,
    }
    return SparseStep(lists, rules, SparseTables(arrays, placed, order), fields)


def make_lists(
    rules: Sequence[Rule],
    tiling: Tiling,
    rows: int,
    heads: Sequence[int] | None = None,
    precision: str = "bf16",
) -> BlockLists:
    """Returns the lists of each rule for the attention kernel.

    A tile visits a chunk if the rule keeps any pair of their tokens.

    Args:
        rows: length of the sequence, at least `tiling.rows`. Tiles past the tiling's visit text.
        heads: how many heads follow each rule.
        precision: of attention.
    """
    tiles, chunks = -(-rows // tiling.block_q), -(-rows // tiling.chunk)
    valid = [*tiling.valid, *[0] * (chunks - len(tiling.valid))]
    every = [i for i, keys in enumerate(valid) if keys]
    first = tiling.text_rows // tiling.chunk
    text = [i for i in every if i < first]
    lists = []
    for rule in rules:
        of_frames = [_of_frame(rule, tiling, frame) for frame in range(tiling.grid[0])]
        visited = [[*text, *(first + i for i in tile)] for tiles in of_frames for tile in tiles]
        of_text = [every] * (tiling.text_rows // tiling.block_q)
        after = tiles - len(of_text) - len(visited)
        lists.append([*of_text, *visited, *[text or every] * after])
    return BlockLists.from_lists(
        lists,
        block_q=tiling.block_q,
        chunk=tiling.chunk,
        valid=valid,
        precision=precision,
        heads=heads,
    )


def _of_frame(rule: Rule, tiling: Tiling, frame: int) -> list[list[int]]:
    """Returns for each tile of a frame the chunks of video that it visits."""
    lines = [(i, chunk) for i, chunk in enumerate(tiling.lines_of_chunks()) if chunk]
    reaches = [rule.at(abs(frame - other)) for other in range(tiling.grid[0])]
    found = []
    for first in range(0, tiling.frame_chunks, tiling.tile_chunks):
        own = [chunk for i, chunk in lines if first <= i < first + tiling.tile_chunks]
        start, stop = own[0].start, own[-1].stop
        gaps = [(i, max(0, chunk.start - stop + 1, start - chunk.stop + 1)) for i, chunk in lines]
        found.append(
            [
                other * tiling.frame_chunks + i
                for other, reach in enumerate(reaches)
                for i, gap in gaps
                if gap <= reach
            ]
        )
    return found


def balanced_order(costs: np.ndarray, groups: int, shards: int) -> np.ndarray:
    """Orders the heads of a layer such that the shards have nearly equal sums of costs.

    Heads stay in their group, of which each shard gets an equal number of consecutive heads. The
    costliest heads are placed first, each on the cheapest shard that has room.

    Args:
        costs: [N], such as the lengths of the heads' lists.
        groups: devices along tp.
        shards: devices along sp.

    Returns:
        The head at each place, [N].
    """
    order = []
    for heads in np.split(np.arange(costs.size), groups):
        room = heads.size // shards
        placed: list[list[int]] = [[] for _ in range(shards)]
        for head in sorted(heads.tolist(), key=lambda head: -costs[head]):
            open_shards = [shard for shard in placed if len(shard) < room]
            min(open_shards, key=lambda shard: sum(costs[i] for i in shard)).append(head)
        order += [head for shard in placed for head in sorted(shard)]
    return np.array(order, np.int32)
