"""Sparse attention among the options of stage 2: presets, files, and how settings record it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import processes
from runtime.json_files import read_json_object
from runtime.text import printable
from stages.sections import DENOISE, PARTS

if TYPE_CHECKING:
    from cogvideox.model.folder import ModelFolder
    from cogvideox.model.settings import DenoisingSettings
    from cogvideox.transformer.block_rules import Rule, SparseAttention
    from cogvideox.transformer.tiling import Tiling

NAMED = ("none", "near", "fast")
DENSE_SHARE = 0.2  # of the steps, from the first; most papers borrow it from each other
DENSE_LAYERS = 1
_MAX_BYTES = 16 << 20
_CALIBRATED = ("calibrated_for", "alpha", "errors", "density", "made_with")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_WORDS = {"all": 1 << 16, "none": -1}


def named_rules() -> dict[str, Rule]:
    """Rules that options and files know by name.

    near is `radial` with a decay of 0.5 at 768x1360x81. fast keeps the frame whole, 6 rows of the
    frames beside, and the token's own row of all others.
    """
    from cogvideox.transformer.block_rules import ALL, DENSE, Rule, both, spatial, temporal

    return {
        "dense": DENSE,
        "near": Rule((ALL, ALL, 7, 7, 4, 4, 4, 4, 2)),
        "fast": Rule((ALL, 6, 0)),
        "spatial": spatial(),
        "temporal": temporal(),
        "both": both(),
    }


def resolve_sparse(
    name: str, dense_layers: int, settings: DenoisingSettings, model: ModelFolder | None
) -> SparseAttention:
    """Makes the rules of `near`, `fast` or a file.

    Args:
        model: None refuses files.

    Raises:
        ValueError: it is none of these, or the file does not fit the model.
    """
    from cogvideox.transformer.block_rules import SparseAttention

    if name in NAMED:
        return SparseAttention((named_rules()[name],), dense_layers=dense_layers)
    path = Path(name)
    path = processes.folder_of_first(path.parent, [path.name]) / path.name
    shown = printable(name)
    if not os.path.lexists(path):
        raise ValueError(f"--sparse_attention {shown} is neither none, near, fast nor a file")
    content = read_json_object(path, max_bytes=_MAX_BYTES)
    if model is None:
        raise ValueError(f"--sparse_attention {shown}: there is no model to compare it with")
    try:
        sparse = of_json(content, dense_layers, settings, model)
        config = model.transformer
        sparse.table(config.num_layers, config.num_attention_heads)
    except ValueError as error:
        raise ValueError(f"--sparse_attention {shown}: {error}") from error
    return sparse


def of_json(
    content: Mapping[str, Any], dense_layers: int, settings: DenoisingSettings, model: ModelFolder
) -> SparseAttention:
    """Reads rules by layer and head, those of calibrate.py --block_rules or a user's own.

    Raises:
        ValueError: they are damaged, or were calibrated for another model or size.
    """
    from cogvideox.transformer.block_rules import SparseAttention

    if content.keys() - {"rules", "heads", *_CALIBRATED} or "heads" not in content:
        raise ValueError('it is not {"rules": {NAME: REACH}, "heads": RULE or [[RULE, ...], ...]}')
    if "calibrated_for" in content:
        _check_target(content["calibrated_for"], settings, model)
    own, heads = content.get("rules", {}), content["heads"]
    if not isinstance(own, dict):
        raise ValueError("its rules are not an object")
    tiling = tiling_of(settings, model)
    rules = named_rules() | {name: _read_rule(value, tiling) for name, value in own.items()}
    layers = [[heads]] if isinstance(heads, str) else heads
    if not (isinstance(layers, list) and all(isinstance(layer, list) for layer in layers)):
        raise ValueError("its heads are neither the name of a rule nor a list for each layer")
    names = [name for layer in layers for name in layer]
    unknown = [name for name in names if not isinstance(name, str) or name not in rules]
    if unknown or not names:
        named = printable(str(unknown[0]))[:40] if unknown else "no rule"
        raise ValueError(f"its heads name {named}; rules are {', '.join(sorted(rules))}")
    used = list(dict.fromkeys(names))
    if len(used) > len(_DIGITS):
        raise ValueError(f"it has {len(used)} rules, at most {len(_DIGITS)} are possible")
    of_heads = tuple(tuple(used.index(name) for name in layer) for layer in layers)
    only = None if isinstance(heads, str) else of_heads
    return SparseAttention(tuple(rules[name] for name in used), only, dense_layers)


def _check_target(value: object, settings: DenoisingSettings, model: ModelFolder) -> None:
    """Checks that rules were calibrated for a run's model and size."""
    if not isinstance(value, dict):
        raise ValueError("its calibrated_for is not an object")
    size = tuple(value.get(name) for name in ("height", "width", "num_frames"))
    if size != (settings.height, settings.width, settings.num_frames):
        wanted = f"{settings.height}x{settings.width}x{settings.num_frames}"
        raise ValueError(
            f"it was calibrated for {printable('x'.join(map(str, size)))[:40]}, this run is of "
            f"{wanted}; calibrate it with calibrate.py --block_rules"
        )
    if value.get("model") != {part: model.digest(part) for part in PARTS[DENOISE]}:
        raise ValueError(
            "it was calibrated for another model; calibrate this one with calibrate.py "
            "--block_rules"
        )


def tiling_of(settings: DenoisingSettings, model: ModelFolder) -> Tiling:
    """Returns the tiling of a run's tokens."""
    from cogvideox.model.settings import latent_shape
    from cogvideox.transformer.tiling import choose_tiling

    config = model.transformer
    latents, _ = latent_shape(settings, model, 1)
    patch_t, patch = config.patch_size_t or 1, config.patch_size
    grid = latents.frames // patch_t, latents.height // patch, latents.width // patch
    return choose_tiling(grid, config.max_text_seq_length)


def density_of(sparse: SparseAttention, settings: DenoisingSettings, model: ModelFolder) -> float:
    """Returns the share of the blocks of attention that a sparse step of a run computes."""
    from cogvideox.model.settings import latent_shape
    from cogvideox.transformer.sparse_step import make_sparse_step
    from cogvideox.transformer.tokens import TokenLayout

    config, tiling = model.transformer, tiling_of(settings, model)
    latents, _ = latent_shape(settings, model, 1)
    layout = TokenLayout(
        *(latents, config.patch_size, config.patch_size_t or 1, tiling.text, tiling.rows, tiling)
    )
    return make_sparse_step(sparse, config, layout, 1, 1).density()


def _read_rule(value: object, tiling: Tiling) -> Rule:
    from cogvideox.transformer.block_rules import radial

    if isinstance(value, dict) and value.keys() == {"radial"}:
        decay = value["radial"]
        if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay <= 64:
            raise ValueError(f"the decay {printable(str(decay))[:40]} is not a number from 0 to 64")
        return radial(decay, tiling)
    return read_rule(value)


def read_rule(value: object) -> Rule:
    """Reads a reach such as ["all", 6, 3, "none"]; see `block_rules.Rule`.

    Raises:
        ValueError: it is none.
    """
    from cogvideox.transformer.block_rules import Rule

    values = value if isinstance(value, list) else [value]
    reach: list[Any] = [_WORDS.get(x) if isinstance(x, str) else x for x in values]
    if not all(type(x) is int for x in reach):
        raise ValueError(f'{printable(str(value))[:60]} is not a reach such as ["all", 6, 3, 0]')
    return Rule(tuple(reach))


def reach_of(rule: Rule) -> list[int | str]:
    """Inverts `read_rule`."""
    words = {reach: word for word, reach in _WORDS.items()}
    return [words.get(reach, reach) for reach in rule.reach]


def to_json(sparse: SparseAttention) -> dict[str, Any]:
    """Returns the rules, and the heads as a digit each, a text for each layer."""
    rules = [reach_of(rule) for rule in sparse.rules]
    heads = ["".join(_DIGITS[rule] for rule in layer) for layer in sparse.heads or ()]
    return {"rules": rules, "heads": heads or None, "dense_layers": sparse.dense_layers}


def from_json(value: Mapping[str, Any]) -> SparseAttention:
    """Inverts `to_json`.

    Raises:
        ValueError, TypeError, KeyError: it is no such object.
    """
    from cogvideox.transformer.block_rules import SparseAttention

    layers = value["heads"]
    if not (type(value["dense_layers"]) is int and value["dense_layers"] >= 0):
        raise ValueError(f"dense_layers is {value['dense_layers']!r}")
    heads = layers and tuple(tuple(_DIGITS.index(digit) for digit in layer) for layer in layers)
    rules = tuple(read_rule(rule) for rule in value["rules"])
    return SparseAttention(rules, heads or None, value["dense_layers"])
