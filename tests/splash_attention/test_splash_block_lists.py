"""Attention over lists of chunks: equals the dense scores masked by the lists."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from splash_attention import (
    BlockLists,
    BlockSizes,
    reference_attention,
    sequence_minor_attention,
    splash_attention,
)
from tests.splash_attention.softmax import relative_error

FLOAT32 = 2e-6  # sums of a few hundred products, rounded
BFLOAT16 = 4e-3  # roundings of q, p and the output to 8 bits
INT8 = 1.2e-2  # 8e-3 of the dense kernel, and fewer keys to average over
CHUNK, TILE, D = 128, 128, 64
HEADS, RULES = 4, 3


def random_lists(rng, tiles, chunks, valid, rules=RULES):
    def some(tile):
        usable = [c for c in range(chunks) if valid[c]]
        size = rng.integers(1, len(usable) + 1)
        return [int(c) for c in rng.permutation(usable)[:size]]

    lists = [[some(tile) for tile in range(tiles)] for _ in range(rules)]
    return BlockLists.from_lists(lists, block_q=TILE, chunk=CHUNK, valid=valid)


def every_chunk(tiles, chunks, valid):
    lists = [[list(range(chunks))] * tiles]
    return BlockLists.from_lists(lists, block_q=TILE, chunk=CHUNK, valid=valid)


def inputs(rng, queries, keys, dtype="float32", heads=HEADS, head_dim=D):
    shapes = ((heads, queries, head_dim), (heads, keys, head_dim), (heads, keys, head_dim))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def error(got, q, k, v, lists, rule):
    expected = reference_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), block_lists=lists, rule=rule
    )
    return relative_error(got.astype(jnp.float32), expected)


def test_reference_equals_a_mask_written_out():
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, 200, 300)
    valid = [128, 0, 30]
    lists = random_lists(rng, 2, 3, valid)
    rule = np.array([0, 1, 2, 1])
    got = reference_attention(q, k, v, block_lists=lists, rule=jnp.asarray(rule))
    for head in range(HEADS):
        for query in range(200):
            visited = lists.chunks[rule[head], query // TILE]
            keys = [c * CHUNK + i for c in set(visited) for i in range(valid[c])]
            scores = np.asarray(k)[head, keys] @ np.asarray(q)[head, query] / 8
            weights = np.exp(scores - scores.max())
            expected = weights @ np.asarray(v)[head, keys] / weights.sum()
            np.testing.assert_allclose(got[head, query], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [("float32", "bf16", FLOAT32), ("bfloat16", "bf16", BFLOAT16), ("bfloat16", "int8_qk", INT8)],
)
def test_random_lists(seed, dtype, precision, tolerance):
    rng = np.random.default_rng(seed)
    queries, keys = (int(rng.integers(n - 127, n + 1)) for n in (384, 640))
    q, k, v = inputs(rng, queries, keys, dtype)
    # The keys of the last chunk end with the array; other chunks have padding of their own.
    valid = [*rng.integers(1, CHUNK + 1, size=4), keys - 4 * CHUNK]
    lists = random_lists(rng, 3, 5, [int(n) for n in valid])
    rule = jnp.asarray(rng.integers(0, RULES, size=HEADS), jnp.int32)
    got = splash_attention(
        q, k, v, block_lists=lists, rule=rule, precision=precision, interpret=True
    )
    assert error(got, q, k, v, lists, rule) < tolerance


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["bounded", "online"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_list_of_every_chunk_equals_the_dense_kernel_bit_for_bit(dtype, scale):
    rng = np.random.default_rng(1)
    q, k, v = inputs(rng, 300, 500, dtype)
    lists = every_chunk(3, 4, [128, 128, 128, 500 - 384])
    sizes = BlockSizes(TILE, 4 * CHUNK, CHUNK, lists.unroll)
    dense = splash_attention(q * scale, k, v, block_sizes=sizes, interpret=True)
    listed = splash_attention(q * scale, k, v, block_lists=lists, interpret=True)
    np.testing.assert_array_equal(listed, dense)


def test_every_chunk_in_several_bodies_equals_the_dense_kernel_bit_for_bit():
    rng = np.random.default_rng(2)
    q, k, v = inputs(rng, 128, 512)
    lists = dataclasses.replace(every_chunk(1, 4, [128] * 4), unroll=2)
    dense = splash_attention(q, k, v, block_sizes=BlockSizes(128, 512, 128, 2), interpret=True)
    listed = splash_attention(q, k, v, block_lists=lists, interpret=True)
    np.testing.assert_array_equal(listed, dense)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("bounds", ["given", "found"])
@pytest.mark.parametrize("precision", ["bf16", "int8_qk"])
def test_padding_is_inert(poison, bounds, precision):
    rng = np.random.default_rng(3)
    q, k, v = inputs(rng, 256, 512)
    valid = [100, 128, 0, 1]
    lists = random_lists(rng, 2, 4, valid)
    rule = jnp.array([0, 1, 2, 0])
    padding = ~np.asarray(lists.valid_keys())
    assert padding.sum() == 512 - 229
    arguments = {"block_lists": lists, "rule": rule, "precision": precision, "interpret": True}
    if bounds == "given":
        arguments |= {"largest_score": jnp.full(HEADS, 90.0), "largest_value": jnp.full(HEADS, 6.0)}

    def attend(k, v):
        return sequence_minor_attention(q.swapaxes(1, 2), k, v.swapaxes(1, 2), **arguments)

    clean = attend(k.at[:, padding].set(0), v.at[:, padding].set(0))
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(
        attend(k.at[:, padding].set(poison), v.at[:, padding].set(poison)), clean
    )


@pytest.mark.parametrize(
    ("q_scale", "k_shift"), [(50.0, 0.0), (300.0, 0.0), (1.0, -500.0), (1.0, 500.0)]
)
def test_heads_without_a_bound(q_scale, k_shift):
    """Large, very negative and very positive scores take the online path."""
    rng = np.random.default_rng(4)
    # Whole numbers, so that large scores are exact and only sums are rounded.
    q, k = (jnp.asarray(rng.integers(-3, 4, size=(HEADS, n, D)), jnp.float32) for n in (256, 512))
    v = jnp.asarray(rng.normal(size=(HEADS, 512, D)), jnp.float32)
    q, k = (q * q_scale).at[..., 0].set(8), k.at[..., 0].add(k_shift)
    lists = random_lists(rng, 2, 4, [128, 7, 128, 50])
    rule = jnp.array([0, 1, 2, 2])
    got = splash_attention(q, k, v, scale=1.0, block_lists=lists, rule=rule, interpret=True)
    expected = reference_attention(q, k, v, scale=1.0, block_lists=lists, rule=rule)
    assert np.isfinite(got).all()
    # Scores are multiplied by log2 e and rounded, which moves weights by 2^-24 of the score.
    largest = float(jnp.abs(jnp.einsum("nsd,nkd->nsk", q, k)).max())
    assert relative_error(got, expected) < FLOAT32 + 2 * largest * 2.0**-24


def test_heads_side_by_side_and_another_head_size():
    rng = np.random.default_rng(5)
    q, k, v = inputs(rng, 256, 512, head_dim=40)
    lists, rule = random_lists(rng, 2, 4, [128, 128, 128, 90]), jnp.array([2, 0, 1, 1])
    got = splash_attention(q, k, v, block_lists=lists, rule=rule, interpret=True)
    assert error(got, q, k, v, lists, rule) < FLOAT32
    q, k, v = inputs(rng, 256, 512)
    beside = k.swapaxes(0, 1).reshape(512, HEADS * D)
    one = {"block_lists": lists, "rule": rule, "interpret": True}
    apart = sequence_minor_attention(q.swapaxes(1, 2), k, v.swapaxes(1, 2), **one)
    together = sequence_minor_attention(q.swapaxes(1, 2), beside, v.swapaxes(1, 2), **one)
    # Two heads share a product of 128 terms, 64 of them zero.
    assert relative_error(together, np.asarray(apart, np.float64)) < FLOAT32


def test_batch_axes_and_the_first_rule_by_default():
    rng = np.random.default_rng(6)
    lists = random_lists(rng, 2, 4, [128] * 4)
    q, k, v = (x.reshape(2, 2, *x.shape[1:]) for x in inputs(rng, 256, 512))
    rule = jnp.array([[0, 1], [2, 1]])
    got = splash_attention(q, k, v, block_lists=lists, rule=rule, interpret=True)
    assert error(got, q, k, v, lists, rule) < FLOAT32
    got = splash_attention(q, k, v, block_lists=lists, interpret=True)
    assert error(got, q, k, v, lists, jnp.zeros((2, 2), jnp.int32)) < FLOAT32


def test_other_rules_do_not_recompile():
    rng = np.random.default_rng(7)
    q, k, v = inputs(rng, 256, 512)
    attend = jax.jit(lambda lists, rule: reference_attention(q, k, v, block_lists=lists, rule=rule))
    first, second = (
        BlockLists.from_lists(lists, block_q=TILE, chunk=CHUNK, valid=[128] * 4)
        for lists in ([[[0, 1], [2, 3]]], [[[3, 0], [1, 2]]])
    )
    rule = jnp.zeros(HEADS, jnp.int32)
    results = [attend(lists, rule) for lists in (first, second)]
    assert attend._cache_size() == 1
    assert not np.array_equal(*results)


def test_density_counts_the_visited_chunks():
    lists = BlockLists.from_lists(
        [[[0], [0, 1, 2]], [[0, 1, 2], [2, 1, 0]]], block_q=TILE, chunk=CHUNK, valid=[128, 128, 5]
    )
    np.testing.assert_allclose(lists.density(), [4 / 6, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lists": [[[0], []]]}, "list of rule 0, tile 1 is empty"),
        ({"lists": [[[0, 1, 0], [1]]]}, "names chunk 0 twice"),
        ({"lists": [[[0], [3]]]}, "names chunk 3; there are 3"),
        ({"lists": [[[0], [-1]]]}, "names chunk -1"),
        ({"lists": [[[0], [1]], [[0]]]}, "every rule needs a list for each tile"),
        ({"lists": []}, "every rule needs a list for each tile"),
        ({"lists": [[[0, 2], [1]]]}, "names chunk 2, which has no valid key"),
        ({"block_q": 100}, "block_q is 100; it must be a positive multiple of 128"),
        ({"chunk": 0}, "chunk is 0; it must be"),
        ({"valid": [129, 5, 0]}, r"valid\[0\] is 129"),
        ({"valid": []}, "valid is empty"),
    ],
)
def test_wrong_lists_are_refused(change, message):
    arguments = {"lists": [[[0], [1]]], "block_q": 128, "chunk": 128, "valid": [128, 5, 0]}
    arguments |= change
    with pytest.raises(ValueError, match=message):
        BlockLists.from_lists(arguments.pop("lists"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": 5}, "block_lists replace window_size"),
        ({"block_sizes": BlockSizes(128, 512, 128, 4)}, "block_lists replace"),
        ({"rule": jnp.zeros(3, jnp.int32)}, r"rule is \(3,\); q has heads \(4,\)"),
        ({"keys": 700}, "need"),
        ({"queries": 300}, "need"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, message):
    change = dict(change)
    rng = np.random.default_rng(8)
    q, k, v = inputs(rng, change.pop("queries", 256), change.pop("keys", 512))
    lists = random_lists(rng, 2, 4, [128] * 4)
    with pytest.raises(ValueError, match=message):
        splash_attention(q, k, v, block_lists=lists, interpret=True, **change)


def test_no_races():
    rng = np.random.default_rng(9)
    q, k, v = inputs(rng, 256, 512)
    lists, rule = random_lists(rng, 2, 4, [128, 3, 128, 128]), jnp.array([0, 1, 2, 0])
    splash_attention(
        *(q, k, v),
        block_lists=lists,
        rule=rule,
        interpret=pltpu.InterpretParams(detect_races=True),
    ).block_until_ready()
    assert not interpret_pallas_call.races.races_found
