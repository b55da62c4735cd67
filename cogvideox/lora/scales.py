"""The factor of a LoRA: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRAs.

Alpha is in the settings that peft writes, as adapter_config.json or in the header of the file, or
in a tensor `MODULE.alpha`. Files with neither have the factor 1.

Source: peft's LoraConfig, LoraModel._create_and_replace and get_pattern_key.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from runtime.text import printable

ADAPTER_CONFIG = "adapter_config.json"  # peft's settings, beside its file of tensors
_DEFAULT = 8  # of peft's r and lora_alpha
# peft's patterns are regular expressions. Ones that could take forever to match are refused.
_PATTERN = re.compile(r"[\w.\\^$|()*+?\[\]-]{1,300}", re.ASCII)
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_MOST_REPEATS, _MOST_PATTERNS = 4, 10_000


@dataclasses.dataclass(frozen=True)
class PeftSettings:
    """The settings of peft that decide ranks and factors.

    Attributes:
        ranks, alphas: those of modules that differ, by peft's patterns.
        base_model: name of the model that was trained; None if unknown.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilised: bool
    base_model: str | None

    def alpha_of(self, module: str) -> float:
        """Alpha of a module."""
        return _matching(self.alphas, module, self.alpha)

    def scale_of(self, module: str, rank: int) -> float:
        """The factor of a module.

        Args:
            rank: of its tensors.

        Raises:
            ValueError: the settings say another rank.
        """
        said = _matching(self.ranks, module, self.rank)
        if said != rank:
            raise ValueError(f"its rank is {rank}, the settings of the LoRA say {said}")
        return self.alpha_of(module) / (math.sqrt(rank) if self.rank_stabilised else rank)


def _matching[Value](values: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in values.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_peft_settings(values: Mapping[str, object]) -> PeftSettings:
    """Reads settings of peft, by its names.

    Raises:
        ValueError: a value is wrong, or asks for more than a plain LoRA.
    """
    kind = values.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(
            f"peft_type is {printable(str(kind))[:80]}; only plain LoRAs are supported"
        )
    for name, what in (
        ("use_dora", "DoRA"),
        ("lora_bias", "a LoRA with a bias"),
        ("fan_in_fan_out", "a LoRA of transposed weights"),
        ("modules_to_save", "whole layers beside the LoRA"),
        ("use_qalora", "QALoRA"),
        ("alora_invocation_tokens", "an activated LoRA"),
    ):
        if values.get(name):
            raise ValueError(f"{name} asks for {what}, which is not supported")
    base_model = values.get("base_model_name_or_path")
    return PeftSettings(
        rank=_positive_integer("r", values.get("r", _DEFAULT)),
        alpha=positive("lora_alpha", values.get("lora_alpha", _DEFAULT)),
        ranks={
            pattern: _positive_integer("rank_pattern", value)
            for pattern, value in _patterns("rank_pattern", values).items()
        },
        alphas={
            pattern: positive("alpha_pattern", value)
            for pattern, value in _patterns("alpha_pattern", values).items()
        },
        rank_stabilised=bool(values.get("use_rslora")),
        base_model=base_model if isinstance(base_model, str) else None,
    )


def positive(name: str, value: object) -> float:
    """Raises ValueError for anything but a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ValueError(f"{name} is {printable(str(value))[:80]}, not a positive number")
    return float(value)


def _positive_integer(name: str, value: object) -> int:
    if positive(name, value) % 1:
        raise ValueError(f"{name} is {value}, not an integer")
    return int(positive(name, value))


def _patterns(name: str, values: Mapping[str, object]) -> Mapping[str, object]:
    patterns = values.get(name) or {}
    if not isinstance(patterns, Mapping) or len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"{name} is not an object of at most {_MOST_PATTERNS} patterns")
    for pattern in patterns:
        repeats = len(re.findall(r"[*+?]", pattern))
        fits = _PATTERN.fullmatch(pattern) and not _REPEATED_GROUP.search(pattern)
        try:
            if not fits or repeats > _MOST_REPEATS:
                raise ValueError("it is no name, or too complex")
            re.compile(pattern)
        except (ValueError, re.error) as error:
            shown = printable(str(pattern))[:80]
            raise ValueError(f"{name} has the pattern {shown}: {error}") from error
    return patterns
