"""On eight devices, by heads, by tokens and by both, attention equals that of one device.

float32; 2e-6 is the kernel's own bound.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from splash_attention import splash_attention
from splash_attention.reference import reference_attention
from splash_attention.sharded import sharded_attention
from tests.splash_attention.softmax import relative_error


def arrays(batch, heads, q_len, kv_len):
    keys = jax.random.split(jax.random.key(0), 3)
    lengths = (q_len, kv_len, kv_len)
    return [
        jax.random.normal(key, (batch, heads, n, 64)) for key, n in zip(keys, lengths, strict=True)
    ]


def mesh_of(dp, sp, tp):
    devices = np.array(jax.devices()[: dp * sp * tp]).reshape(dp, sp, tp)
    return jax.sharding.Mesh(devices, ("dp", "sp", "tp"))


# 37 and 45 tokens split over no shards evenly: the last shard has padding.
@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (2, 1, 4), (1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 2, 2)], ids=str
)
def test_all_to_all(shape):
    q, k, v = arrays(2, 8, 37, 45)
    attend = sharded_attention(reference_attention, mesh_of(*shape), sequence_axis="sp")
    out = jax.jit(attend)(q, k, v)
    assert relative_error(out, np.asarray(reference_attention(q, k, v), np.float64)) <= 2e-6


def test_all_to_all_of_the_kernel():
    q, k, v = arrays(1, 4, 37, 45)
    attend = sharded_attention(
        lambda *x: splash_attention(*x, interpret=True), mesh_of(1, 2, 2), sequence_axis="sp"
    )
    out = jax.jit(attend)(q, k, v)
    assert relative_error(out, np.asarray(reference_attention(q, k, v), np.float64)) <= 2e-6


@pytest.fixture(scope="module")
def ring_errors():
    script = Path(__file__).parent / "ring_of_the_kernel.py"
    lines = subprocess.run(
        [sys.executable, script], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    return {row["case"]: row["relative_l2_error"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("case", ["tokens, empty shards", "tokens and heads", "all, large scores"])
def test_ring_of_the_kernel(ring_errors, case):
    assert ring_errors[case] <= 2e-6


def test_what_cannot_be_split_is_refused():
    q, k, v = arrays(1, 4, 16, 16)
    for mesh, match in (
        (mesh_of(2, 1, 4), "batch of 1 cannot be split over mesh axis 'dp' of size 2"),
        (mesh_of(1, 1, 8), "heads of 4 cannot be split over mesh axis 'tp' of size 8"),
        (mesh_of(1, 4, 2), "2 heads a device cannot be split .* of size 4; use ring_attention"),
    ):
        with pytest.raises(ValueError, match=match):
            sharded_attention(reference_attention, mesh, sequence_axis="sp")(q, k, v)


def test_absent_axes_count_as_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("tp",))
    q, k, v = arrays(1, 2, 5, 7)
    out = jax.jit(sharded_attention(reference_attention, mesh, sequence_axis="sp"))(q, k, v)
    assert relative_error(out, np.asarray(reference_attention(q, k, v), np.float64)) <= 2e-6
