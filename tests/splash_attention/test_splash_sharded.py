"""On eight devices, by heads, by tokens and by both, attention equals that of one device.

float32; 2e-6 is the kernel's own bound.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attention import attention_part, splash_attention
from splash_attention.reference import reference_attention
from splash_attention.sharded import ring_attention, sharded_attention
from tests.splash_attention.softmax import attend, relative_error


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


def part_of_attention(q, k, v, kv_len):
    """`attention_part` in jax.numpy: the interpreter's callbacks and a ring's copies, both waiting
    for all devices, need more threads than a small machine has."""
    scores = jnp.einsum("bnsd,bnkd->bnsk", q, k, precision="highest")
    scores = jnp.where(jnp.arange(k.shape[2]) < kv_len, scores, -jnp.inf)
    most = jnp.max(scores, axis=-1, keepdims=True)
    p = jnp.exp2(scores - most)
    total = jnp.sum(p, axis=-1, keepdims=True)
    out = jnp.einsum("bnsk,bnkd->bnsd", p, v, precision="highest") / total
    return out, jnp.where(kv_len > 0, most + jnp.log2(total), -jnp.inf)


def by_base_two(q, k, v):
    q, k, v = (np.asarray(x) for x in (q, k, v))
    return attend(q.swapaxes(2, 3), k, v.swapaxes(2, 3)).swapaxes(2, 3)


# 9 keys over 8 shards are 2 a shard: one has half, three have none.
@pytest.mark.parametrize(
    ("shape", "kv_len", "factor"),
    [((1, 8, 1), 9, 1), ((1, 4, 2), 45, 1), ((2, 2, 2), 45, 200)],
    ids=["tokens, empty shards", "tokens and heads", "all, large scores"],
)
def test_ring(shape, kv_len, factor):
    q, k, v = arrays(2, 2, 37, kv_len)
    # Whole numbers make scores exact, however large.
    q, k = jnp.round(q) * factor, jnp.round(k)
    out = jax.jit(ring_attention(part_of_attention, mesh_of(*shape)))(q, k, v)
    assert relative_error(out, by_base_two(q, k, v)) <= 2e-6


@pytest.mark.parametrize("factor", [1, 200], ids=["bounded", "online"])
def test_parts_of_the_kernel(factor):
    """What the ring expects of a part: the output, the denominators, and both without keys."""
    q, k, v = arrays(1, 2, 37, 45)
    q, k = jnp.round(q) * factor, jnp.round(k)
    part = jax.jit(
        functools.partial(attention_part, scale=float(1 / np.log2(np.e)), interpret=True)
    )
    for kv_len in (45, 20):
        out, log_total = part(q, k, v, jnp.int32(kv_len))
        expected, log_expected = part_of_attention(q, k, v, kv_len)
        assert relative_error(out, np.asarray(expected, np.float64)) <= 2e-6
        np.testing.assert_allclose(log_total, log_expected, rtol=1e-6, atol=4e-6)
    _, log_total = part(q, k, v, jnp.int32(0))
    assert (log_total == -jnp.inf).all()


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
