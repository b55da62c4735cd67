"""Rules of block-sparse attention: which tokens a token of the video attends to.

Every published static rule is one family: a token keeps the tokens of another frame whose row is
near enough, and how near depends on the distance of the frames. All rules keep all text, and text
attends to everything.

Axis letters: L layers, N heads.
"""

import dataclasses

import numpy as np

from cogvideox.transformer.tiling import Tiling

ALL = 1 << 16  # a reach: all rows of the frame
NONE = -1  # a reach: no row of the frame
_RADIAL_BLOCK = 128  # the smallest window of `radial`, tokens


@dataclasses.dataclass(frozen=True)
class Rule:
    """Keeps the tokens of frames at distance d whose row is at most reach[d] away.

    Rows are those of `Tiling`: columns of the frame where its lines are columns.

    Attributes:
        reach: by distance of the frames; the last value also holds for larger distances. ALL keeps
            the whole frame, NONE nothing of it.

    Raises:
        ValueError: a token would not see itself, or a reach is impossible.
    """

    reach: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.reach or not all(NONE <= reach <= ALL for reach in self.reach):
            raise ValueError(f"a rule reaches 0 to {ALL} rows, or {NONE} for none: {self.reach}")
        if self.reach[0] < 0:
            raise ValueError("a rule must keep the row of the token itself")

    def at(self, frame_gap: int) -> int:
        """Returns the largest distance in rows that it keeps between frames at this distance."""
        return self.reach[min(frame_gap, len(self.reach) - 1)]

    def keep(self, frame_gap: int, row_gap: int) -> bool:
        """Returns whether tokens at these distances see each other."""
        return row_gap <= self.at(frame_gap)


DENSE = Rule((ALL,))


def spatial(frames: int = 1) -> Rule:
    """Keeps neighbouring frames whole.

    Source: the spatial heads of Sparse VideoGen (arXiv 2502.01776), whose window in tokens is cut
    here at frames.
    """
    return Rule((*(ALL,) * (frames + 1), NONE))


def temporal(rows: int = 3) -> Rule:
    """Keeps neighbouring rows of every frame.

    Source: the temporal heads of Sparse VideoGen, which keep nearly the same place of every frame.
    """
    return Rule((rows,))


def both(frames: int = 0, rows: int = 3) -> Rule:
    """Keeps what `spatial` or `temporal` keeps."""
    return Rule((*(ALL,) * (frames + 1), rows))


def radial(decay: float, tiling: Tiling) -> Rule:
    """Keeps a window around the token's place that halves as the distance of the frames doubles.

    Frames of L tokens keep |p - p'| <= w(d), with p the place in the frame: w = L for d = 0 and 1,
    else max(128, decay 2^bits(L) / 2^bits(d)), where bits(n) is the length of n in binary. A rule
    keeps whole rows, so it keeps at least that.

    Source: Radial Attention (arXiv 2506.19852), attn_mask.py of its code.
    """
    tokens, line = tiling.frame_lines * tiling.line_tokens, tiling.line_tokens
    reach = [ALL, ALL]
    for gap in range(2, tiling.grid[0]):
        window = max(_RADIAL_BLOCK, int(decay * 2 ** tokens.bit_length() / 2 ** gap.bit_length()))
        # Tokens n > 0 rows apart are at least (n - 1) x line + 1 places apart.
        rows = (window - 1) // line + 1
        reach.append(ALL if rows >= tiling.frame_lines else rows)
    return Rule(tuple(reach))


@dataclasses.dataclass(frozen=True)
class SparseAttention:
    """What attention keeps in a sparse step.

    Attributes:
        rules: at least one.
        heads: the rule of each head, [L][N] indices into `rules`; None gives all heads the first.
        dense_layers: the first layers that keep everything.

    Raises:
        ValueError: there is no rule, or a head follows none of them.
    """

    rules: tuple[Rule, ...]
    heads: tuple[tuple[int, ...], ...] | None = None
    dense_layers: int = 0

    def __post_init__(self) -> None:
        of_heads = self.heads or ((0,),)
        if not all(0 <= rule < len(self.rules) for layer in of_heads for rule in layer):
            raise ValueError(f"heads follow rules 0 to {len(self.rules) - 1}")

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """The rules, and after them the one of the dense layers if there are any."""
        return (*self.rules, DENSE) if self.dense_layers else self.rules

    def table(self, layers: int, heads: int) -> np.ndarray:
        """Returns the rule of each head, int32 [L, N] indices into `all_rules`.

        Raises:
            ValueError: the rules are of a model with other layers or heads.
        """
        if self.heads is None:
            table = np.zeros((layers, heads), np.int32)
        else:
            if len({len(layer) for layer in self.heads}) > 1:
                raise ValueError("every layer needs a rule for each head")
            table = np.array(self.heads, np.int32)
            if table.shape != (layers, heads):
                raise ValueError(
                    f"the rules are for {table.shape[0]} layers of {table.shape[1]} heads; the "
                    f"model has {layers} of {heads}"
                )
        table[: self.dense_layers] = len(self.rules)
        return table
