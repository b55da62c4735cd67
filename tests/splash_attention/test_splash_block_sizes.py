"""Tiles come from the tables, fit VMEM, and compile for chips that are not here."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from splash_attention.block_sizes import BlockSizes, chip_named, choose_block_sizes
from splash_attention.tuned_tables import TABLES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHIPS = ("v5e", "v5p", "v6e")


@pytest.mark.parametrize("name", CHIPS)
def test_every_shape_gets_tiles_that_fit(name):
    chip = chip_named(name)
    assert set(TABLES[name]) == {64, 128, 256}
    for head_dim in (64, 128, 192, 256):
        for tokens in (1, 127, 1000, 4608, 17776, 45106, 87778, 10**6):
            for dtype in ("bfloat16", "float32", "int8"):
                sizes = choose_block_sizes(chip, head_dim, tokens, tokens, dtype)
                assert sizes.vmem_bytes(head_dim, dtype) <= chip.vmem_bytes
                blocks = -(-tokens // sizes.block_kv)
                # No more padding than a chunk for every body.
                bodies = blocks * sizes.block_kv // (sizes.chunk * sizes.unroll)
                assert blocks * sizes.block_kv - tokens < (bodies + 1) * sizes.chunk * blocks


def test_the_row_is_chosen_by_keys(monkeypatch):
    rows = {64: ((1024, 1024, 128, 8), (4096, 256, 256, 4))}
    monkeypatch.setitem(TABLES, "v6e", rows)
    chip = chip_named("v6e")

    def chosen(q_len, kv_len):
        return choose_block_sizes(chip, 64, q_len, kv_len, "bfloat16")

    assert chosen(5000, 1024) == BlockSizes(1024, 1024, 128, 8)
    assert chosen(200, 1000) == BlockSizes(256, 1024, 128, 8)
    assert chosen(5000, 1025) == BlockSizes(256, 1536, 256, 3)
    assert chosen(5000, 8192) == BlockSizes(256, 8192, 256, 4)
    with pytest.raises(ValueError, match="head size is 128; the tables of v6e end at 64"):
        choose_block_sizes(chip, 128, 1, 1, "bfloat16")


def test_what_makes_no_tiles_is_refused():
    for wrong, match in (
        ((100, 256, 128, 1), "block_q is 100"),
        ((128, 256, 64, 1), "chunk is 64"),
        ((128, 256, 128, 0), "unroll is 0"),
        ((128, 384, 128, 2), "chunk x unroll = 256"),
    ):
        with pytest.raises(ValueError, match=match):
            BlockSizes(*wrong)
    with pytest.raises(ValueError, match="'v4'"):
        chip_named("v4")


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip, monkeypatch):
    """A sample of what `benchmarks/tune_block_sizes.py --check` compiles."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from tune_block_sizes import compile_entry

    # libtpu is told its chip once a process.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for kernel in ("bounded_beside", "int8_qk") if chip == "v6e" else ("bounded_beside",):
            pool.submit(compile_entry, chip, 64, 1024, kernel).result()
