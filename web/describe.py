"""A video as JSON, with OpenAI's fields first and this project's after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.gallery import describe_steps
from stages.lora import LoraChoice
from web.video import Video

_DENOISING_SHARE = 95  # percent of the progress; encoding takes little, decoding the rest


def describe(video: Video, model: str) -> dict[str, Any]:
    """Describes a video for clients.

    Args:
        model: the name of the model, as clients see it.
    """
    job, settings, steps = video.state.job, video.state.job.settings, video.state.steps
    done, total = _steps(video)
    return {
        "id": video.id,
        "object": "video",
        "status": video.status,
        "progress": _progress(video, done, total),
        "created_at": int(video.created),
        "completed_at": None if video.completed is None else int(video.completed),
        "expires_at": None,
        "error": _error(video),
        "model": model,
        "prompt": job.prompt,
        "size": f"{settings.width}x{settings.height}",
        "seconds": f"{round(settings.num_frames / settings.fps, 2):g}",
        "negative_prompt": job.negative_prompt,
        "num_frames": settings.num_frames,
        "fps": settings.fps,
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "use_dynamic_cfg": settings.use_dynamic_cfg,
        "scheduler": settings.scheduler,
        "seed": settings.seed,
        "speed": "exact" if not job.lossy.names else "; ".join(job.lossy.names),
        "lora": ", ".join(map(_lora, job.loras)) or None,
        "queue_position": video.position,
        "activity": steps.what if steps else None,
        "preview": None
        if video.preview is None
        else f"/v1/videos/{video.id}/preview?v={video.preview}",
        "steps_done": done,
        "steps_total": total,
        "seconds_left": None if video.seconds_left is None else round(video.seconds_left, 1),
    }


def describe_progress(video: Video) -> tuple[int, int, str]:
    """Steps that are done, all of them, and what happens now, for people."""
    done, total = _steps(video)
    if video.status == "queued":
        return done, total, f"place {video.position} in the queue"
    steps = video.state.steps
    return done, total, describe_steps(steps) if steps else "starting"


def _lora(choice: LoraChoice) -> str:
    """NAME or NAME=WEIGHT, as a request has it."""
    name = Path(choice.file).stem
    return name if choice.weight == 1 else f"{name}={choice.weight:g}"


def _steps(video: Video) -> tuple[int, int]:
    total = video.state.job.settings.executed_steps
    steps = video.state.steps
    if steps and steps.total:
        return steps.done, steps.total
    return (total if video.state.stages_done >= 2 else 0), total


def _progress(video: Video, done: int, total: int) -> int:
    if video.status == "completed":
        return 100
    return 0 if video.status == "queued" else done * _DENOISING_SHARE // max(total, 1)


def _error(video: Video) -> dict[str, str] | None:
    failure = video.state.failure
    if video.status != "failed" or failure is None:
        return None
    # Messages name files of the server, which are no client's business.
    text = (failure.error or "").replace(str(video.state.folder.parent), "")
    return {"code": "generation_failed", "message": f"{failure.stage}: {text}"}
