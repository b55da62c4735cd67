"""Calibrates sparse attention: finds the sparsest rule that each head of a model bears."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from runtime.errors import checking_input
from runtime.files import write_json
from runtime.json_files import read_json_object
from runtime.open_folder import OpenFolder
from runtime.progress import progress, working
from runtime.text import printable
from runtime.typed_json import from_json
from runtime.versions import versions
from stages import denoise, encode, files, sparse, speed
from stages.calibrate import (
    CalibrateOptions,
    calibration_mark,
    denoise_options,
    embed_each,
    encode_options,
    read_prompts,
)
from stages.steps import check_takes_lists, compile_steps, load_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from cogvideox.denoising.program import Denoiser
    from cogvideox.model.folder import ModelFolder
    from cogvideox.transformer.block_rules import Rule

RULES_FILE = "block_rules.json"
PROGRESS_FILE = "block_rules_progress.json"
_MAX_BYTES = 256 << 20  # 100 KB a prompt
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
        files.check_output_folder(options.output_dir, RULES_FILE, PROGRESS_FILE)
        model, tokens = encode.check(encoding)
        checked = denoise.check(denoise_options(options), model, 1, tokens)
        check_takes_lists(checked.denoiser)
    print(f"{checked.settings.describe()}\nmesh {dict(checked.denoiser.mesh.shape)}")
    with OpenFolder(options.output_dir) as watched:
        choice = _Choice(checked.denoiser)
        target = speed.calibration_target(checked.settings, model)
        mark = calibration_mark(options, prompts, model, tokens, target)
        found = _Progress(options.output_dir / PROGRESS_FILE, mark, choice)
        if len(found.videos) < len(prompts):
            texts = embed_each(encoding, model, tokens)
            _measure(options, checked, choice.groups, texts, found)
        made = {"prompts": prompts, "seed": options.seed, "seconds": round(found.seconds, 1)}
        made = {**made, "dtype": options.dtype, "versions": versions()}
        written = choice.to_json(found.largest(), alpha, checked.settings, model)
        written |= {"made_with": made}
        path = options.output_dir / RULES_FILE
        write_json(path, written)
        found.path.unlink(missing_ok=True)
        watched.check()
    print(
        f"{path}: {written['density']:.0%} of the blocks are computed, the largest error of a head "
        f"is {max(map(max, written['errors'])):.3g}"
    )


@dataclasses.dataclass(frozen=True)
class _ProgressJson:
    fingerprint: str
    rules: dict[str, list[Any]]
    seconds: float
    videos: list[list[list[list[float]]]]


class _Progress:
    """The file from which a killed calibration resumes.

    Attributes:
        videos: the largest errors of the steps of each video, float32 [L, N, R].
        seconds: that measuring took.
    """

    def __init__(self, path: Path, mark: str, choice: _Choice) -> None:
        """
        Args:
            mark: identifies the calibration; another's file is ignored.
        """
        self.path, self._mark = path, mark
        self._rules = {name: sparse.reach_of(rule) for name, rule in choice.rules.items()}
        self.videos: list[np.ndarray] = []
        self.seconds = 0.0
        if path.exists():
            self._read(choice.shape)

    def _read(self, shape: tuple[int, int, int]) -> None:
        import numpy as np

        try:
            file = from_json(_ProgressJson, read_json_object(self.path, max_bytes=_MAX_BYTES))
            if (file.fingerprint, file.rules) != (self._mark, self._rules):
                raise ValueError("it belongs to another calibration")
            videos = [np.array(video, np.float32) for video in file.videos]
            if any(video.shape != shape for video in videos):
                raise ValueError("it does not hold the errors of every head")
        except ValueError as error:
            print(f"ignoring {self.path}: {printable(str(error))}")
            return
        self.videos, self.seconds = videos, file.seconds
        print(f"resuming from {self.path}, {len(videos)} prompt(s) done")

    def save(self, errors: np.ndarray, seconds: float) -> None:
        """Saves the errors of one more video."""
        self.videos.append(errors)
        self.seconds += seconds
        videos = [video.tolist() for video in self.videos]
        held = _ProgressJson(self._mark, self._rules, self.seconds, videos)
        write_json(self.path, dataclasses.asdict(held))

    def largest(self) -> np.ndarray:
        """Returns the largest error of all videos, [L, N, R]."""
        import numpy as np

        return np.max(self.videos, 0)


class _Choice:
    """The rules to choose from.

    Attributes:
        rules: by name, the sparsest first.
        groups: denoisers that measure all of them in turn.
        shape: [L, N, R] of the errors.
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
        self.shape = exact.config.num_layers, exact.config.num_attention_heads, len(names)

    def to_json(
        self, largest: np.ndarray, alpha: float, settings: Any, model: ModelFolder
    ) -> dict[str, Any]:
        """Chooses for each head the sparsest rule whose error is at most alpha, else dense.

        Args:
            largest: errors, [L, N, R].
        """
        import numpy as np

        fits = largest <= alpha
        chosen = np.where(fits.any(-1), fits.argmax(-1), len(self.rules))
        padded = np.concatenate([largest, np.zeros_like(largest[..., :1])], -1)
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
    found: _Progress,
) -> None:
    """Runs the exact model for the videos that `found` lacks, and saves the errors of each."""
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
    done = len(found.videos)
    with progress(total=total * (len(texts) - done), what="calibrating") as bar:
        for index, embeddings in enumerate(texts[done:], done):
            start, of_steps = time.monotonic(), []
            loaded = load_steps(checked.denoisers, steps, parameters, embeddings)
            prompt_embeds = groups[0].prompt_embeds(embeddings)
            seed = options.seed + index
            for state in run_loop(loaded, checked.schedule, seed, NoiseSource()):
                bar.update(1)
                if state.steps in probed:
                    tokens, *_ = to_devices(groups[0], to_host(state))
                    timestep = np.int32(checked.schedule.timesteps[state.steps])
                    of_groups = [
                        measure(tokens, parameters, positions, prompt_embeds, timestep)
                        for measure, positions in programs
                    ]
                    of_steps.append(np.concatenate(of_groups, -1))
            found.save(np.max(of_steps, 0), time.monotonic() - start)
