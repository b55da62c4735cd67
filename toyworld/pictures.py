"""Held-out pairs of a picture and a caption, and whether a video does what they ask for."""

from typing import NamedTuple

import numpy as np
import torch

from cogvideox.video.metrics import mean_squared_error, psnr
from toyworld.captions import Prompt, held_out_captions
from toyworld.reader import largest_of, read_video, truth_of
from toyworld.world import render, scenes_of


class Pair(NamedTuple):
    """A caption and the picture, [H, W, 3] uint8, that its video starts from."""

    prompt: Prompt
    picture: np.ndarray


class Judgement(NamedTuple):
    """Of one video: PSNR in dB of its first frame against the picture, and what was read right."""

    psnr: float
    right: dict[str, bool]


def held_out_pairs(n: int, seed: int = 0) -> list[Pair]:
    """n captions of held-out things, each with a first frame drawn for it."""
    prompts = held_out_captions(n, seed)
    generator = torch.Generator().manual_seed(seed)
    scenes = scenes_of([prompt.scene for prompt in prompts], generator, open_start=True)
    pictures = (render(scenes, frames=1)[:, 0] * 255).round().to(torch.uint8).numpy()
    return [Pair(*pair) for pair in zip(prompts, pictures, strict=True)]


def judge(video: np.ndarray, pair: Pair) -> Judgement:
    """Compares a video [F, H, W, 3] of floats in 0..1 with its pair."""
    error = mean_squared_error(video[0], pair.picture / 255)
    seen, truth = largest_of(read_video(video)), truth_of(pair.prompt.scene)
    right = {name: seen[name] == truth[name] for name in ("color", "shape", "motion", "background")}
    return Judgement(psnr(error), right)
