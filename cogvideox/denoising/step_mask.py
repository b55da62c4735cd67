"""Step masks: which denoising steps run the transformer and which reuse its residual.

Neighbouring steps compute nearly the same. A computed step adds a residual to the embedded video
tokens: what all blocks together change. A skipped step adds the last computed residual again, times
a factor. A mask is fixed before the run, so the device needs no decision.

Sources: MagCache (arXiv 2506.09045) for the ratios and `magcache_mask`; LeMiCa (arXiv 2511.00090)
for `minimax_mask`.

Steps are numbered from 0, the noisiest. Branches are the parts of a guided batch: the negative
prompt's first, then the prompt's; without guidance there is one branch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

# For each step and branch: mean over tokens of |residual of this step| / |residual of the step
# before|. The first step's are 1.
Ratios = Sequence[Sequence[float]]
# (i, j) -> error: step i is computed, the steps between i and j reuse its residual, and j is
# computed; j equal to the number of steps ends the run. Pairs that are not in it are not used.
EdgeWeights = Mapping[tuple[int, int], float]

# Share of the steps that a mode computes.
COMPUTED_SHARE = {"near": 0.58, "fast": 0.48}
# The default mask: the share of its computed steps that come first, without a gap; how many come
# last; how fast the gaps between grow. The best of 60 such shapes on the small model, 25 steps.
_FIRST_OF_DEFAULT = 0.55
_LAST_OF_DEFAULT = 2
_GROWTH_OF_DEFAULT = 1.15
_FIRST_OF_MAGCACHE = 0.2  # share of all steps that the rule always computes


@dataclasses.dataclass(frozen=True)
class StepMask:
    """Which steps are computed, and how skipped steps scale the residual.

    Attributes:
        computed: by step; False reuses the residual of the last computed step.
        scales: by step and branch, what the reused residual is multiplied by; 1 where computed.

    Raises:
        ValueError: the mask begins with a skipped step, computes none, or does not fit the scales.
    """

    computed: tuple[bool, ...]
    scales: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        check_computed(self.computed)
        if len(self.scales) != len(self.computed):
            raise ValueError(
                f"the step mask has {len(self.computed)} steps and scales for {len(self.scales)}"
            )
        branches = {len(scales) for scales in self.scales}
        if len(branches) != 1 or not branches <= {1, 2}:
            raise ValueError(
                f"the step mask has scales for {sorted(branches)} branches, not 1 or 2"
            )
        for i, (computed, scales) in enumerate(zip(self.computed, self.scales, strict=True)):
            if not all(math.isfinite(scale) for scale in scales):
                raise ValueError(f"the step mask scales step {i} by {scales}, not finite numbers")
            if computed and any(scale != 1 for scale in scales):
                raise ValueError(f"the step mask scales step {i}, which it computes, by {scales}")

    @property
    def budget(self) -> int:
        """The number of computed steps."""
        return sum(self.computed)

    @property
    def text(self) -> str:
        """One digit a step: 1 computed, 0 skipped."""
        return digits(self.computed)


def digits(computed: Sequence[bool]) -> str:
    """Returns one digit a step: 1 computed, 0 skipped."""
    return "".join("01"[is_computed] for is_computed in computed)


def parse_computed(text: str) -> tuple[bool, ...]:
    """Reads the digits of `StepMask.text`.

    Raises:
        ValueError: there are other characters, or no run can follow the mask.
    """
    if not text or set(text) - {"0", "1"}:
        raise ValueError(f"the step mask {text[:80]!r} is not a row of digits 0 and 1")
    computed = tuple(digit == "1" for digit in text)
    check_computed(computed)
    return computed


def check_computed(computed: Sequence[bool]) -> None:
    """Checks that the first step is computed.

    Raises:
        ValueError: it is not.
    """
    if not any(computed):
        raise ValueError(
            f"the step mask computes none of {len(computed)} steps; at least the first must be"
        )
    if not computed[0]:
        raise ValueError("the step mask skips the first step, before there is a residual to reuse")


def scaled_mask(computed: Sequence[bool], ratios: Ratios) -> StepMask:
    """Scales a skipped step by the product of the ratios since the last computed step.

    Raises:
        ValueError: no run can follow the mask, or the ratios are of another number of steps.
    """
    check_computed(computed)
    if len(ratios) != len(computed):
        raise ValueError(f"the step mask has {len(computed)} steps, the ratios {len(ratios)}")
    scales: list[tuple[float, ...]] = []
    for is_computed, ratio in zip(computed, ratios, strict=True):
        if is_computed:
            scales.append((1.0,) * len(ratio))
        else:
            scales.append(tuple(s * r for s, r in zip(scales[-1], ratio, strict=True)))
    return StepMask(tuple(computed), tuple(scales))


def unscaled_mask(computed: Sequence[bool], branches: int) -> StepMask:
    """A mask whose skipped steps reuse the residual as it is."""
    return StepMask(tuple(computed), ((1.0,) * branches,) * len(computed))


def magcache_mask(
    ratios: Ratios,
    *,
    threshold: float = 0.12,
    longest_skip: int = 2,
    first: float = _FIRST_OF_MAGCACHE,
) -> tuple[bool, ...]:
    """MagCache's rule: skip while the estimated error of reuse stays small.

    Each branch keeps the product of its ratios since the last computed step and sums the product's
    distances from 1. A step is skipped if this sum is below `threshold` in every branch and at most
    `longest_skip` steps in a row are skipped. The paper decides for each branch apart; one mask for
    both needs all of them. With one branch this is the paper's rule.

    Args:
        threshold: delta of the paper.
        longest_skip: K of the paper; 2 for its slow and 4 for its fast setting.
        first: share of the steps that are computed in any case.
    """
    steps = len(ratios)
    always = max(math.floor(first * steps), 1)
    products, errors, skipped = [], [], 0
    computed = []
    for i, ratio in enumerate(ratios):
        if i >= always:
            products = [product * r for product, r in zip(products, ratio, strict=True)]
            errors = [e + abs(1 - p) for e, p in zip(errors, products, strict=True)]
            skipped += 1
            if max(errors) < threshold and skipped <= longest_skip:
                computed.append(False)
                continue
        products, errors, skipped = [1.0] * len(ratio), [0.0] * len(ratio), 0
        computed.append(True)
    return tuple(computed)


def minimax_mask(weights: EdgeWeights, steps: int, budget: int) -> tuple[bool, ...]:
    """LeMiCa's path: the mask of `budget` computed steps with the smallest worst errors.

    A mask is a path from step 0 to the end of the run, through the steps that it computes. Its edge
    weights, sorted from the largest, are compared with those of other masks number by number. Of
    equal masks it takes the one that computes earlier steps.

    Args:
        weights: nonnegative; an edge between neighbouring steps that is not in it weighs 0.

    Raises:
        ValueError: no path has `budget` steps.
    """
    if not 1 <= budget <= steps:
        raise ValueError(f"a mask of {steps} steps computes 1 to {steps} of them, not {budget}")
    edges = {(i, i + 1): 0.0 for i in range(steps)} | dict(weights)
    into: list[list[tuple[int, float]]] = [[] for _ in range(steps + 1)]
    for (i, j), weight in edges.items():
        into[j].append((i, weight))
    # The best path to each node with a given number of edges. Adding an edge to two paths keeps
    # their order, so the best path to a node extends a best path to the node before.
    best: list[tuple[tuple[float, ...], tuple[int, ...]] | None] = [((), (0,))] + [None] * steps
    for _ in range(budget):
        following: list[tuple[tuple[float, ...], tuple[int, ...]] | None] = [None] * (steps + 1)
        for j in range(1, steps + 1):
            candidates = [
                (tuple(sorted((*found[0], weight), reverse=True)), (*found[1], j))
                for i, weight in into[j]
                if (found := best[i]) is not None
            ]
            following[j] = min(candidates, default=None)
        best = following
    path = best[steps]
    if path is None:
        longest = max(j - i for i, j in edges) - 1
        fewest = [0] + [steps] * steps
        for j in range(1, steps + 1):
            fewest[j] = 1 + min(fewest[i] for i, _ in into[j])
        raise ValueError(
            f"no mask computes {budget} of {steps} steps if it skips at most {longest} in a row; "
            f"the smallest number is {fewest[steps]}"
        )
    return tuple(i in path[1] for i in range(steps))


def uniform_mask(steps: int, budget: int, first: int) -> tuple[bool, ...]:
    """Computes `first` steps, then spreads the rest of `budget` evenly, up to the last step.

    Raises:
        ValueError: `first` and `budget` do not fit into the number of steps.
    """
    if not 1 <= first <= budget <= steps:
        raise ValueError(
            f"a uniform mask needs 1 <= first <= budget <= steps, not {first}, {budget}, {steps}"
        )
    spread, rest = budget - first, steps - first
    later = {first + (k + 1) * rest // spread - 1 for k in range(spread)}
    return tuple(i < first or i in later for i in range(steps))


def budget_of(mode: str, steps: int) -> int:
    """The number of steps that `near` or `fast` computes: 29 or 24 of 50, 15 or 12 of 25."""
    return math.ceil(COMPUTED_SHARE[mode] * steps - 1e-9)


def default_mask(steps: int, budget: int) -> tuple[bool, ...]:
    """The mask for a model that was not calibrated.

    It computes the first steps without a gap, 55% of `budget`, because their errors grow; then
    steps with growing gaps; then the last two, because nothing corrects their errors.

    Raises:
        ValueError: there is no such budget.
    """
    if not 1 <= budget <= steps:
        raise ValueError(f"a mask of {steps} steps computes 1 to {steps} of them, not {budget}")
    first = math.ceil(_FIRST_OF_DEFAULT * budget - 1e-9)
    last = min(_LAST_OF_DEFAULT, budget - first)
    between, end = budget - first - last, steps - last
    chosen = set(range(first)) | set(range(end, steps))
    previous = first - 1
    for k in range(1, between + 1):
        wanted = first + round((end - first) * (k / (between + 1)) ** _GROWTH_OF_DEFAULT)
        # Leave room for the steps that follow.
        previous = min(max(wanted, previous + 1), end - 1 - (between - k))
        chosen.add(previous)
    return tuple(i in chosen for i in range(steps))
