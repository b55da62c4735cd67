"""Lossy options of stage 2: what a run skips or rounds, and how its settings record it.

The step mask, sparse attention, the guidance gate and products of few bits change the result beyond
rounding to the run's dtype. `resolve`
makes them of the options; `Lossy` is what is in force and what generation_config.json and jobs
record. A run without any is exact.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from cogvideox.transformer.precision import PRECISIONS, Precision, read_precision
from runtime import processes
from runtime.json_files import read_json_object
from runtime.text import printable
from stages import sparse as sparse_files
from stages.sections import DENOISE, PARTS

if TYPE_CHECKING:
    from cogvideox.denoising.calibration import CalibrationTarget
    from cogvideox.denoising.scheduler import Schedule
    from cogvideox.denoising.step_mask import StepMask
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.settings import DenoisingSettings
    from cogvideox.transformer.block_rules import SparseAttention

EXACT = "exact"


class _Speed(NamedTuple):
    """What `--speed` sets.

    Attributes:
        computed_share: of the steps, for masks; near computes 29 of 50, fast 24, turbo 20.
        guidance_until: 1 computes the difference of guidance in every step.
        dense_share: of the steps, before attention turns sparse.
    """

    step_mask: str
    computed_share: float
    guidance_until: float
    sparse_attention: str = "none"
    dense_share: float = sparse_files.DENSE_SHARE


# near leaves attention dense: in published measurements sparse attention costs more than a mask.
_SPEEDS = {
    EXACT: _Speed("none", 0.58, 1.0),
    "near": _Speed("near", 0.58, 1.0),
    "fast": _Speed("fast", 0.48, 1.0, "fast"),
    "turbo": _Speed("fast", 0.40, 0.5, "fast", 0.1),
}
SPEEDS = tuple(_SPEEDS)
NAMED_MASKS = ("none", "near", "fast")
_MAX_BYTES = 16 << 20


class SpeedOptions(Protocol):
    """Options by the names of the command line; None takes what `speed` sets.

    Attributes:
        speed: one of SPEEDS.
        step_mask: one of NAMED_MASKS or a file: a calibration of calibrate.py, or a JSON object
            such as {"steps": "1101"}, 1 for each computed step and 0 for each skipped one.
        mask_steps: how many steps are computed.
        guidance_until: share of the steps that run the transformer for the negative prompts.
        sparse_attention: one of NAMED_MASKS or a file of rules.
        dense_steps: the steps from this one on attend sparsely.
        dense_layers: the first layers that attend densely in all steps.
        attention_precision: see `Precision`.
    """

    @property
    def speed(self) -> str: ...
    @property
    def step_mask(self) -> str | None: ...
    @property
    def mask_steps(self) -> int | None: ...
    @property
    def guidance_until(self) -> float | None: ...
    @property
    def sparse_attention(self) -> str | None: ...
    @property
    def dense_steps(self) -> int | None: ...
    @property
    def dense_layers(self) -> int | None: ...
    @property
    def attention_precision(self) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class NamedSpeed:
    """The options that only name a speed."""

    speed: str
    step_mask: None = None
    mask_steps: None = None
    guidance_until: None = None
    sparse_attention: None = None
    dense_steps: None = None
    dense_layers: None = None
    attention_precision: None = None


@dataclasses.dataclass(frozen=True)
class Lossy:
    """The lossy options in force.

    Attributes:
        mask: which steps run the transformer; None runs it in all.
        guided_steps: the number of steps that compute the difference of guidance; None computes it
            in all.
        calibrated: whether the mask was measured for this model.
        sparse: what attention keeps in sparse steps; None keeps everything in all.
        dense_steps: the steps from this one on are sparse; None if there are none.
        precision: of the products in all steps.
    """

    mask: StepMask | None = None
    guided_steps: int | None = None
    calibrated: bool = False
    sparse: SparseAttention | None = None
    dense_steps: int | None = None
    precision: Precision = Precision()

    @property
    def names(self) -> list[str]:
        """The options in force, for people."""
        found = []
        if self.mask:
            calibrated = "" if self.calibrated else ", not calibrated for this model"
            steps = f"{self.mask.budget} of {len(self.mask.computed)} steps computed"
            found.append(f"step mask ({steps}{calibrated})")
        if self.guided_steps:
            found.append(f"guidance reused after step {self.guided_steps}")
        if self.sparse:
            found.append(f"sparse attention after step {self.dense_steps}")
        return found + [f"--{name} {value}" for name, value in self.precision.options.items()]

    def describe(self) -> str:
        """Returns "exact", or the options in one line."""
        return f"lossy: {'; '.join(self.names)}" if self.names else EXACT

    def computed_steps(self, steps: int, sparse_cost: float = 1.0) -> float:
        """Returns how many exact steps take as long as a run of `steps`.

        A skipped step takes nothing, and one without the negative prompts half.

        Args:
            sparse_cost: of a sparse step, in dense ones.
        """
        from cogvideox.denoising.parts import split_steps

        computed = self.mask.computed if self.mask else (True,) * steps
        return sum(
            sum(computed[start:stop]) * (sparse_cost if sparse else 1) / (2 if gated else 1)
            for start, stop, sparse, gated in split_steps(
                steps, self.dense_steps, self.guided_steps
            )
        )

    def decides_programs(
        self, steps: int
    ) -> tuple[bool, bool, SparseAttention | None, tuple[tuple[bool, bool], ...], Precision]:
        """Returns what the programs of a run depend on, as `session.Shape` takes it.

        These are: whether there is a mask, and a gate, the rules, for each part of the run whether
        it is sparse and gated, if any is sparse, and the precision.
        """
        from cogvideox.denoising.parts import split_steps

        kinds = ()
        if self.sparse:
            parts = split_steps(steps, self.dense_steps, self.guided_steps)
            kinds = tuple((part.sparse, part.gated) for part in parts)
        masked, gated = self.mask is not None, self.guided_steps is not None
        return masked, gated, self.sparse, kinds, self.precision

    def to_json(self) -> str | dict[str, Any]:
        """Returns "exact", or an object with each option in force."""
        found: dict[str, Any] = {}
        if self.mask:
            scales = [list(scales) for scales in self.mask.scales]
            found["step_mask"] = {
                **{"steps": self.mask.text, "scales": scales, "calibrated": self.calibrated}
            }
        if self.guided_steps:
            found["guided_steps"] = self.guided_steps
        if self.sparse:
            recorded = sparse_files.to_json(self.sparse)
            found["sparse_attention"] = {**recorded, "dense_steps": self.dense_steps}
        return found | self.precision.options or EXACT

    def apply(self, schedule: Schedule) -> Schedule:
        """Returns the schedule with these options.

        Raises:
            ValueError: they are of another number of steps.
        """
        return dataclasses.replace(
            schedule,
            mask=self.mask,
            guided_steps=self.guided_steps,
            dense_steps=self.dense_steps,
        )


def read_lossy(value: object) -> Lossy:
    """Inverts `Lossy.to_json`.

    Raises:
        ValueError: the value is no such object.
    """
    from cogvideox.denoising.step_mask import StepMask, parse_computed

    if value == EXACT:
        return Lossy()
    try:
        known = {"step_mask", "guided_steps", "sparse_attention", *PRECISIONS}
        if not isinstance(value, dict) or value.keys() - known:
            raise ValueError("unknown lossy options")
        mask, guided = value.get("step_mask"), value.get("guided_steps")
        if not (guided is None or (type(guided) is int and guided > 0)):
            raise ValueError(f"guided_steps is {guided!r}")
        lossy = Lossy(guided_steps=guided, precision=read_precision(value))
        if "sparse_attention" in value:
            recorded = value["sparse_attention"]
            sparse, dense_steps = sparse_files.from_json(recorded), recorded["dense_steps"]
            if not (type(dense_steps) is int and dense_steps >= 0):
                raise ValueError(f"dense_steps is {dense_steps!r}")
            lossy = dataclasses.replace(lossy, sparse=sparse, dense_steps=dense_steps)
        if mask is None:
            return lossy
        scales = tuple(tuple(map(float, scales)) for scales in mask["scales"])
        step_mask = StepMask(parse_computed(str(mask["steps"])), scales)
        return dataclasses.replace(lossy, mask=step_mask, calibrated=mask["calibrated"] is True)
    except (ValueError, TypeError, KeyError) as error:
        shown = printable(str(value))[:80]
        raise ValueError(f"speed is {shown}, not what stage 2 writes: {error}") from error


def resolve(options: SpeedOptions, settings: DenoisingSettings, model: ModelFolder | None) -> Lossy:
    """Makes the options that are in force in a run.

    Args:
        model: None refuses calibrations.

    Raises:
        ValueError: an option does not fit the run or another option; a file is damaged, or a
            calibration is for another model, size, number of steps or scheduler.
    """
    speed, steps = _SPEEDS[options.speed], settings.executed_steps
    until = options.guidance_until
    if until is not None and until < 1 and not settings.guided:
        raise ValueError(f"--guidance_until {until:g}: this run has no guidance")
    guided_steps = _count(speed.guidance_until if until is None else until, steps)
    if guided_steps == 0:
        raise ValueError("--guidance_until 0: at least one step computes the difference to reuse")
    gated = settings.guided and guided_steps < steps
    mask, calibrated = _resolve_mask(options, speed, settings, model)
    if mask is not None and all(mask.computed):
        mask = None  # an exact run
    sparse, dense_steps = _resolve_sparse(options, speed, settings, model)
    return Lossy(
        *(mask, guided_steps if gated else None, calibrated and mask is not None),
        *(sparse, dense_steps, _resolve_precision(options)),
    )


def _resolve_precision(options: SpeedOptions) -> Precision:
    return Precision(options.attention_precision or Precision().attention)


def _resolve_sparse(
    options: SpeedOptions, speed: _Speed, settings: DenoisingSettings, model: ModelFolder | None
) -> tuple[SparseAttention | None, int | None]:
    """Returns what attention keeps, and from which step on; None if it keeps everything."""
    name, steps = options.sparse_attention or speed.sparse_attention, settings.executed_steps
    if name == "none":
        for option in ("dense_steps", "dense_layers"):
            if getattr(options, option) is not None:
                raise ValueError(f"--{option} is for --sparse_attention or a --speed that sets it")
        return None, None
    dense_steps = options.dense_steps
    if dense_steps is None:
        dense_steps = _count(speed.dense_share, steps)
    elif dense_steps >= steps:
        raise ValueError(
            f"--dense_steps {dense_steps} leaves no sparse step of {steps}; take 0 to {steps - 1}, "
            "or --sparse_attention none"
        )
    most = math.inf if model is None else model.transformer.num_layers - 1
    layers = options.dense_layers
    if layers is None:
        layers = int(min(sparse_files.DENSE_LAYERS, most))
    elif layers > most:
        raise ValueError(f"--dense_layers {layers} leaves no sparse layer; take at most {most}")
    if dense_steps >= steps:
        return None, None  # too few steps for the default
    return sparse_files.resolve_sparse(name, layers, settings, model), dense_steps


def _resolve_mask(
    options: SpeedOptions, speed: _Speed, settings: DenoisingSettings, model: ModelFolder | None
) -> tuple[StepMask | None, bool]:
    """Returns the mask, and whether it is calibrated for the model."""
    from cogvideox.denoising.step_mask import COMPUTED_SHARE, default_mask, unscaled_mask

    name, steps = options.step_mask or speed.step_mask, settings.executed_steps
    if name == "none":
        if options.mask_steps is not None:
            raise ValueError("--mask_steps is for --step_mask or --speed other than exact")
        return None, False
    share = COMPUTED_SHARE.get(options.step_mask or "", speed.computed_share)
    budget = _count(share, steps) if options.mask_steps is None else options.mask_steps
    if budget > steps:
        raise ValueError(f"--mask_steps {budget} is more than the {steps} steps of the run")
    branches = 2 if settings.guided else 1
    if name in NAMED_MASKS:
        return unscaled_mask(default_mask(steps, budget), branches), False
    path = Path(name)
    path = processes.folder_of_first(path.parent, [path.name]) / path.name
    if not os.path.lexists(path):
        raise ValueError(f"--step_mask {printable(name)} is neither none, near, fast nor a file")
    content = read_json_object(path, max_bytes=_MAX_BYTES)
    if "steps" not in content:
        if model is None:
            raise ValueError(f"--step_mask {printable(name)}: there is no model to compare it with")
        return _calibrated_mask(path, budget, settings, model), True
    if options.mask_steps is not None:
        raise ValueError(f"--mask_steps {budget}: {printable(name)} says which steps are computed")
    return unscaled_mask(_own_steps(content, name, steps), branches), False


def _own_steps(content: Mapping[str, object], name: str, steps: int) -> Sequence[bool]:
    from cogvideox.denoising.step_mask import parse_computed

    text = content["steps"]
    if not isinstance(text, str) or content.keys() != {"steps"}:
        raise ValueError(f'{printable(name)} is not a mask such as {{"steps": "1101"}}')
    try:
        computed = parse_computed(text)
    except ValueError as error:
        raise ValueError(f"{printable(name)}: {error}") from error
    if len(computed) != steps:
        raise ValueError(f"{printable(name)} is for {len(computed)} steps, this run has {steps}")
    return computed


def _calibrated_mask(
    path: Path, budget: int, settings: DenoisingSettings, model: ModelFolder
) -> StepMask:
    from cogvideox.denoising.calibration import read_calibration

    calibration = read_calibration(path)
    calibration.check_matches(calibration_target(settings, model), path)
    return calibration.step_mask(budget)


def calibration_target(settings: DenoisingSettings, model: ModelFolder) -> CalibrationTarget:
    """Returns what a calibration must be for to fit a run."""
    from cogvideox.denoising.calibration import CalibrationTarget

    own = {field.name for field in dataclasses.fields(CalibrationTarget)}
    return CalibrationTarget(
        model_id=model.model_id,
        model={part: model.digest(part) for part in PARTS[DENOISE]},
        **{name: value for name, value in dataclasses.asdict(settings).items() if name in own},
    )


def _count(share: float, steps: int) -> int:
    """Returns that share of the steps, rounded up, whatever the rounding of the product."""
    return math.ceil(share * steps - 1e-9)
