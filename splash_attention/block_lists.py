"""Block-sparse attention as data: which chunks of keys each tile of queries visits.

A rule is one list of chunks for every tile of queries; each head follows a rule. Chunks and tiles
are consecutive tokens, so a caller orders and pads its tokens such that a chunk holds tokens that
are kept or dropped together.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from splash_attention.block_sizes import BlockSizes

# By precision: chunks in one unrolled body at most, as the dense kernel takes them, and the chunks
# that would take as long as filling and draining a body (137 and 300 bundles on v6e).
_BODY = {"bf16": (64, 1), "int8_qk": (192, 2)}
_LANES = 128
SCALAR_MEMORY = 15 * 2**16  # bytes for lists; the compiler and the other tables get 64 KiB


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLists:
    """Lists of chunks of keys, by rule and tile of queries; build it with `from_lists`.

    The arrays are leaves of a pytree: passed through `jax.jit` as arguments, another table of rules
    of the same shape does not recompile.

    Attributes:
        chunks: int32 [rules, tiles, entries]. Unused entries repeat the first.
        lengths: int32 [rules, tiles], entries in use.
        valid: int32 [chunks], valid keys at the start of each chunk.
        block_q: queries of a tile, a multiple of 128.
        chunk: keys of a chunk, a multiple of 128.
        unroll: entries of one unrolled body of the kernel.
        least_valid: the smallest number of valid keys of a listed chunk.
    """

    chunks: jax.Array | np.ndarray
    lengths: jax.Array | np.ndarray
    valid: jax.Array | np.ndarray
    block_q: int = dataclasses.field(metadata={"static": True})
    chunk: int = dataclasses.field(metadata={"static": True})
    unroll: int = dataclasses.field(metadata={"static": True})
    least_valid: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_lists(
        cls,
        lists: Sequence[Sequence[Sequence[int]]],
        *,
        block_q: int,
        chunk: int,
        valid: Sequence[int],
        precision: str = "bf16",
        heads: Sequence[int] | None = None,
    ) -> "BlockLists":
        """Build the tables from lists[rule][tile] = chunks to visit, in order.

        Args:
            lists: for each rule and tile, at least one chunk, none twice, none without valid keys.
            block_q: queries of a tile, a multiple of 128.
            chunk: keys of a chunk, a multiple of 128.
            valid: for each chunk of the keys, how many keys at its start are valid. The others are
                padding and may hold anything.
            precision: of the attention that visits them; it affects the best length of a body.
            heads: how many heads follow each rule, which affects it too. Default: as many each.

        Raises:
            ValueError: a size or a list is not as described.
        """
        for name, value in (("block_q", block_q), ("chunk", chunk)):
            if value < _LANES or value % _LANES:
                raise ValueError(f"{name} is {value}; it must be a positive multiple of {_LANES}")
        wrong = [i for i, keys in enumerate(valid) if not 0 <= keys <= chunk]
        if wrong or not len(valid):
            raise ValueError(
                f"valid[{wrong[0]}] is {valid[wrong[0]]}; chunks hold 0 to {chunk} keys"
                if wrong
                else "valid is empty; there must be at least one chunk of keys"
            )
        tiles = {len(rule) for rule in lists}
        if len(tiles) != 1 or 0 in tiles:
            raise ValueError(f"every rule needs a list for each tile; got {sorted(tiles)} lists")
        for rule, of_tiles in enumerate(lists):
            for tile, visited in enumerate(of_tiles):
                _check_list(visited, valid, f"list of rule {rule}, tile {tile}")
        lengths = np.array([[len(visited) for visited in rule] for rule in lists])
        unroll = _best_unroll(lengths, *_BODY[precision], heads)
        chunks = np.empty((*lengths.shape, -(-lengths.max() // unroll) * unroll), np.int32)
        for rule, of_tiles in enumerate(lists):
            for tile, visited in enumerate(of_tiles):
                chunks[rule, tile, : len(visited)] = visited
                chunks[rule, tile, len(visited) :] = visited[0]
        ends = np.array(valid, np.int32)
        least = int(ends[np.unique(chunks)].min())
        return cls(chunks, lengths.astype(np.int32), ends, block_q, chunk, unroll, least)

    @property
    def keys(self) -> int:
        """Number of keys, padding included."""
        return self.valid.shape[0] * self.chunk

    @property
    def queries(self) -> int:
        """Number of queries that the tiles cover."""
        return self.chunks.shape[1] * self.block_q

    @property
    def block_sizes(self) -> BlockSizes:
        """Return the kernel's tile sizes: all keys in one block."""
        group = self.chunk * self.unroll
        return BlockSizes(self.block_q, -(-self.keys // group) * group, self.chunk, self.unroll)

    @property
    def scalar_bytes(self) -> int:
        """Bytes of a TPU core's scalar memory that the lists take; it has `SCALAR_MEMORY`."""
        rules, tiles, entries = self.chunks.shape
        return 4 * rules * (-(-tiles // 8) * 8) * (-(-entries // _LANES) * _LANES)

    def rule_of_heads(
        self, rule: jax.Array | None, heads: tuple[int, ...], queries: int, keys: int
    ) -> jax.Array:
        """Check that the lists fit an attention; return the rule of each head.

        Args:
            rule: as given; None takes the first.
            heads: shape of the heads.
            queries, keys: number of each, padding included.

        Raises:
            ValueError: the lists are of other lengths, or the rules of other heads.
        """
        tiles, chunks = self.chunks.shape[1], self.valid.shape[0]
        fit = -(-queries // self.block_q), -(-keys // self.chunk)
        if fit != (tiles, chunks):
            raise ValueError(
                f"block_lists are of {tiles} tiles of {self.block_q} queries and {chunks} chunks "
                f"of {self.chunk} keys; {queries} queries and {keys} keys need {fit}"
            )
        if rule is None:
            rule = jnp.zeros(heads, jnp.int32)
        if rule.shape != heads:
            raise ValueError(f"rule is {rule.shape}; q has heads {heads}")
        return rule

    def density(self) -> np.ndarray:
        """Return the share of (tile, chunk) pairs that each rule visits: [rules]."""
        return np.asarray(self.lengths).mean(1) / self.valid.shape[0]

    def keep(self) -> jax.Array:
        """Return which keys each tile of queries sees: bool [rules, tiles, keys]."""
        entry = jax.nn.one_hot(self.chunks, self.valid.shape[0], dtype=jnp.bool_)
        used = jnp.arange(entry.shape[2]) < jnp.asarray(self.lengths)[..., None]
        visited = (entry & used[..., None]).any(2)
        return jnp.repeat(visited, self.chunk, axis=2) & self.valid_keys()

    def valid_keys(self) -> jax.Array:
        """Return which keys are not padding: bool [keys]."""
        return (jnp.arange(self.chunk) < jnp.asarray(self.valid)[:, None]).reshape(-1)


def _check_list(visited: Sequence[int], valid: Sequence[int], name: str) -> None:
    """Check one list of chunks.

    Raises:
        ValueError: it is empty, or names a chunk twice, or one without valid keys.
    """
    if not len(visited):
        raise ValueError(f"{name} is empty; every query needs a key")
    outside = [c for c in visited if not 0 <= c < len(valid)]
    if outside:
        raise ValueError(f"{name} names chunk {outside[0]}; there are {len(valid)}")
    if len(set(visited)) != len(visited):
        twice = next(c for c in visited if list(visited).count(c) > 1)
        raise ValueError(f"{name} names chunk {twice} twice; its keys would count twice")
    without = [c for c in visited if not valid[c]]
    if without:
        raise ValueError(f"{name} names chunk {without[0]}, which has no valid key")


def _best_unroll(lengths: np.ndarray, most: int, overhead: int, heads: Sequence[int] | None) -> int:
    """Return the entries of a body that make the lists of all heads together shortest."""
    weights = np.ones(len(lengths)) if heads is None else np.asarray(heads)

    def cost(unroll: int) -> float:
        return float((-(-lengths // unroll) * (unroll + overhead)).sum(1) @ weights)

    # Of equals the longest, as the dense kernel takes the fewest bodies.
    return min(range(min(most, lengths.max()), 0, -1), key=cost)
