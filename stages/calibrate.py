"""Calibrates step masks: measures what a model loses by skipping steps (lossy runs of stage 2)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError, checking_input
from runtime.files import open_regular, write_json
from runtime.fingerprint import fingerprint
from runtime.json_files import read_json_object
from runtime.open_folder import OpenFolder
from runtime.progress import progress, working
from runtime.text import printable
from runtime.typed_json import from_json
from runtime.versions import versions
from stages import denoise, encode, files
from stages.sections import ENCODE, PARTS

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.denoising.calibration import Calibration, CalibrationTarget
    from cogvideox.denoising.segment_errors import VideoErrors
    from cogvideox.model.folder import ModelFolder

CALIBRATION_FILE = "calibration.json"
PROGRESS_FILE = "calibration_progress.json"
# One prompt is enough in LeMiCa's paper: masks of 1 and of 350 prompts differ by 0.16 dB.
DEFAULT_PROMPT = (
    "A panda sits on a wooden stool in a bamboo forest and plays a small guitar, while leaves "
    "fall and the camera moves slowly closer"
)
_MAX_PROMPT_BYTES = 1 << 20
# Modes whose budgets are the default of `compute`.
_DEFAULT_MODES = ("near", "fast")


@dataclasses.dataclass(frozen=True)
class CalibrateOptions:
    """Options of calibrate.py, by the names of the command line.

    None takes the model's value, and for the mesh axes the sizes that fit.

    Attributes:
        prompts: a file of prompts, one a line; None takes DEFAULT_PROMPT.
        compute: how many steps the masks compute, one mask each; None takes those of the modes.
        plot: a PNG to draw.
    """

    model_id: str
    output_dir: Path
    dtype: str
    seed: int
    prompts: Path | None = None
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    compute: Sequence[int] | None = None
    plot: Path | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    use_dynamic_cfg: bool = False
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    allow_unsupported: bool = False
    attention: str = "auto"
    dp: int | None = None
    sp: int | None = None
    tp: int | None = None
    executables: Path | None = None


@dataclasses.dataclass(frozen=True)
class _VideoJson:
    """`VideoErrors` as JSON: edges as [i, j, error], final errors as [j, error]."""

    ratios: list[list[float]]
    errors: list[list[float]]
    final_errors: list[list[float]]


@dataclasses.dataclass(frozen=True)
class _ProgressJson:
    fingerprint: str
    seconds: float
    videos: list[dict[str, Any]]  # _VideoJson each


class _Progress:
    """The file from which a killed calibration resumes."""

    def __init__(self, path: Path, mark: str, steps: int) -> None:
        """
        Args:
            mark: identifies the calibration; another's file is ignored.
            steps: of a run, for which a file must have its numbers.
        """
        self.path, self._mark = path, mark
        self.videos: list[VideoErrors] = []
        self.seconds = 0.0
        self._read(steps)

    def _read(self, steps: int) -> None:
        from cogvideox.denoising.calibration import edges
        from cogvideox.denoising.segment_errors import VideoErrors

        if not self.path.exists():
            return
        try:
            file = from_json(_ProgressJson, read_json_object(self.path))
            if file.fingerprint != self._mark:
                raise ValueError("it belongs to another calibration")
            for value in file.videos:
                one = from_json(_VideoJson, value)
                errors = {(int(i), int(j)): error for i, j, error in one.errors}
                if len(one.ratios) != steps or errors.keys() != set(edges(steps)):
                    raise ValueError("it does not hold the errors of every segment")
                final_errors = {int(j): error for j, error in one.final_errors}
                self.videos.append(VideoErrors(one.ratios, errors, final_errors))
            self.seconds = file.seconds
        except ValueError as error:
            print(f"ignoring {self.path}: {printable(str(error))}")
            self.videos = []

    def save(self, index: int, video: VideoErrors, seconds: float) -> None:
        """Saves what is known of video `index`."""
        self.videos[index:] = [video]
        self.seconds += seconds
        videos = [
            _VideoJson(
                one.ratios,
                [[i, j, error] for (i, j), error in one.errors.items()],
                [[j, error] for j, error in one.final_errors.items()],
            )
            for one in self.videos
        ]
        held = _ProgressJson(self._mark, self.seconds, [dataclasses.asdict(one) for one in videos])
        write_json(self.path, dataclasses.asdict(held))


def read_prompts(path: Path | None) -> list[str]:
    """Reads prompts, one a line; empty lines and those that begin with # are left out.

    Raises:
        InputError: there are none, or the file cannot be read.
    """
    if path is None:
        return [DEFAULT_PROMPT]
    with open_regular(path) as file:
        content = file.read(_MAX_PROMPT_BYTES + 1)
    if len(content) > _MAX_PROMPT_BYTES:
        raise InputError(f"--prompts {printable(str(path))} is longer than 1 MiB")
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {printable(str(path))} is not UTF-8 text") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"--prompts {printable(str(path))} holds no prompt; write one a line")
    return prompts


def run(options: CalibrateOptions) -> None:
    """Measures, and writes calibration.json and the plot."""
    with working("calibrate: importing JAX, starting the devices"), checking_input():
        prompts = read_prompts(options.prompts)
        encoding = encode_options(options, prompts)
        files.check_executables(options.executables)
        files.check_output_folder(options.output_dir, CALIBRATION_FILE, PROGRESS_FILE)
        if options.plot:
            files.check_output_folder(options.plot.parent, options.plot.name)
            import matplotlib  # noqa: F401 (say now that it is missing)
        model, tokens = encode.check(encoding)
        checked = denoise.check(denoise_options(options), model, 1, tokens)
        compute = _budgets(options.compute, checked.settings.num_inference_steps)
    with OpenFolder(options.output_dir) as watched:
        calibration = _calibrate(options, prompts, encoding, model, tokens, checked, compute)
        from cogvideox.denoising.calibration import write_calibration

        path = options.output_dir / CALIBRATION_FILE
        write_calibration(path, calibration)
        (options.output_dir / PROGRESS_FILE).unlink(missing_ok=True)
        watched.check()
    _report(path, calibration)
    if options.plot:
        from stages.calibration_plot import plot

        plot(options.plot, calibration)
        print(f"{options.plot}: ratios and masks")


def encode_options(options: CalibrateOptions, prompts: list[str]) -> encode.EncodeOptions:
    return encode.EncodeOptions(
        prompt=prompts,
        model_id=options.model_id,
        dtype=options.dtype,
        output_dir=options.output_dir,
        negative_prompt=options.negative_prompt,
        max_sequence_length=options.max_sequence_length,
        allow_unsupported=options.allow_unsupported,
    )


def denoise_options(options: CalibrateOptions) -> denoise.DenoiseOptions:
    own = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    names = {field.name for field in dataclasses.fields(denoise.DenoiseOptions)}
    values = {name: value for name, value in own.items() if name in names}
    return denoise.DenoiseOptions(input_dir=options.output_dir, **values)


def _budgets(asked: Sequence[int] | None, steps: int) -> list[int]:
    """The budgets, the largest first.

    Raises:
        ValueError: the masks of a calibration cannot have one of them.
    """
    from cogvideox.denoising.calibration import edges, make_mask
    from cogvideox.denoising.step_mask import budget_of

    budgets = asked or [budget_of(mode, steps) for mode in _DEFAULT_MODES]
    any_weights = dict.fromkeys(edges(steps), 0.0)
    for budget in budgets:
        try:
            make_mask(any_weights, steps, budget)
        except ValueError as error:
            raise ValueError(f"--compute {budget}: {error}") from error
    return sorted(set(budgets), reverse=True)


def _calibrate(
    options: CalibrateOptions,
    prompts: list[str],
    encoding: encode.EncodeOptions,
    model: ModelFolder,
    tokens: int,
    checked: denoise.DenoisingRun,
    compute: list[int],
) -> Calibration:
    """Measures all videos and makes the masks."""
    from cogvideox.denoising.calibration import Calibration, make_mask
    from cogvideox.denoising.segment_errors import exact_steps, mean_over_videos
    from stages.speed import calibration_target

    target = calibration_target(checked.settings, model)
    steps = target.num_inference_steps
    count = len(prompts) * exact_steps(steps)
    print(f"{checked.settings.describe()}\nmesh {dict(checked.denoiser.mesh.shape)}")
    print(
        f"measuring {len(prompts)} prompt(s) in {count} steps of the transformer, as many as "
        f"{count / steps:.1f} videos have"
    )
    mark = calibration_mark(options, prompts, model, tokens, target)
    found = _Progress(options.output_dir / PROGRESS_FILE, mark, steps)
    _measure(options, encoding, model, tokens, checked, found)
    ratios, weights = mean_over_videos(found.videos, steps)
    import jax

    return Calibration(
        target=target,
        prompts=tuple(prompts),
        ratios=tuple(map(tuple, ratios)),
        edge_weights=weights,
        masks={budget: make_mask(weights, steps, budget) for budget in compute},
        seconds=round(found.seconds, 1),
        made_with={
            "device": jax.devices()[0].device_kind,
            "mesh": dict(checked.denoiser.mesh.shape),
            "dtype": options.dtype,
            "seed": options.seed,
            "negative_prompt": options.negative_prompt,
            "versions": versions(),
        },
    )


def calibration_mark(
    options: CalibrateOptions,
    prompts: list[str],
    model: ModelFolder,
    tokens: int,
    target: CalibrationTarget,
) -> str:
    """Identifies a calibration by everything that decides its numbers."""
    parts = model.digests(PARTS[ENCODE])
    settings = {**dataclasses.asdict(target), "model_id": None, "text": parts}
    settings |= {"prompts": prompts, "negative_prompt": options.negative_prompt, "tokens": tokens}
    return fingerprint({**settings, "seed": options.seed, "dtype": options.dtype})[:16]


def _measure(
    options: CalibrateOptions,
    encoding: encode.EncodeOptions,
    model: ModelFolder,
    tokens: int,
    checked: denoise.DenoisingRun,
    found: _Progress,
) -> None:
    """Measures the videos that `found` lacks, and saves after each run."""
    from cogvideox.denoising.loop import LoadedDenoiser
    from cogvideox.denoising.noise import NoiseSource
    from cogvideox.denoising.segment_errors import Measurement, exact_steps, probed_steps

    steps = checked.settings.num_inference_steps
    runs = len(probed_steps(steps))
    done = [video for video in found.videos if len(video.final_errors) == runs]
    if len(done) == len(encoding.prompt):
        return
    if found.videos:
        print(f"resuming from {found.path}, {len(done)} prompt(s) done")
    texts = embed_each(encoding, model, tokens)
    denoiser = checked.denoiser
    with working("loading the transformer and its programs"), ThreadPoolExecutor(1) as background:
        compiling = background.submit(denoiser.compile, options.executables, ("keep", "reuse"))
        parameters = denoiser.load(options.executables)
        compiled = compiling.result()
    each, left = exact_steps(steps), len(encoding.prompt) - len(done)
    partial = sum(steps - j for video in found.videos[len(done) :] for j in video.final_errors)
    with progress(total=each * left, what="calibrating", initial=partial) as bar:
        estimate = _Estimate(each * left - partial)
        for index in range(len(done), len(encoding.prompt)):

            def count() -> None:
                bar.update(1)
                estimate.step()

            loaded = LoadedDenoiser(
                denoiser, compiled, parameters, denoiser.prompt_embeds(texts[index])
            )
            start = time.monotonic()
            measurement = Measurement(
                *(loaded, checked.schedule, options.seed + index, NoiseSource()),
                *(checked.padding_frames, count),
            )
            known = found.videos[index] if index < len(found.videos) else None
            for video in measurement.run(known):
                found.save(index, video, time.monotonic() - start)
                start = time.monotonic()


def embed_each(
    encoding: encode.EncodeOptions, model: ModelFolder, tokens: int
) -> list[dict[str, np.ndarray]]:
    """Encodes each prompt alone, as a run of its own does."""
    with working("loading the text encoder and encoding"):
        import torch

        from cogvideox.text.encoder import load_text_encoder

        text_encoder = load_text_encoder(model, getattr(torch, encoding.dtype))
    alone = (dataclasses.replace(encoding, prompt=[prompt]) for prompt in encoding.prompt)
    return [encode.embed(text_encoder, one, tokens) for one in alone]


class _Estimate:
    """Says once, after two steps, how long all of them will take."""

    def __init__(self, steps: int) -> None:
        self._left, self._stamps = steps, []

    def step(self) -> None:
        """Counts a step."""
        self._left -= 1
        if len(self._stamps) < 2:
            self._stamps.append(time.monotonic())
            if len(self._stamps) == 2:
                # The first step loads the programs.
                seconds = (self._stamps[1] - self._stamps[0]) * self._left
                print(f"estimate: {max(seconds / 60, 0.1):.1f} minutes")


def _report(path: Path, calibration: Calibration) -> None:
    from cogvideox.denoising.step_mask import digits

    print(f"{path}: calibrated in {calibration.seconds:.0f} s")
    for budget, mask in sorted(calibration.masks.items(), reverse=True):
        print(
            f"  {budget} of {len(mask.computed)} steps: {digits(mask.computed)}, predicted "
            f"relative error of the latents {mask.predicted_error:.3g}"
        )
