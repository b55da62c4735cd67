"""What each lossy option gains and costs: alone, and one after the other, the exact run first.

    python benchmarks/ablation.py --captions 20 --calibration calibration.json
    python benchmarks/ablation.py --captions 100 --calibration calibration.json --masks 15,12,10
    python benchmarks/ablation.py --model_id DIR --prompts FILE --dtype bfloat16
    python benchmarks/ablation.py --topology v6e-8

Runs stages 1 to 3 in one process for every prompt and compares each row's videos with those of the
exact run: PSNR over all pixels of a video, SSIM, VMAF, and on the small model whether the video
still shows what the caption says. Prints JSON; with --output_dir also draws a bar chart and writes
a page with the pictures side by side. With --topology it compiles for a TPU that is not there and
prints the compiler's estimate in place of seconds; then there are no videos. Another option is
another entry in SWITCHES.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL_MODEL = ROOT / "models/toyworld"
_PICTURES = 3  # videos on the page


@dataclasses.dataclass(frozen=True)
class Row:
    """A run to measure.

    Attributes:
        options: changes of `stages.denoise.DenoiseOptions`.
        computed: a step mask in their place, which is scaled by the calibrated ratios.
    """

    name: str
    group: str
    options: dict[str, Any]
    computed: tuple[bool, ...] | None = None


# Name, and what it changes in `DenoiseOptions`; "near" and "fast" become the calibration's masks
# if there is one. The cumulative rows add one after the other; a later value of an option replaces
# the earlier.
SWITCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("near mask", {"step_mask": "near"}),
    ("fast mask", {"step_mask": "fast"}),
    ("sparse attention", {"sparse_attention": "fast"}),
    ("int8 attention", {"attention_precision": "int8_qk"}),
    ("guidance reused from half on", {"guidance_until": 0.5}),
)


def make_rows(calibration: Path | None, masks: Sequence[int], steps: int) -> list[Row]:
    """The exact row, each switch alone, all of them cumulatively, and masks of some budgets."""
    from cogvideox.denoising.step_mask import budget_of

    def calibrated(options: dict[str, Any]) -> dict[str, Any]:
        mode = options.get("step_mask")
        if calibration is None or mode is None:
            return options
        return options | {"step_mask": str(calibration), "mask_steps": budget_of(mode, steps)}

    rows = [Row("exact", "exact", {})]
    rows += [Row(name, "alone", calibrated(options)) for name, options in SWITCHES]
    so_far: dict[str, Any] = {}
    for name, options in SWITCHES:
        so_far |= calibrated(options)
        if not any(row.options == so_far for row in rows):
            rows.append(Row(f"+ {name}", "cumulative", dict(so_far)))
    return rows + (mask_rows(calibration, masks, steps) if masks else [])


def mask_rows(calibration: Path | None, budgets: Sequence[int], steps: int) -> list[Row]:
    """For each budget the calibrated mask, those of two baselines, and the default."""
    from cogvideox.denoising.calibration import read_calibration
    from cogvideox.denoising.step_mask import default_mask, uniform_mask

    if calibration is None:
        raise SystemExit("error: --masks needs --calibration")
    found = read_calibration(calibration)
    rows = []
    for budget in budgets:
        kinds = {
            "calibrated": found.mask(budget).computed,
            "MagCache": magcache_of(found.ratios, budget),
            "default": default_mask(steps, budget),
            "uniform": uniform_mask(steps, budget, max(steps // 5, 1)),
        }
        rows += [
            Row(f"{budget} steps {kind}", "masks", {}, computed)
            for kind, computed in kinds.items()
            if computed is not None
        ]
    return rows


def magcache_of(ratios: Any, budget: int) -> tuple[bool, ...] | None:
    """MagCache's mask of a budget: with the shortest skips and then the smallest threshold."""
    from cogvideox.denoising.step_mask import magcache_mask

    for longest_skip in range(1, 7):
        for threshold in (0.01 * n for n in range(1, 200)):
            computed = magcache_mask(ratios, threshold=threshold, longest_skip=longest_skip)
            if sum(computed) == budget:
                return computed
    return None


# Runs -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, the seed of its video, and the scene that it asks for, on the small model."""

    text: str
    seed: int
    scene: Any = None


@dataclasses.dataclass(frozen=True)
class Video:
    """What one run made: latents [B, T, C, H, W], frames [F, H, W, 3] in 0..1, seconds of steps."""

    latents: Any
    frames: Any
    seconds: float


class Runner:
    """The model, its weights and programs, for all rows."""

    def __init__(self, arguments: argparse.Namespace, prompts: list[Prompt]) -> None:
        import torch

        from cogvideox.text.encoder import load_text_encoder
        from stages import denoise, encode

        self._prompts = prompts
        encoding = encode.EncodeOptions(
            prompt=[prompt.text for prompt in prompts],
            model_id=arguments.model_id,
            dtype=arguments.dtype,
            output_dir=Path(),
        )
        self.model, self._tokens = encode.check(encoding)
        self._options = denoise.DenoiseOptions(
            input_dir=Path(),
            output_dir=Path(),
            dtype=arguments.dtype,
            seed=0,
            num_inference_steps=arguments.num_inference_steps,
            scheduler=arguments.scheduler,
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.num_frames,
        )
        self.exact = denoise.check(self._options, self.model, 1, self._tokens)
        text_encoder = load_text_encoder(self.model, getattr(torch, arguments.dtype))
        self._embeddings = [
            encode.embed(
                text_encoder, dataclasses.replace(encoding, prompt=[prompt.text]), self._tokens
            )
            for prompt in prompts
        ]
        self._parameters = self.exact.denoiser.load()
        self._decoder = self._load_decoder(arguments.dtype)

    def _load_decoder(self, dtype: str) -> Any:
        import jax

        from stages import decode

        options = decode.DecodeOptions(input_dir=Path(), dtype=dtype, decoder="torchax")
        decoder = decode.make_decoder(options, self.model, decode.make_mesh(options, jax.devices()))
        decoder.load(self.model.path / "vae")
        return decoder

    def check(self, row: Row, ratios: Any) -> Any:
        """The checked run of a row."""
        from cogvideox.denoising.step_mask import scaled_mask
        from stages import denoise

        options = dataclasses.replace(self._options, **row.options)
        checked = denoise.check(options, self.model, 1, self._tokens)
        if row.computed is None:
            return checked
        schedule = dataclasses.replace(checked.schedule, mask=scaled_mask(row.computed, ratios))
        return dataclasses.replace(checked, schedule=schedule)

    def run(self, checked: Any) -> Iterator[Video]:
        """Makes the videos of all prompts."""
        import numpy as np

        from cogvideox.denoising.loop import run_loop, to_host
        from cogvideox.denoising.noise import NoiseSource
        from stages.decode import num_frames
        from stages.denoise import drop_padding
        from stages.steps import compile_steps, load_steps

        compiled = compile_steps(checked.denoisers, checked.schedule, None)
        for prompt, embeddings in zip(self._prompts, self._embeddings, strict=True):
            loaded = load_steps(checked.denoisers, compiled, self._parameters, embeddings)
            start = time.perf_counter()
            *_, state = run_loop(loaded, checked.schedule, prompt.seed, NoiseSource())
            seconds = time.perf_counter() - start
            latents = drop_padding(to_host(state).latents, checked.padding_frames)
            scaled = latents.astype(np.float32)
            batches = list(self._decoder.decode(scaled, output="float32"))
            frames = np.concatenate(batches, axis=1)[0, : num_frames(self.model, scaled.shape)]
            yield Video(latents, frames, seconds)


def is_obeyed(frames: Any, prompt: Prompt) -> bool:
    """Whether a video of the small model shows what its caption says."""
    from toyworld.reader import ATTRIBUTES, largest_of, read_video, truth_of

    seen, truth = largest_of(read_video(frames)), truth_of(prompt.scene)
    return all(seen[name] == truth[name] for name in ATTRIBUTES)


def compare(reference: Any, frames: Any) -> dict[str, float]:
    """PSNR in dB over all pixels, SSIM and VMAF of a video."""
    import numpy as np

    from cogvideox.video import metrics
    from cogvideox.video.pixels import to_uint8
    from cogvideox.video.vmaf import VmafMeter

    with VmafMeter(*frames.shape[1:3]) as meter:
        for a, b in zip(reference, frames, strict=True):
            meter.add(to_uint8(a), to_uint8(b))
        vmaf = meter.finish()
    pairs = zip(reference, frames, strict=True)
    ssim = [metrics.ssim(metrics.to_float(a), metrics.to_float(b)) for a, b in pairs]
    return {
        "psnr": metrics.psnr(metrics.mean_squared_error(reference, frames)),
        "ssim": float(np.mean(ssim)),
        "vmaf": float(np.mean(vmaf)),
    }


def measure(runner: Runner, rows: list[Row], prompts: list[Prompt], ratios: Any) -> Iterator[Any]:
    """Yields each row's report and its videos' frames."""
    import numpy as np

    from runtime.progress import progress

    exact: list[Video] = []
    exact_obeys: list[bool] = []
    seconds_of_exact = 0.0
    for row in rows:
        checked = runner.check(row, ratios)
        videos, scores, obeys = [], [], []
        made = progress(runner.run(checked), total=len(prompts), what=row.name, unit="video")
        for i, video in enumerate(made):
            videos.append(video)
            if prompts[i].scene is not None:
                obeys.append(is_obeyed(video.frames, prompts[i]))
            if exact:
                scores.append(compare(exact[i].frames, video.frames))
        if not exact:
            exact, exact_obeys = videos, obeys
        # The first video compiles and warms up.
        seconds = statistics.median([v.seconds for v in videos[1:]] or [videos[0].seconds])
        seconds_of_exact = seconds_of_exact or seconds
        mask = checked.schedule.mask
        steps = len(checked.schedule.timesteps)
        report: dict[str, Any] = {
            "row": row.name,
            "group": row.group,
            "computed_steps": mask.budget if mask else steps,
            "mask": mask.text if mask else "1" * steps,
            "guided_steps": checked.schedule.guided_steps or steps,
            "blocks": blocks_of(checked),
            "lossless": all(
                np.array_equal(a.latents, b.latents) for a, b in zip(exact, videos, strict=True)
            ),
            "seconds_per_step": round(seconds / steps, 4),
            "seconds_per_video": round(seconds, 3),
            "speed_up": round(seconds_of_exact / seconds, 2),
        }
        for name in ("psnr", "ssim", "vmaf") if scores else ():
            values = [score[name] for score in scores]
            report[name] = json_number(float(np.mean(values)))
            report[f"{name}_min"] = json_number(float(np.min(values)))
        if obeys:
            report["obeyed"] = sum(obeys)
            report["obeyed_of_exact"] = sum(
                a and b for a, b in zip(exact_obeys, obeys, strict=True)
            )
        print(json.dumps(report), file=sys.stderr, flush=True)
        yield report, [video.frames for video in videos[:_PICTURES]]


def blocks_of(checked: Any) -> float:
    """The share of the blocks of attention that the last steps of a run compute."""
    sparse = checked.denoisers[-1].sparse_step
    return 1.0 if sparse is None else round(sparse.density(), 3)


def json_number(value: float) -> float | str:
    """JSON has no infinity."""
    return "inf" if value == float("inf") else round(value, 4)


# Estimates --------------------------------------------------------------------------------------


def estimate(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Each row's seconds on a named topology, from the compiler; there are no videos."""
    from transformer_step import make_denoiser

    from cogvideox.denoising.parts import split_steps
    from cogvideox.model.settings import DenoisingSettings
    from runtime.topology import machine_devices
    from stages.denoise_options import DenoiseOptions
    from stages.speed import resolve
    from stages.steps import denoisers_of

    steps = arguments.num_inference_steps or 50
    height, width, frames = map(int, arguments.size.split("x"))
    settings = DenoisingSettings(height, width, frames, 16, steps, 6.0, False, "dpm", 0)
    devices = machine_devices(arguments.topology)
    exact = make_denoiser(devices, arguments.model, arguments.size, arguments.mesh)
    seconds: dict[tuple[str, str], float] = {}

    def of_steps(denoiser: Any, uses: Sequence[str]) -> float:
        for use in uses:
            name = denoiser.step_program(use).name, str(denoiser.sparse)
            if name not in seconds:
                seconds[name] = step_seconds(denoiser, use)
        return sum(seconds[denoiser.step_program(use).name, str(denoiser.sparse)] for use in uses)

    reports = []
    for row in make_rows(None, (), steps):
        lossy = resolve(
            DenoiseOptions(Path(), Path(), "bfloat16", 0, **row.options), settings, None
        )
        uses = ["off"] * steps
        if lossy.mask:
            uses = ["keep" if computed else "reuse" for computed in lossy.mask.computed]
        parts = split_steps(steps, lossy.dense_steps, lossy.guided_steps)
        total = sum(
            of_steps(denoiser, uses[part.start : part.stop])
            for part, denoiser in zip(parts, denoisers_of(exact, lossy, steps), strict=True)
        )
        report: dict[str, Any] = {"row": row.name, "group": row.group}
        report["source"] = "compiler estimate"
        report["computed_steps"] = steps - uses.count("reuse")
        report["guided_steps"] = lossy.guided_steps or steps
        report["seconds_per_step"] = round(total / steps, 4)
        report["seconds_per_video"] = round(total, 2)
        report["speed_up"] = round(reports[0]["seconds_per_video"] / total, 2) if reports else 1.0
        reports.append(report)
        print(json.dumps(report), file=sys.stderr, flush=True)
    return reports


def step_seconds(denoiser: Any, use: str) -> float:
    """The compiler's estimate of one step, the Pallas kernels included."""
    from transformer_step import kernel_cycles

    from runtime import hlo_costs
    from runtime.chips import V6E
    from runtime.executables import compile_all

    (built,) = compile_all([denoiser.step_program(use)], threads=1)
    hlo = built.executable.as_text()
    assert hlo is not None
    costs = hlo_costs.read_costs(hlo)
    cycles = sum(costs.cycles.values())
    if costs.kernel_calls:
        cycles += denoiser.config.num_layers * sum(kernel_cycles(denoiser).values())
    return cycles / V6E.clock_hz


# Chart and page ---------------------------------------------------------------------------------


def draw_chart(path: Path, reports: list[dict[str, Any]]) -> None:
    """Bars of the speed-up, with the quality beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.4 * len(reports)), layout="constrained")
    axes = figure.subplots()
    names = [report["row"] for report in reports]
    bars = axes.barh(names, [report["speed_up"] for report in reports], color="#1f5fa8")
    labels = []
    for report in reports:
        quality = report.get("psnr")
        label = f"{report['speed_up']:.2f}x"
        labels.append(label if quality in (None, "inf") else f"{label}, {quality:.1f} dB")
    axes.bar_label(bars, labels, padding=4)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up of stage 2")
    figure.savefig(path, dpi=150)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em }
table { border-collapse: collapse } td, th { padding: .3em .7em; text-align: left }
tr:nth-child(even) { background: #f2f4f7 } img { display: block }
code { white-space: nowrap }
</style>
<h1>{{ title }}</h1>
<p><code>{{ command }}</code> on {{ device }}</p>
<img src="ablation.png" alt="speed-up of each row" width="900">
<table>
<tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for report in reports -%}
<tr>{% for column in columns %}<td>{{ report.get(column, "") }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for prompt in prompts %}{% set video = loop.index0 %}
<h2>{{ prompt.text }}</h2>
<table>
{% for report in reports -%}
<tr><td>{{ report.row }}</td><td><img src="{{ pictures[loop.index0][video] }}" alt="frames of {{
report.row }}"></td></tr>
{% endfor %}
</table>
{% endfor %}
</html>
"""


def write_page(
    folder: Path, report: dict[str, Any], pictures: list[list[Any]], prompts: list[Prompt]
) -> None:
    """Writes the chart, the pictures, and the page that shows them."""
    import jinja2
    import numpy as np
    from PIL import Image

    from cogvideox.video.pixels import to_uint8

    rows = report["rows"]
    draw_chart(folder / "ablation.png", rows)
    names = []
    for row, videos in enumerate(pictures):
        names.append([f"pictures/{row:02}-{video}.png" for video in range(len(videos))])
        for name, frames in zip(names[-1], videos, strict=True):
            (folder / name).parent.mkdir(exist_ok=True)
            chosen = frames[np.linspace(0, len(frames) - 1, 5).round().astype(int)]
            Image.fromarray(to_uint8(np.concatenate(list(chosen), axis=1))).save(folder / name)
    columns = [name for name in rows[-1] if name != "group"]
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        title="Ablation of the lossy options",
        command=report["command"],
        device=report["device"],
        columns=columns,
        reports=rows,
        pictures=names,
        prompts=prompts[:_PICTURES] if pictures else [],
    )
    (folder / "ablation.html").write_text(text, "utf-8")


# Command line -----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_id", default=str(SMALL_MODEL))
    parser.add_argument("--captions", type=int, default=20, help="held-out captions (small model)")
    parser.add_argument("--prompts", type=Path, help="file with a prompt a line, another model's")
    parser.add_argument("--num_inference_steps", type=int, help="default: the model's")
    parser.add_argument("--scheduler", choices=("dpm", "ddim"), help="default: the model's")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num_frames", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--calibration", type=Path, help="from calibrate.py; default: the defaults")
    parser.add_argument(
        "--masks", default="", help="budgets such as 15,12,10: compares kinds of masks"
    )
    parser.add_argument(
        "--only", default="", help="measure only exact and rows whose names have one of these texts"
    )
    parser.add_argument("--topology", help="v6e-8 for example: estimate for it; runs nothing")
    parser.add_argument("--model", default="CogVideoX1.5-5B", help="with --topology: the model")
    parser.add_argument("--size", default="768x1360x81", help="with --topology: the size")
    parser.add_argument("--mesh", help="with --topology, such as dp=2,sp=4")
    parser.add_argument("--output_dir", type=Path, help="for JSON, chart and page")
    return parser.parse_args(argv)


def find_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    """The prompts to measure with: seed i for the i-th."""
    if arguments.prompts is None:
        from toyworld.captions import held_out_captions

        captions = held_out_captions(arguments.captions)
        return [Prompt(caption.text, caption.seed, caption.scene) for caption in captions]
    from stages.calibrate import read_prompts

    return [Prompt(text, seed) for seed, text in enumerate(read_prompts(arguments.prompts))]


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[list[Any]], list[Prompt]]:
    """Measures all rows; returns the report, the first videos of each row, and their prompts."""
    import jax

    from cogvideox.denoising.calibration import read_calibration

    prompts = find_prompts(arguments)
    runner = Runner(arguments, prompts)
    steps = runner.exact.settings.num_inference_steps
    budgets = [int(budget) for budget in arguments.masks.split(",") if budget]
    rows = make_rows(arguments.calibration, budgets, steps)
    texts = ["exact", *arguments.only.split(",")]
    rows = [row for row in rows if any(text in row.name for text in texts)]
    if not runner.exact.denoiser.backend.takes_lists:
        rows = [row for row in rows if "sparse_attention" not in row.options]
    known = runner.exact.denoiser.backend.attention_precisions
    rows = [row for row in rows if row.options.get("attention_precision", "bf16") in known]
    ratios = read_calibration(arguments.calibration).ratios if arguments.calibration else None
    reports, pictures = [], []
    for report, videos in measure(runner, rows, prompts, ratios):
        reports.append(report)
        pictures.append(videos)
    report = {
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "prompts": len(prompts),
        "settings": runner.exact.settings.describe(),
        "dtype": arguments.dtype,
        "jax": jax.__version__,
        "rows": reports,
    }
    return report, pictures, prompts


def main() -> None:
    arguments = parse_arguments()
    command = " ".join(["python", "benchmarks/ablation.py", *sys.argv[1:]])
    pictures: list[list[Any]] = []
    prompts: list[Prompt] = []
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report
        if arguments.topology:
            rows = estimate(arguments)
            report: dict[str, Any] = {"device": arguments.topology, "rows": rows}
        else:
            report, pictures, prompts = run(arguments)
    report = {"command": command, **report}
    print(json.dumps(report, indent=1))
    if arguments.output_dir:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1) + "\n"
        (arguments.output_dir / "ablation.json").write_text(text)
        write_page(arguments.output_dir, report, pictures, prompts)


if __name__ == "__main__":
    main()
