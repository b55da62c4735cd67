"""Ring attention with the kernel itself on eight fake CPU devices; prints one JSON line a case.

A process of its own, because of its threads. Every device blocks one in each copy round the ring
and one in each callback of the interpreter, which waits for all devices; JAX's CPU client has a
thread a device, so that some devices wait in the ring for others that have none left to arrive.
"""

import functools
import json
import math
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PJRT_NPROC"] = "32"
# The copies of a ring are as far apart as the interpreter is slow.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=600"
    " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from splash_attention import attention_part
from splash_attention.sharded import ring_attention
from tests.splash_attention.softmax import attend, relative_error

# dp, sp, tp; keys; factor on whole numbers, which make scores exact however large.
CASES = {
    # 2 keys a shard: one shard has half, three have none.
    "tokens, empty shards": ((1, 8, 1), 9, 1),
    "tokens and heads": ((1, 4, 2), 45, 1),
    "all, large scores": ((2, 2, 2), 45, 200),
}


def error(shape: tuple[int, int, int], keys: int, factor: int) -> float:
    """Relative L2 error against attention in float64 of one device."""
    batch, _, heads = shape
    q, k, v = (
        jax.random.normal(key, (batch, heads, tokens, 64))
        for key, tokens in zip(
            jax.random.split(jax.random.key(0), 3), (37, keys, keys), strict=True
        )
    )
    q, k = jnp.round(q) * factor, jnp.round(k)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), ("dp", "sp", "tp"))
    # This scale makes q.k powers of two, as `attend` takes them.
    part = functools.partial(attention_part, scale=math.log(2), interpret=True)
    out = jax.jit(ring_attention(part, mesh))(q, k, v)
    exact = attend(*(np.asarray(x) for x in (q.swapaxes(2, 3), k, v.swapaxes(2, 3))))
    return relative_error(out, exact.swapaxes(2, 3))


if __name__ == "__main__":
    for name, case in CASES.items():
        print(json.dumps({"case": name, "relative_l2_error": error(*case)}), flush=True)
