"""Order of the tokens for block-sparse attention: chunks of neighbouring lines of one frame.

Attention over lists of chunks keeps or drops 128 or 256 keys at once, so a chunk holds tokens that
lie together: a few lines of one frame, padded. At 768x1360, 3 rows of 85 tokens fill a chunk of 256
but for one, and a tile of queries has two chunks. A line is a row of the frame, or a column where
columns fit better, as in portrait videos. Text comes first, in tiles of its own.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import numpy as np

_LANES = 128
# Keys of a chunk and chunks of a tile of queries to choose from, with the time of a score relative
# to the best of them (v6e; the tuned tables of splash_attention). Large tiles make rules coarser.
_SHAPES = {(256, 2): 1.0, (256, 3): 1.02, (256, 4): 1.05, (256, 1): 1.1, (128, 1): 1.5}
_LONGEST_LINE = 512  # tokens


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Rows of a token sequence whose chunks and tiles each hold lines of one frame.

    Attributes:
        grid: video tokens along time, height and width.
        text: text tokens.
        columns: lines are columns of the frame; else they are its rows.
        lines: lines of a chunk.
        chunk: tokens of a chunk, padding included; a multiple of 128.
        tile_chunks: chunks of a tile of queries.
    """

    grid: tuple[int, int, int]
    text: int
    columns: bool
    lines: int
    chunk: int
    tile_chunks: int

    @property
    def block_q(self) -> int:
        """Tokens of a tile of queries."""
        return self.chunk * self.tile_chunks

    @property
    def frame_lines(self) -> int:
        """Lines of a frame."""
        return self.grid[2] if self.columns else self.grid[1]

    @property
    def line_tokens(self) -> int:
        """Tokens of a line."""
        return self.grid[1] if self.columns else self.grid[2]

    @property
    def frame_chunks(self) -> int:
        """Chunks of a frame, those without tokens included that fill its last tile."""
        used = -(-self.frame_lines // self.lines)
        return -(-used // self.tile_chunks) * self.tile_chunks

    @property
    def text_rows(self) -> int:
        """Rows of the tiles of text, before the first frame."""
        return -(-self.text // self.block_q) * self.block_q

    @property
    def rows(self) -> int:
        """Rows of all tiles."""
        return self.text_rows + self.grid[0] * self.frame_chunks * self.chunk

    @property
    def padding(self) -> float:
        """Share of the rows that hold no token."""
        tokens = self.text + int(np.prod(self.grid))
        return 1 - tokens / self.rows

    @cached_property
    def video_rows(self) -> np.ndarray:
        """The row of each video token, int [T H W] in the order of time, height and width."""
        frames, height, width = np.indices(self.grid)
        line, place = (width, height) if self.columns else (height, width)
        chunk = frames * self.frame_chunks + line // self.lines
        row = chunk * self.chunk + line % self.lines * self.line_tokens + place
        return (self.text_rows + row).reshape(-1)

    @property
    def valid(self) -> list[int]:
        """Number of tokens at the start of each chunk; chunks of padding have none."""
        text_chunks = self.text_rows // self.chunk
        of_text = [min(max(self.text - i * self.chunk, 0), self.chunk) for i in range(text_chunks)]
        of_frame = [len(lines) * self.line_tokens for lines in self.lines_of_chunks()]
        return of_text + of_frame * self.grid[0]

    def lines_of_chunks(self) -> Iterator[range]:
        """Yields the lines of each chunk of a frame."""
        for i in range(self.frame_chunks):
            first = i * self.lines
            yield range(first, max(first, min(first + self.lines, self.frame_lines)))


def choose_tiling(grid: tuple[int, int, int], text: int) -> Tiling:
    """Returns the tiling with the fewest padded scores; it does not depend on the device.

    Args:
        grid: video tokens along time, height and width.
        text: text tokens.

    Raises:
        ValueError: a line of tokens is longer than any chunk.
    """
    fitting = []
    for columns in (False, True):
        length = grid[1] if columns else grid[2]
        longer = -(-length // _LANES) * _LANES  # for lines longer than the chunks above
        shapes = _SHAPES if length <= 256 else {(longer, 1): 1.1}
        for (chunk, tile_chunks), cost in shapes.items():
            if length <= min(chunk, _LONGEST_LINE):
                tiling = Tiling(grid, text, columns, chunk // length, chunk, tile_chunks)
                fitting.append((tiling.frame_chunks * chunk * cost, len(fitting), tiling))
    if not fitting:
        raise ValueError(
            f"sparse attention needs rows or columns of at most {_LONGEST_LINE} tokens; a frame "
            f"has {grid[1]} rows of {grid[2]} tokens"
        )
    return min(fitting)[2]
