"""Relative L2 error of every path of the attention kernel against float32, in interpret mode.

    python benchmarks/attention_accuracy.py --json

Runs on a CPU; `--tokens` sets the length. Inputs are unit normal, two heads of 64; "offset" adds
8 deviations to a quarter of the channels of k, "concentrated" makes q 2.5 times larger.
"""

import argparse
import json
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from splash_attention import query_scale, sequence_minor_attention, splash_attention
from splash_attention.reference import reference_attention

HEADS, HEAD_DIM = 2, 64
CASES = ("normal", "concentrated", "offset")
PATHS = ("bounded", "one_rounding", "online", "float32", "int8_qk", "int8_qk_smooth_k")


def inputs(case: str, tokens: int) -> list[jax.Array]:
    """Make float32 q, k, v, [N, S, D]."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (HEADS, tokens, HEAD_DIM)) for key in keys)
    if case == "concentrated":
        q = q * 2.5
    if case == "offset":
        k = k + 8.0 * (jnp.arange(HEAD_DIM) % 4 == 0)
    return [q, k, v]


def error(path: str, case: str, tokens: int) -> float:
    """Return the relative L2 error against the float32 reference on the same inputs."""
    q, k, v = inputs(case, tokens)
    if path != "float32":
        k, v = (x.astype(jnp.bfloat16) for x in (k, v))
    if path == "one_rounding":
        # q is scaled before it is rounded, as callers of the kernel's own layout do.
        given = (q * query_scale(HEAD_DIM)).astype(jnp.bfloat16)
        q = given.astype(jnp.float32) / query_scale(HEAD_DIM)
        minor = given.swapaxes(1, 2), k, v.swapaxes(1, 2)
        out = sequence_minor_attention(*minor, interpret=True).swapaxes(1, 2)
    elif path == "online":
        # A bound too large to be useful makes every head take the online path.
        q = q.astype(jnp.bfloat16)
        scaled = (q.astype(jnp.float32) * query_scale(HEAD_DIM)).astype(q.dtype)
        minor = scaled.swapaxes(1, 2), k, v.swapaxes(1, 2)
        bounds = jnp.full(HEADS, jnp.inf)
        out = sequence_minor_attention(*minor, largest_score=bounds, interpret=True).swapaxes(1, 2)
    else:
        q = q if path == "float32" else q.astype(jnp.bfloat16)
        options: dict[str, Any] = {"smooth_k": path.endswith("smooth_k")}
        if path.startswith("int8_qk"):
            options["precision"] = "int8_qk"
        out = splash_attention(q, k, v, interpret=True, **options)
    exact = reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    out, exact = np.asarray(out, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--json", action="store_true", help="a list of rows instead of lines")
    args = parser.parse_args()
    rows = []
    for path in PATHS:
        for case in CASES:
            row = {"path": path, "inputs": case, "tokens": args.tokens}
            rows.append(row | {"relative_l2_error": error(path, case, args.tokens)})
            if not args.json:
                print(f"{path:18} {case:14} {rows[-1]['relative_l2_error']:.2e}", flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
