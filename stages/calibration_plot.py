"""Draws a calibration: MagCache's ratios by step, and the masks below them."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cogvideox.denoising.calibration import Calibration
from runtime.files import atomic_path

_COMPUTED, _SKIPPED = "#1f5fa8", "#dfe5ec"


def plot(path: Path, calibration: Calibration) -> None:
    """Writes a PNG, atomically."""
    steps = range(len(calibration.ratios))
    masks = sorted(calibration.masks.items(), reverse=True)
    figure = Figure(figsize=(9, 3.6 + 0.3 * len(masks)), layout="constrained")
    FigureCanvasAgg(figure)
    ratios, rows = figure.subplots(2, 1, sharex=True, height_ratios=[3, 0.4 + 0.4 * len(masks)])
    names = ("negative prompt", "prompt") if len(calibration.ratios[0]) == 2 else ("prompt",)
    for branch, name in enumerate(names):
        ratios.plot(steps, [ratio[branch] for ratio in calibration.ratios], "o-", ms=3, label=name)
    ratios.set_ylabel("residual / residual of the step before")
    target = calibration.target
    ratios.set_title(
        f"{target.height}x{target.width}x{target.num_frames}, {len(steps)} {target.scheduler} "
        f"steps, guidance {target.guidance_scale:g}",
        fontsize=10,
    )
    ratios.grid(alpha=0.3)
    ratios.legend()
    for row, (_, mask) in enumerate(masks):
        colors = [_COMPUTED if computed else _SKIPPED for computed in mask.computed]
        rows.barh(
            [row] * len(steps), [0.9] * len(steps), 0.7, [s - 0.45 for s in steps], color=colors
        )
    rows.set_yticks(
        range(len(masks)),
        [f"{budget} computed, error {mask.predicted_error:.2g}" for budget, mask in masks],
    )
    rows.invert_yaxis()
    rows.set_xlabel("step; dark steps are computed")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
