"""Definitions shared by all training phases: settings, log, scenes, optimizer, CUDA graph."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

from toyworld.captions import all_things, draw_scene
from toyworld.world import Scene


@dataclass(frozen=True)
class TrainingSettings:
    """All settings that the result depends on."""

    seed: int = 0
    vae_window_steps: int = 5000
    vae_window_batch: int = 8
    vae_steps: int = 2400
    vae_batch: int = 4
    vae_learning_rate: float = 2e-3
    kl_weight: float = 5e-4
    # The noise is the most that latents are given while the autoencoder is refined, over their own
    # deviation.
    refine_learning_rate: float = 1e-3
    steady_steps: int = 1800
    steady_noise: float = 0.5
    sharp_steps: int = 9000
    sharp_noise: float = 0.2
    text_steps: int = 2000
    text_batch: int = 128
    text_learning_rate: float = 2e-3
    videos: int = 200_000
    captions_per_video: int = 2
    steps: int = 90_000
    batch: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    two_things: float = 0.40
    # Shares of the captions that guidance lives on: left out, incomplete, and wrong in one
    # attribute, as captions of real videos are. Guidance then sharpens what a caption means.
    dropped: float = 0.12
    partial: float = 0.15
    corrupted: float = 0.10


class Log:
    """Losses by phase, printed as they come and kept for the JSON file."""

    def __init__(self, settings: TrainingSettings) -> None:
        self.content: dict = {"recipe": asdict(settings), "torch": torch.__version__}
        self._began = time.monotonic()

    def add(self, phase: str, **values: float) -> None:
        """Appends one row to a phase."""
        row = {"seconds": round(time.monotonic() - self._began, 1)}
        row |= {name: float(f"{value:.4g}") for name, value in values.items()}
        self.content.setdefault(phase, []).append(row)
        print(phase, json.dumps(row), flush=True)

    def write(self, folder: Path) -> None:
        """Writes `training_log.json`."""
        (folder / "training_log.json").write_text(json.dumps(self.content, indent=1) + "\n")


def draw_training_scenes(settings: TrainingSettings, rng: random.Random, n: int) -> list[Scene]:
    """Draws n scenes without held-out things, a share of them with two things."""
    things = all_things(held_out=False)
    return [draw_scene(rng, things, two=rng.random() < settings.two_things) for _ in range(n)]


def recorded(step: Callable, *examples: torch.Tensor) -> Callable:
    """Records a training step as a CUDA graph: one launch for its thousands of small kernels.

    Runs the step a few times on the examples, which is the warm-up that recording needs. Each
    replay overwrites the tensors that the one before it returned. On the CPU there is nothing to
    record, and the step itself is returned.
    """
    if examples[0].device.type != "cuda":
        return step
    fixed = [example.clone() for example in examples]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(*fixed)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        measured = step(*fixed)

    def replay(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        for place, value in zip(fixed, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return measured

    return replay


def make_optimizer(parameters: list[torch.nn.Parameter], learning_rate: float, steps: int):
    """Makes AdamW with warm-up and cosine decay. On a GPU the rate is a tensor, to record steps."""
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters,
        lr=torch.tensor(learning_rate, device=device) if on_gpu else learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=True,
        capturable=on_gpu,
    )
    return optimizer, get_cosine_schedule_with_warmup(optimizer, min(300, steps // 10), steps)
