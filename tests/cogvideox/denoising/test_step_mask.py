"""Step masks: the papers' algorithms against plain loops and brute force; what is refused."""

import itertools
import math
import random

import pytest

from cogvideox.denoising import step_mask
from cogvideox.denoising.step_mask import StepMask

SEEDS = range(40)


def random_ratios(rng: random.Random, steps: int, branches: int) -> list[tuple[float, ...]]:
    ratios = [tuple(rng.uniform(0.85, 1.1) for _ in range(branches)) for _ in range(steps)]
    return [(1.0,) * branches, *ratios[1:]]


def magcache_reference(gammas: list[float], delta: float, k: int, retention: float) -> list[bool]:
    """The rule of one branch, step by step as MagCache's code runs it."""
    computed = []
    rho, n, e = 1.0, 0, 0.0
    for step, gamma in enumerate(gammas):
        skip = False
        if step >= int(retention * len(gammas)):
            rho = rho * gamma
            n = n + 1
            e = e + abs(1 - rho)
            if e < delta and n <= k:
                skip = True
            else:
                rho, n, e = 1.0, 0, 0.0
        computed.append(not skip)
    return computed


@pytest.mark.parametrize("seed", SEEDS)
def test_magcache_equals_the_reference_loop(seed: int):
    rng = random.Random(seed)
    steps = rng.randint(5, 60)
    ratios = random_ratios(rng, steps, 1)
    delta, k, share = rng.choice((0.03, 0.12, 0.3)), rng.choice((1, 2, 4)), rng.choice((0.2, 0.3))
    mask = step_mask.magcache_mask(ratios, threshold=delta, longest_skip=k, first=share)
    gammas = [ratio for (ratio,) in ratios]
    assert list(mask) == magcache_reference(gammas, delta, k, share)


@pytest.mark.parametrize("seed", SEEDS)
def test_magcache_of_two_branches_obeys_the_limits_of_both(seed: int):
    rng = random.Random(seed)
    steps = rng.randint(5, 60)
    ratios = random_ratios(rng, steps, 2)
    mask = step_mask.magcache_mask(ratios, threshold=0.12, longest_skip=3)
    assert all(mask[: max(int(0.2 * steps), 1)])
    for branch in range(2):
        rho, n, e = 1.0, 0, 0.0
        for i in range(steps):
            rho, n = rho * ratios[i][branch], n + 1
            e += abs(1 - rho)
            if mask[i]:
                rho, n, e = 1.0, 0, 0.0
            else:
                assert e < 0.12 and n <= 3
    same = [(ratio[0], ratio[0]) for ratio in ratios]
    one = [(ratio[0],) for ratio in ratios]
    assert step_mask.magcache_mask(same) == step_mask.magcache_mask(one)


def random_weights(rng: random.Random, steps: int, cap: int) -> dict[tuple[int, int], float]:
    """Weights of all edges with at most `cap` skipped steps; few values, so that many are equal."""
    return {
        (i, j): float(rng.randint(0, 5)) if j > i + 1 else 0.0
        for i in range(steps)
        for j in range(i + 1, min(i + cap + 1, steps) + 1)
    }


def brute_force(
    weights: dict[tuple[int, int], float], steps: int, budget: int
) -> tuple[bool, ...] | None:
    """Tries every mask; of equal ones the first, whose computed steps are the earliest."""
    found = []
    for rest in itertools.combinations(range(1, steps), budget - 1):
        nodes = (0, *rest, steps)
        edges = list(itertools.pairwise(nodes))
        if all(edge in weights for edge in edges):
            found.append((sorted((weights[edge] for edge in edges), reverse=True), nodes))
    return tuple(i in min(found)[1] for i in range(steps)) if found else None


@pytest.mark.parametrize("seed", SEEDS)
def test_minimax_equals_brute_force(seed: int):
    rng = random.Random(seed)
    steps, cap = rng.randint(1, 10), rng.randint(1, 4)
    weights = random_weights(rng, steps, cap)
    for budget in range(1, steps + 1):
        expected = brute_force(weights, steps, budget)
        if expected is None:
            with pytest.raises(ValueError, match=f"at most {cap} in a row"):
                step_mask.minimax_mask(weights, steps, budget)
            continue
        mask = step_mask.minimax_mask(weights, steps, budget)
        assert mask == expected
        assert sum(mask) == budget and len(mask) == steps


def test_minimax_says_the_smallest_budget():
    weights = random_weights(random.Random(0), 25, 4)
    with pytest.raises(ValueError, match="the smallest number is 5"):
        step_mask.minimax_mask(weights, 25, 4)
    assert sum(step_mask.minimax_mask(weights, 25, 5)) == 5
    with pytest.raises(ValueError, match="not 26"):
        step_mask.minimax_mask(weights, 25, 26)


def test_minimax_compares_more_than_the_largest_weight():
    # Both masks of 2 steps have the largest weight 3; the second weights are 2 and 1.
    weights = {(0, 2): 3.0, (2, 4): 2.0, (0, 3): 3.0, (3, 4): 1.0}
    assert step_mask.minimax_mask(weights, 4, 2) == (True, False, False, True)


@pytest.mark.parametrize("seed", SEEDS)
def test_scales_are_products_since_the_last_computed_step(seed: int):
    rng = random.Random(seed)
    steps, branches = rng.randint(1, 30), rng.choice((1, 2))
    ratios = random_ratios(rng, steps, branches)
    computed = [True, *(rng.random() < 0.5 for _ in range(steps - 1))]
    mask = step_mask.scaled_mask(computed, ratios)
    assert list(mask.computed) == computed and mask.budget == sum(computed)
    for i in range(steps):
        last = max(k for k in range(i + 1) if computed[k])
        for branch in range(branches):
            product = math.prod(ratios[k][branch] for k in range(last + 1, i + 1))
            assert mask.scales[i][branch] == pytest.approx(product, rel=1e-12)
    assert step_mask.parse_computed(mask.text) == mask.computed


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 25, 28, 50, 1000])
def test_uniform_and_default_masks_keep_their_budget(steps: int):
    for budget in {1, (steps + 1) // 2, steps}:
        for first in {1, budget}:
            mask = step_mask.uniform_mask(steps, budget, first)
            assert len(mask) == steps and sum(mask) == budget and all(mask[:first])
            gaps = [
                len(list(run)) for skipped, run in itertools.groupby(mask[first:]) if not skipped
            ]
            if budget > first:
                assert mask[-1] and max(gaps, default=0) - min(gaps, default=0) <= 1
        mask = step_mask.default_mask(steps, budget)
        assert len(mask) == steps and sum(mask) == budget and mask[0]
    assert sum(step_mask.uniform_mask(25, 16, 5)) == 16


def test_default_masks_have_every_budget_and_growing_gaps():
    for steps in range(1, 60):
        for budget in range(1, steps + 1):
            mask = step_mask.default_mask(steps, budget)
            assert len(mask) == steps and sum(mask) == budget and mask[0]
    for budget, text in ((15, "1111111110010010010010011"), (12, "1111111000100010001000011")):
        assert step_mask.digits(step_mask.default_mask(25, budget)) == text
    for bad in (0, 26):
        with pytest.raises(ValueError, match=f"not {bad}"):
            step_mask.default_mask(25, bad)


def test_modes_compute_their_share():
    assert [step_mask.budget_of("near", steps) for steps in (50, 25, 1)] == [29, 15, 1]
    assert [step_mask.budget_of("fast", steps) for steps in (50, 25, 1)] == [24, 12, 1]


def test_refuses_masks_that_no_run_can_follow():
    one = ((1.0,),)
    for computed, scales, message in (
        ((), (), "computes none"),
        ((False, False), one * 2, "computes none of 2 steps"),
        ((False, True), one * 2, "skips the first step"),
        ((True, False), one, "has 2 steps and scales for 1"),
        ((True, False), ((1.0,), (1.0, 1.0)), "branches"),
        ((True,), ((),), "branches"),
        ((True, False), ((1.0,), (math.nan,)), "not finite"),
        ((True, True), ((1.0,), (0.5,)), "which it computes"),
    ):
        with pytest.raises(ValueError, match=message):
            StepMask(computed, scales)
    for text, message in (("", "digits"), ("12", "digits"), ("01", "first"), ("00", "none of 2")):
        with pytest.raises(ValueError, match=message):
            step_mask.parse_computed(text)
    with pytest.raises(ValueError, match="2 steps, the ratios 1"):
        step_mask.scaled_mask((True, False), one)
    with pytest.raises(ValueError, match="not 3, 2, 5"):
        step_mask.uniform_mask(5, 2, 3)
