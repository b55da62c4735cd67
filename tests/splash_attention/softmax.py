"""Softmax attention in float64 numpy, in the units of the kernel's own entry."""

import numpy as np


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None = None) -> np.ndarray:
    """q [..., D, S], scores q.k powers of two, k [..., K, D], v [..., D, K] -> [..., D, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = k @ q
    if window is not None:
        key, query = np.indices(scores.shape[-2:])
        scores = np.where(abs(key - query) <= window, scores, -np.inf)
    p = np.exp2(scores - scores.max(-2, keepdims=True))
    return v @ p / p.sum(-2, keepdims=True)


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error; NaN when `got` has one."""
    got = np.asarray(got, np.float64)
    assert got.shape == expected.shape
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)
