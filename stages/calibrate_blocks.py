"""Calibrates sparse attention: finds the sparsest rule that each head of a model bears."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from runtime.errors import checking_input
from runtime.files import write_json
from runtime.open_folder import OpenFolder
from runtime.progress import progress, working
from runtime.versions import versions
from stages import denoise, encode, files, sparse, speed
from stages.calibrate import (
    CalibrateOptions,
    denoise_options,
    embed_each,
    encode_options,
    read_prompts,
)
from stages.steps import check_takes_lists, compile_steps, load_steps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from cogvideox.denoising.program import Denoiser
    from cogvideox.model.folder import ModelFolder
    from cogvideox.transformer.block_rules import Rule

RULES_FILE = "block_rules.json"
_PROBED = 3  # steps of each video, from the first that is sparse by default to the last


def run(options: CalibrateOptions, alpha: float) -> None:
    """Measures, and writes block_rules.json.

    Args:
        alpha: the largest error of a head's output that its rule may make, relative to the dense
            output, L2.
    """
    with working("calibrate: importing JAX, starting the devices"), checking_input():
        prompts = read_prompts(options.prompts)
        encoding = encode_options(options, prompts)
        files.check_executables(options.executables)
        files.check_output_folder(options.output_dir, RULES_FILE)
        model, tokens = encode.check(encoding)
        checked = denoise.check(denoise_options(options), model, 1, tokens)
        check_takes_lists(checked.denoiser)
    print(f"{checked.settings.describe()}\nmesh {dict(checked.denoiser.mesh.shape)}")
    start = time.monotonic()
    with OpenFolder(options.output_dir) as watched:
        texts = embed_each(encoding, model, tokens)
        found = _Found(checked.denoiser)
        for errors in _measure(options, checked, found.groups, texts):
            found.add(errors)
        made = {"prompts": prompts, "seed": options.seed, "seconds": time.monotonic() - start}
        made = {**made, "dtype": options.dtype, "versions": versions()}
        written = found.to_json(alpha, checked.settings, model) | {"made_with": made}
        path = options.output_dir / RULES_FILE
        write_json(path, written)
        watched.check()
    print(
        f"{path}: {written['density']:.0%} of the blocks are computed, the largest error of a head "
        f"is {max(map(max, written['errors'])):.3g}"
    )


class _Found:
    """The rules to choose from, and the largest error of each.

    Attributes:
        rules: by name, the sparsest first.
        groups: denoisers that measure all of them in turn.
    """

    def __init__(self, exact: Denoiser) -> None:
        from cogvideox.denoising.block_errors import measuring

        rules = sparse.named_rules()
        rules.pop("dense")
        costs = {}
        for name, rule in rules.items():
            step = measuring(exact, [rule]).sparse_step
            assert step is not None
            costs[name] = int(step.lists.lengths[1].sum())
        names = sorted(rules, key=lambda name: costs[name])
        self.rules = {name: rules[name] for name in names}
        self.groups = _groups(exact, list(self.rules.values()))
        self._errors: np.ndarray | None = None

    def add(self, errors: np.ndarray) -> None:
        """Takes errors of one step of one video, [L, N, R]."""
        import numpy as np

        self._errors = errors if self._errors is None else np.maximum(self._errors, errors)

    def to_json(self, alpha: float, settings: Any, model: ModelFolder) -> dict[str, Any]:
        """Chooses for each head the sparsest rule within alpha, else dense."""
        import numpy as np

        assert self._errors is not None
        fits = self._errors <= alpha
        chosen = np.where(fits.any(-1), fits.argmax(-1), len(self.rules))
        padded = np.concatenate([self._errors, np.zeros_like(self._errors[..., :1])], -1)
        errors = np.take_along_axis(padded, chosen[..., None], -1)[..., 0]
        names = [*self.rules, "dense"]
        heads = [[names[rule] for rule in layer] for layer in chosen]
        rules = {name: sparse.reach_of(rule) for name, rule in self.rules.items()}
        content = {"rules": rules, "heads": heads}
        density = sparse.density_of(sparse.of_json(content, 0, settings, model), settings, model)
        return {
            **content,
            "alpha": alpha,
            "errors": [[round(float(error), 6) for error in layer] for layer in errors],
            "density": round(density, 4),
            "calibrated_for": dataclasses.asdict(speed.calibration_target(settings, model)),
        }


def _groups(exact: Denoiser, rules: list[Rule]) -> list[Denoiser]:
    """Splits the rules among denoisers: the lists of all may not fit a TPU's scalar memory."""
    from cogvideox.denoising.block_errors import measuring

    for size in range(len(rules), 0, -1):
        groups = [measuring(exact, rules[i : i + size]) for i in range(0, len(rules), size)]
        try:
            _ = [group.sparse_step for group in groups]
        except ValueError:
            if size == 1:
                raise
        else:
            return groups
    raise AssertionError("there are rules")


def _measure(
    options: CalibrateOptions,
    checked: denoise.DenoisingRun,
    groups: Sequence[Denoiser],
    texts: Sequence[Mapping[str, np.ndarray]],
) -> Iterator[np.ndarray]:
    """Runs the exact model; yields the errors at some steps of each video."""
    import numpy as np

    from cogvideox.denoising.block_errors import compile_errors
    from cogvideox.denoising.loop import place_positions, run_loop, to_devices, to_host
    from cogvideox.denoising.noise import NoiseSource

    total = len(checked.schedule.timesteps)
    first = min(round(total * sparse.DENSE_SHARE), total - 1)
    probed = {int(step) for step in np.linspace(first, total - 1, _PROBED)}
    with working("loading the transformer and its programs"):
        parameters = checked.denoiser.load(options.executables)
        steps = compile_steps(checked.denoisers, checked.schedule, options.executables)
        programs = [(compile_errors(group), place_positions(group)) for group in groups]
    with progress(total=total * len(texts), what="calibrating") as bar:
        for index, embeddings in enumerate(texts):
            loaded = load_steps(checked.denoisers, steps, parameters, embeddings)
            prompt_embeds = groups[0].prompt_embeds(embeddings)
            seed = options.seed + index
            for state in run_loop(loaded, checked.schedule, seed, NoiseSource()):
                bar.update(1)
                if state.steps in probed:
                    tokens, *_ = to_devices(groups[0], to_host(state))
                    timestep = np.int32(checked.schedule.timesteps[state.steps])
                    found = [
                        measure(tokens, parameters, positions, prompt_embeds, timestep)
                        for measure, positions in programs
                    ]
                    yield np.concatenate(found, -1)
