"""Calibrations of step masks: what one model loses by skipping steps, measured by calibrate.py.

A calibration holds MagCache's ratios and LeMiCa's edge weights (see `step_mask`) for one model,
size, number of steps and scheduler. From them it makes the mask for any number of computed steps.

The weight of an edge (i, j) is the squared error of the final latents, relative to their variance,
if the run skips only the steps between i and j. LeMiCa (arXiv 2511.00090) measures it with a run of
its own for each edge. Here one factor for each step j says how much of the squared error at j is
left in the final latents, so there is one run for each j and none for each edge.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cogvideox.denoising.step_mask import (
    EdgeWeights,
    StepMask,
    digits,
    minimax_mask,
    parse_computed,
    scaled_mask,
)
from runtime.errors import InputError
from runtime.files import write_json
from runtime.json_files import read_json_object
from runtime.text import printable
from runtime.typed_json import from_json

LONGEST_SKIP = 5  # steps in a row that a calibrated mask may skip
# Share of the steps, from the first, that every calibrated mask computes. Errors there change what
# the video shows, for some prompts only, so a few prompts do not find them.
FIRST_SHARE = 0.2

_FORMAT, _VERSION = "step calibration", 1
_MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class CalibrationTarget:
    """The runs that a calibration is for.

    Attributes:
        model_id: names the model for people; it is not compared.
        model: digests of the model's parts that denoise, by part.
    """

    model_id: str
    model: dict[str, str]
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    scheduler: str
    guidance_scale: float
    use_dynamic_cfg: bool

    @property
    def branches(self) -> int:
        """Branches of guidance."""
        return 2 if self.guidance_scale > 1 else 1


@dataclasses.dataclass(frozen=True)
class CalibratedMask:
    """The mask for one budget.

    Attributes:
        computed: by step.
        predicted_error: relative L2 error of the final latents, if errors of segments add up as
            independent ones do.
    """

    computed: tuple[bool, ...]
    predicted_error: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibrate.py measured.

    Attributes:
        prompts: the videos it was measured on.
        ratios: MagCache's, [steps][branches].
        edge_weights: see this module.
        masks: by budget, those that were asked for.
        seconds: that the measurement took.
        made_with: facts for people, such as the device.
    """

    target: CalibrationTarget
    prompts: tuple[str, ...]
    ratios: tuple[tuple[float, ...], ...]
    edge_weights: EdgeWeights
    masks: Mapping[int, CalibratedMask]
    seconds: float
    made_with: dict[str, Any]

    def mask(self, budget: int) -> CalibratedMask:
        """The best mask that computes `budget` steps.

        Raises:
            ValueError: there is none.
        """
        return self.masks.get(budget) or make_mask(self.edge_weights, len(self.ratios), budget)

    def step_mask(self, budget: int) -> StepMask:
        """The same with the scales of the residual; see `mask`."""
        return scaled_mask(self.mask(budget).computed, self.ratios)

    def check_matches(self, target: CalibrationTarget, path: Path) -> None:
        """Checks that a run is one that this calibration is for.

        The guidance scale may differ; whether there is guidance may not.

        Raises:
            ValueError: naming what it is for, and the run's.
        """
        mine = self.target
        what = f"{printable(str(path))} was calibrated for"
        if mine.model != target.model:
            raise ValueError(
                f"{what} the model {_model(mine)}, this run's is {_model(target)}; "
                "calibrate this model with calibrate.py"
            )
        for name, one, other in (
            ("size", _size(mine), _size(target)),
            ("steps", mine.num_inference_steps, target.num_inference_steps),
            ("scheduler", mine.scheduler, target.scheduler),
            ("guidance", _guidance(mine), _guidance(target)),
        ):
            if one != other:
                raise ValueError(
                    f"{what} {name} {one}, this run's {name} is {other}; calibrate it with "
                    "calibrate.py, or change the run"
                )


def _size(target: CalibrationTarget) -> str:
    return f"{target.height}x{target.width}x{target.num_frames}"


def _guidance(target: CalibrationTarget) -> str:
    return "on" if target.branches == 2 else "off"


def _model(target: CalibrationTarget) -> str:
    digests = " ".join(f"{part} {digest}" for part, digest in sorted(target.model.items()))
    return printable(f"{target.model_id} ({digests})")


def first_steps(steps: int) -> int:
    """The number of steps, from the first, that a calibrated mask always computes."""
    return max(math.floor(FIRST_SHARE * steps), 1)


def edges(steps: int) -> list[tuple[int, int]]:
    """The edges that skip steps and that calibrated masks may use."""
    first = first_steps(steps) - 1
    return [
        (i, j)
        for i in range(first, steps)
        for j in range(i + 2, min(i + 1 + LONGEST_SKIP, steps) + 1)
    ]


def weigh_edges(
    errors: EdgeWeights, gains: Mapping[int, float], steps: int
) -> dict[tuple[int, int], float]:
    """Computes the edge weights.

    Args:
        errors: by edge (i, j), the squared error at step j.
        gains: by step j, which part of it is left in the final latents. An edge to the end has the
            gain 1.
    """
    return {(i, j): error if j == steps else error * gains[j] for (i, j), error in errors.items()}


def make_mask(weights: EdgeWeights, steps: int, budget: int) -> CalibratedMask:
    """Makes the minimax mask and predicts its error.

    Raises:
        ValueError: no mask of the calibration's edges computes `budget` steps.
    """
    computed = minimax_mask(weights, steps, budget)
    nodes = [i for i in range(steps) if computed[i]] + [steps]
    squares = sum(weights.get(edge, 0.0) for edge in itertools.pairwise(nodes))
    return CalibratedMask(computed, math.sqrt(squares))


# Files ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _MaskJson:
    computed: int
    steps: str  # a digit each, 1 computed
    predicted_error: float


@dataclasses.dataclass(frozen=True)
class _CalibrationJson:
    format: str
    version: int
    calibrated_for: CalibrationTarget
    prompts: list[str]
    masks: list[dict[str, Any]]  # _MaskJson each
    ratios: list[list[float]]  # [steps][branches]
    edge_weights: list[list[float]]  # i, j, weight
    seconds: float
    made_with: dict[str, Any]


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes a calibration as JSON, atomically."""
    masks = [
        _MaskJson(budget, digits(mask.computed), mask.predicted_error)
        for budget, mask in sorted(calibration.masks.items(), reverse=True)
    ]
    file = _CalibrationJson(
        format=_FORMAT,
        version=_VERSION,
        calibrated_for=calibration.target,
        prompts=list(calibration.prompts),
        masks=[dataclasses.asdict(mask) for mask in masks],
        ratios=[list(ratios) for ratios in calibration.ratios],
        edge_weights=[[i, j, weight] for (i, j), weight in calibration.edge_weights.items()],
        seconds=calibration.seconds,
        made_with=calibration.made_with,
    )
    write_json(path, dataclasses.asdict(file))


def read_calibration(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        InputError: the file cannot be read, is not a calibration, or holds impossible values.
    """
    value = read_json_object(path, max_bytes=_MAX_BYTES)
    try:
        if value.get("format") != _FORMAT:
            raise ValueError("its format is not that of calibrate.py")
        if value.get("version") != _VERSION:
            raise ValueError(f"its version is {str(value.get('version'))[:20]}, not {_VERSION}")
        return _checked(from_json(_CalibrationJson, value))
    except ValueError as error:
        name, reason = printable(str(path)), printable(str(error))
        raise InputError(f"{name} is not a calibration that can be used: {reason}") from error


def _checked(file: _CalibrationJson) -> Calibration:
    target = file.calibrated_for
    steps, branches = target.num_inference_steps, target.branches
    if len(file.ratios) != steps or any(len(ratios) != branches for ratios in file.ratios):
        raise ValueError(f"its ratios are not those of {steps} steps and {branches} branches")
    if not all(ratio > 0 for ratios in file.ratios for ratio in ratios):
        raise ValueError("a ratio is not positive")
    weights = {}
    for edge in file.edge_weights:
        i, j, weight = edge if len(edge) == 3 else (0.0, 0.0, 0.0)
        if not (i % 1 == j % 1 == 0 <= i and i + 2 <= j <= steps and weight >= 0):
            raise ValueError(f"{edge} is not an edge of {steps} steps and its weight")
        weights[int(i), int(j)] = weight
    masks = {}
    for value in file.masks:
        mask = from_json(_MaskJson, value)
        computed = parse_computed(mask.steps)
        if len(computed) != steps or sum(computed) != mask.computed:
            raise ValueError(
                f"the mask {mask.steps[:80]} does not compute {mask.computed} of {steps}"
            )
        masks[mask.computed] = CalibratedMask(computed, mask.predicted_error)
    return Calibration(
        target=target,
        prompts=tuple(file.prompts),
        ratios=tuple(map(tuple, file.ratios)),
        edge_weights=weights,
        masks=masks,
        seconds=file.seconds,
        made_with=file.made_with,
    )
