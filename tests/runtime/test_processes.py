"""Processes of one command end together, with one message if they cannot start; none hangs."""

import pytest

from runtime import processes
from tests.pairs import run_pair

STAGE2 = ["stage2_transformer.py", "--distributed", "--input_dir"]
# The two processes do something together, then process 1 fails while process 0 waits for it.
FAILING = """
import argparse, jax, numpy, utils
from runtime.errors import RunError
from jax.sharding import NamedSharding, PartitionSpec
from runtime import processes
from runtime.exit_codes import run_script
from runtime.mesh import make_mesh, place

def main():
    utils.join_processes(argparse.Namespace(distributed=True))
    everywhere = NamedSharding(make_mesh((1, 1, 8)), PartitionSpec("tp"))
    array = place(numpy.arange(8.0), everywhere)
    total = jax.jit(lambda x: x.sum() + numpy.zeros(()))
    assert total(array) == 28 and len(array.addressable_shards) == 4
    if not processes.is_first():
        raise RunError("the disk is gone")
    WAIT

run_script(main)
"""


def test_other_arguments_are_refused(tmp_path):
    pair = run_pair(*([*STAGE2, str(tmp_path), "--seed", seed] for seed in ("3", "4")))
    for process in pair:
        assert process.returncode == 2, process.stderr
        assert "error: process 1 has seed 4, process 0 has 3" in process.stderr


def test_what_one_refuses_all_refuse(tmp_path):
    pair = run_pair(*[[*STAGE2, str(tmp_path)]] * 2)
    for process in pair:
        assert process.returncode == 2, process.stderr
        expected = f"error: {tmp_path}/generation_config.json does not exist"
        assert process.stderr.count(expected) == 1 and "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JAX_NUM_PROCESSES", "two", "'two' is not a number"),
        ("JAX_PROCESS_ID", "2", "is not one of JAX_NUM_PROCESSES=2"),
        ("JAX_COORDINATOR_ADDRESS", "localhost", "is not host:port"),
    ],
)
def test_bad_variables_end_with_one_line(variable, value, said, monkeypatch):
    good = {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2"}
    for name, text in (good | {"JAX_PROCESS_ID": "0", variable: value}).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=said):
        processes.join()
    assert processes.count() == 1 and processes.is_first()


@pytest.mark.parametrize(
    ("wait", "code"),
    [
        ("pass", 1),
        # Only JAX can end a process that waits for another's devices.
        ("float(total(array + 1))", None),
    ],
)
def test_a_failure_ends_both(wait, code):
    first, second = run_pair(*[["-c", FAILING.replace("WAIT", wait)]] * 2, timeout=120)
    assert "failed: the disk is gone" in second.stderr
    if code is None:
        assert first.returncode != 0 and second.returncode != 0
    else:
        assert (first.returncode, second.returncode) == (code, code), first.stderr
        assert "failed: process 1: the disk is gone" in first.stderr
