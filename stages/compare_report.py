"""The report of a comparison, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cogvideox.video.comparison import Scores, VideoScores
from cogvideox.video.frames import Video
from stages.compare import LatentsScores, Report

_Json = dict[str, object]


def as_json(report: Report) -> _Json:
    """Returns the report for `json.dumps`.

    A metric that was not measured is null. An infinite PSNR, of equal frames, is the string "inf",
    because JSON has no infinity.
    """
    videos: list[_Json] = []
    for a, b, scores in report.videos:
        measured: _Json = {}
        for name, _, value in _metrics(scores):
            measured[name] = None if value is None else _scores_json(value)
        of_all_pixels = _number(scores.psnr_of_all_pixels)
        measured["psnr"] = {"of_all_pixels": of_all_pixels} | _scores_json(scores.psnr)
        about: _Json = {"a": str(a.path), "b": str(b.path), "num_frames": a.num_frames}
        about |= {"height": a.height, "width": a.width, "fps": a.fps if a.fps else b.fps}
        videos.append({**about, "identical": scores.identical, **measured})
    latents: _Json | None = None
    if report.latents is not None:
        path_a, path_b, of_latents = report.latents
        of_all = _number(of_latents.psnr_of_all_values)
        latents = {
            "a": str(path_a),
            "b": str(path_b),
            "shape": list(of_latents.shape),
            "identical": of_latents.identical,
            "peak": of_latents.peak,
            "psnr": {"of_all_values": of_all} | _scores_json(of_latents.psnr),
            "relative_l2": of_latents.relative_l2,
        }
    return {"videos": videos, "latents": latents, "notes": report.notes}


def as_text(report: Report) -> str:
    """Returns the report as lines for a terminal."""
    lines: list[str] = []
    if report.latents is not None:
        path_a, path_b, latents = report.latents
        lines += [f"latents A: {path_a}", f"latents B: {path_b}", *_latents_lines(latents)]
    for a, b, scores in report.videos:
        lines += [f"video A: {a.path}", f"video B: {b.path}", *_video_lines(a, scores)]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _video_lines(video: Video, scores: VideoScores) -> Iterator[str]:
    size = f"{video.num_frames} frames of {video.height}x{video.width}"
    if scores.identical:
        yield f"  identical: {size}"
    else:
        yield f"  {size}"
        pixels = scores.psnr_of_all_pixels
        yield f"  PSNR of all pixels {_decibels(pixels)}; frame by frame:"
    yield from _table(scores)


def _table(scores: VideoScores) -> Iterator[str]:
    metrics = [(f"{name.upper()} {unit}".strip(), value) for name, unit, value in _metrics(scores)]
    measured = [(name, value) for name, value in metrics if value is not None]
    yield f"  {'':<10}{'mean':>10}{'worst':>10}  worst frame"
    for name, value in measured:
        worst = value.frames[value.worst_frame]
        yield f"  {name:<10}{_figure(value.mean):>10}{_figure(worst):>10}  {value.worst_frame}"


def _latents_lines(latents: LatentsScores) -> Iterator[str]:
    shape = "x".join(map(str, latents.shape))
    if latents.identical:
        yield f"  identical: {shape}"
        return
    worst = latents.psnr.worst_frame
    yield f"  {shape}, relative L2 {latents.relative_l2:.3g}"
    yield (
        f"  PSNR of all values {_decibels(latents.psnr_of_all_values)} "
        f"(peak {latents.peak:.4g}, the range of A); worst latent frame {worst}: "
        f"{_decibels(latents.psnr.frames[worst])}"
    )


def _metrics(scores: VideoScores) -> list[tuple[str, str, Scores | None]]:
    """Name, unit and scores of every metric."""
    return [
        ("psnr", "dB", scores.psnr),
        ("ssim", "", scores.ssim),
        ("vmaf", "", scores.vmaf),
        ("lpips", "", scores.lpips),
    ]


def _scores_json(scores: Scores) -> _Json:
    return {
        "mean": _number(scores.mean),
        "worst_frame": scores.worst_frame,
        "worst": _number(scores.frames[scores.worst_frame]),
        "frames": [_number(value) for value in scores.frames],
    }


def _number(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _figure(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"


def _decibels(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.2f} dB"
