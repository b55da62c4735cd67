"""Tilings and rules of sparse attention, against plain masks of tokens for every published size."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cogvideox.model.settings import LatentShape
from cogvideox.transformer.block_rules import (
    ALL,
    DENSE,
    NONE,
    Rule,
    SparseAttention,
    both,
    radial,
    spatial,
    temporal,
)
from cogvideox.transformer.sparse_step import balanced_order, make_lists
from cogvideox.transformer.tiling import Tiling, choose_tiling
from cogvideox.transformer.tokens import TokenLayout

# Grids of tokens (time, height, width), and text tokens.
SIZES = {
    "1.5 768x1360x81": ((11, 48, 85), 226),
    "1.5 1360x768x81": ((11, 85, 48), 226),
    "1.5 720x1280x81": ((11, 45, 80), 226),
    "1.5 1280x720x81": ((11, 80, 45), 226),
    "1.5 768x1360x161": ((21, 48, 85), 226),
    "1.0 480x720x49": ((13, 30, 45), 226),
    "toyworld 96x160x17": ((3, 6, 10), 32),
}


@pytest.fixture(scope="module", params=SIZES)
def tiling(request) -> Tiling:
    return choose_tiling(*SIZES[request.param])


def test_chunks_hold_lines_of_one_frame(tiling: Tiling):
    rows = tiling.video_rows.reshape(tiling.grid)
    assert len(set(rows.flat)) == rows.size
    assert rows.min() >= tiling.text_rows >= tiling.text
    assert rows.max() < tiling.rows
    offsets = np.full(tiling.rows, -1)
    offsets[: tiling.text] = np.arange(tiling.text) % tiling.chunk
    offsets[rows] = rows % tiling.chunk
    valid = np.array(tiling.valid)
    # The tokens of a chunk are its first rows.
    counts = (offsets.reshape(-1, tiling.chunk) >= 0).sum(1)
    assert counts.tolist() == valid.tolist()
    assert (offsets.reshape(-1, tiling.chunk).max(1) == valid - 1).all()
    for frame in rows:
        tiles = set((frame // tiling.block_q).flat)
        assert len(tiles) * tiling.tile_chunks == tiling.frame_chunks
        lines = frame.T if tiling.columns else frame
        assert (np.diff(lines // tiling.chunk, axis=1) == 0).all()


@pytest.mark.parametrize(
    ("name", "padding"),
    [("1.5 768x1360x81", 0.011), ("1.5 1360x768x81", 0.011), ("1.5 720x1280x81", 0.075),
     ("1.0 480x720x49", 0.133)],
)  # fmt: skip
def test_padding_is_small(name, padding):
    assert choose_tiling(*SIZES[name]).padding < padding


def test_long_lines():
    tall = choose_tiling((5, 700, 300), 226)
    assert (tall.columns, tall.line_tokens, tall.chunk) == (False, 300, 384)
    with pytest.raises(ValueError, match="at most 512 tokens; a frame has 600 rows of 700"):
        choose_tiling((5, 600, 700), 226)


def _window(decay: float, gap: int, tokens: int) -> float:
    if gap <= 1:
        return tokens
    return max(128, decay * 2 ** len(f"{tokens:b}") / 2 ** len(f"{gap:b}"))


# Makes the rule; what decides its mask, from the distance of the frames and the tokens of a frame;
# and the mask of this and of the distances of two tokens in lines and places.
FORMULAS = {
    "spatial": (lambda t: spatial(), lambda gap, _: gap <= 1, lambda near, line, place: near),
    "temporal": (lambda t: temporal(3), lambda *_: True, lambda _, line, place: line <= 3),
    "same frame or 3 rows": (
        *(lambda t: both(0, 3), lambda gap, _: gap == 0),
        lambda same, line, place: same | (line <= 3),
    ),
    "neighbours or same row": (
        *(lambda t: both(1, 0), lambda gap, _: gap <= 1),
        lambda near, line, place: near | (line == 0),
    ),
    "radial": (
        *(lambda t: radial(0.5, t), lambda gap, tokens: _window(0.5, gap, tokens)),
        lambda window, line, place: place <= window,
    ),
}


@functools.cache
def coarsened(name: str, key: object, frame: Tiling) -> np.ndarray:
    """Which tiles of one frame keep any token of each chunk of another, from all their tokens."""
    _, height, width = frame.grid
    y, x = (place.reshape(-1) for place in np.indices((height, width), np.int16))
    line = x if frame.columns else y
    place = x * height + y if frame.columns else y * width + x
    order = np.argsort(frame.video_rows)
    line, place = line[order], place[order]
    tokens = FORMULAS[name][2](key, np.abs(line[:, None] - line), np.abs(place[:, None] - place))
    tokens = np.broadcast_to(tokens, (place.size, place.size))
    rows = frame.video_rows[order]
    of_tile, of_chunk = (
        np.unique(rows // size, return_index=True)[1][1:] for size in (frame.block_q, frame.chunk)
    )
    by_tile = np.stack([part.any(0) for part in np.split(tokens, of_tile)])
    return np.stack([part.any(1) for part in np.split(by_tile, of_chunk, axis=1)], axis=1)


@pytest.mark.parametrize("name", FORMULAS)
def test_lists_equal_the_mask_of_tokens_coarsened(name, tiling: Tiling):
    make_rule, key, _ = FORMULAS[name]
    lists = make_lists([make_rule(tiling)], tiling, tiling.rows)
    text = tiling.text_rows // tiling.chunk
    visits = np.zeros((lists.chunks.shape[1], len(lists.valid)), np.bool_)
    for tile, visited in enumerate(visits):
        visited[lists.chunks[0, tile, : lists.lengths[0, tile]]] = True
    of_text, of_video = np.split(visits, [tiling.text_rows // tiling.block_q])
    valid = np.array(tiling.valid) > 0
    assert (of_text == valid).all()  # text sees every token
    assert (of_video[:, :text] == valid[:text]).all()  # and every token the text
    frames, one = tiling.grid[0], dataclasses.replace(tiling, grid=(1, *tiling.grid[1:]))
    found = of_video[:, text:].reshape(frames, -1, frames, tiling.frame_chunks)
    for a in range(frames):
        for b in range(frames):
            expected = coarsened(name, key(abs(a - b), one.video_rows.size), one)
            assert (found[a, :, b, : expected.shape[1]] == expected).all()
            assert not found[a, :, b, expected.shape[1] :].any()


def test_rows_past_the_tiling_see_text_only():
    tiling = choose_tiling((3, 6, 10), 32)
    lists = make_lists([temporal(1), DENSE], tiling, tiling.rows + 200)
    assert lists.queries >= tiling.rows + 200
    assert lists.lengths[:, -2:].tolist() == [[1, 1], [1, 1]]
    assert lists.chunks[:, -2:, 0].tolist() == [[0, 0], [0, 0]]
    # A run without text has no chunk of text to see.
    assert make_lists([temporal(1)], choose_tiling((3, 6, 10), 0), 640).lengths[0, -1] == 3


@pytest.mark.parametrize(
    ("reach", "said"),
    [((), "0 to 65536"), ((NONE,), "the row of the token itself"), ((1, -2), "0 to 65536"),
     ((ALL + 1,), "0 to 65536")],
)  # fmt: skip
def test_impossible_rules(reach, said):
    with pytest.raises(ValueError, match=said):
        Rule(reach)


def test_rules_of_heads():
    sparse = SparseAttention((temporal(), spatial()), ((0, 1), (1, 0), (1, 1)), dense_layers=1)
    assert sparse.all_rules == (temporal(), spatial(), DENSE)
    assert sparse.table(3, 2).tolist() == [[2, 2], [1, 0], [1, 1]]
    assert SparseAttention((temporal(),)).table(2, 3).tolist() == [[0] * 3] * 2
    with pytest.raises(ValueError, match="3 layers of 2 heads; the model has 42 of 48"):
        sparse.table(42, 48)
    for heads in (((0, 2),), ((-1,),)):
        with pytest.raises(ValueError, match="heads follow rules 0 to 1"):
            SparseAttention((temporal(), spatial()), heads)
    with pytest.raises(ValueError):
        SparseAttention(())


def test_shards_get_equal_work():
    costs = np.array([9, 1, 1, 1, 1, 9, 9, 9])
    order = balanced_order(costs, groups=1, shards=4)
    assert sorted(order.tolist()) == list(range(8))
    assert costs[order].reshape(4, 2).sum(1).tolist() == [10, 10, 10, 10]
    # Heads stay with their device along tp.
    order = balanced_order(costs, groups=2, shards=2)
    assert set(order[:4].tolist()) == {0, 1, 2, 3}
    assert costs[order].reshape(4, 2).sum(1).tolist() == [10, 2, 18, 10]


@pytest.mark.parametrize("grid", [(2, 6, 10), (2, 10, 6)])
def test_layout_places_tokens_by_the_tiling(grid):
    rng = np.random.default_rng(0)
    shape = LatentShape(1, grid[0] * 2, 4, grid[1] * 2, grid[2] * 2)
    tiling = choose_tiling(grid, 16)
    plain = TokenLayout(shape, 2, 2, 16, padded=140)
    tiled = TokenLayout(shape, 2, 2, 16, padded=tiling.rows + 128, tiling=tiling)
    latents = rng.normal(size=shape.sizes).astype(np.float32)
    tokens = tiled.from_latents(latents)
    assert (tiled.to_latents(tokens) == latents).all()
    assert (tokens[:, tiled.video] == plain.from_latents(latents)[:, plain.video]).all()
    rows = jnp.arange(128, tiled.padded)
    assert (np.asarray(tiled.is_video(rows)) == np.isin(rows, tiled.video)).all()
    rows = jnp.arange(8, 40)[:, None]
    assert (np.asarray(plain.is_video(rows)) == (rows >= 16)).all()
