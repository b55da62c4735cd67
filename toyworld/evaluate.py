"""Measures the toy-world model: does the video show what the caption says?

    python -m toyworld.evaluate --model_id models/toyworld --report evaluation.json

Generates in float32 with diffusers' own pipeline, a CPU generator for every caption, so caption i
gets the noise that a run of its own with seed i gets. Prints the report as JSON.
"""

import argparse
import json
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from PIL import Image, ImageDraw

from toyworld.captions import Prompt, held_out_captions, two_thing_captions
from toyworld.reader import (
    ATTRIBUTES,
    Reading,
    agrees,
    evaluate_video,
    largest_of,
    read_video,
    truth_of,
)
from toyworld.world import COLORS, SHAPES, render, scenes_of

SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}


def load(model_id: str, device: torch.device) -> CogVideoXPipeline:
    """Loads the pipeline in float32; T5 and the tokenizer take the model's number of tokens."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = CogVideoXPipeline.from_pretrained(model_id, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: CogVideoXPipeline,
    texts: list[str],
    seeds: list[int],
    steps: int,
    guidance: float,
    negative: str = "",
    batch: int = 50,
) -> np.ndarray:
    """Returns videos [N, F, H, W, 3] float32 in 0..1 for N texts, each with its own seed."""
    videos = []
    for first in range(0, len(texts), batch):
        rows = slice(first, first + batch)
        videos.append(
            pipeline(
                prompt=texts[rows],
                negative_prompt=[negative] * len(texts[rows]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[rows]],
                max_sequence_length=pipeline.transformer.config.max_text_seq_length,
                output_type="np",
                return_dict=False,
            )[0]
        )
    return np.concatenate(videos)


def score(readings: list[Reading], prompts: list[Prompt]) -> dict:
    """Counts, in percent, videos with each attribute right, all four, and exactly one object."""
    right: Counter = Counter()
    wrong = []
    for reading, prompt in zip(map(largest_of, readings), prompts, strict=True):
        truth = truth_of(prompt.scene)
        hits = {name: reading[name] == truth[name] for name in (*ATTRIBUTES, "count")}
        right.update(name for name, hit in hits.items() if hit)
        if all(hits[name] for name in ATTRIBUTES):
            right["all four"] += 1
        else:
            seen = {name: reading[name] for name in ATTRIBUTES if not hits[name]}
            wrong.append({"seed": prompt.seed, "caption": prompt.text, "seen": seen})
    names = {name: name for name in (*ATTRIBUTES, "all four")} | {"count": "one object"}
    table = {label: round(100 * right[name] / len(prompts), 1) for name, label in names.items()}
    fits = mean_fit(readings)
    return {"videos": len(prompts), "percent": table, "outline fit": fits, "wrong": wrong}


def mean_fit(readings: list[Reading]) -> float:
    """Returns how well the objects of all videos keep their shapes, in 0..1."""
    return round(float(np.mean([fit for reading in readings for fit in reading.fits])), 4)


@torch.no_grad()
def reconstruct(
    pipeline: CogVideoXPipeline, prompts: list[Prompt], noise: float
) -> tuple[np.ndarray, float]:
    """Encodes and decodes the scenes of the prompts; also returns the mean PSNR in dB.

    `noise` is the standard deviation of the noise, relative to that of the latents.
    """
    scenes = scenes_of([prompt.scene for prompt in prompts], torch.Generator().manual_seed(0))
    videos, psnr = [], []
    for first in range(0, len(prompts), 20):
        truth = render(scenes[first : first + 20].to(pipeline.device))
        latents = pipeline.vae.encode(truth.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
        off = torch.randn(latents.shape, generator=torch.Generator().manual_seed(first))
        latents = latents + noise * latents.std() * off.to(latents.device)
        drawn = pipeline.vae.decode(latents).sample.permute(0, 2, 3, 4, 1) / 2 + 0.5
        drawn = drawn.clamp(0, 1)
        psnr.append(-10 * torch.log10((drawn - truth).square().mean(dim=(1, 2, 3, 4))))
        videos.append(drawn.cpu().numpy())
    return np.concatenate(videos), torch.cat(psnr).mean().item()


def negative_prompts(pipeline, pool, n: int, steps: int, guidance: float) -> dict:
    """Measures how often an unnamed colour or shape appears, with and without a negative prompt."""
    report = {}
    for attribute, names, article in (("color", list(COLORS), "{} shape"), ("shape", SHAPES, "{}")):
        text = "a shape moves right on a black background"
        seeds = list(range(n))
        free = generate(pipeline, [text] * n, seeds, steps, guidance)
        unasked = Counter(reading[attribute] for reading in pool.map(evaluate_video, free))
        rows = {}
        for name in names:
            phrase = article.format(name)
            phrase = ("an " if phrase[0] == "o" else "a ") + phrase
            against = generate(pipeline, [text] * n, seeds, steps, guidance, negative=phrase)
            seen = Counter(reading[attribute] for reading in pool.map(evaluate_video, against))
            rows[phrase] = {"without": unasked[name], "with": seen[name]}
        report[attribute] = {"prompt": text, "videos": n, "times seen, by negative prompt": rows}
    return report


def contact_sheet(videos: np.ndarray, texts: list[str]) -> Image.Image:
    """Draws one row of five frames per video, under its caption."""
    columns = np.linspace(0, videos.shape[1] - 1, 5).round().astype(int)
    height, width = videos.shape[2:4]
    line = 14
    sheet = Image.new("RGB", (5 * (width + 2) - 2, len(texts) * (height + line)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, text) in enumerate(zip(videos, texts, strict=True)):
        top = row * (height + line)
        draw.text((2, top + 1), text, fill="black")
        for column, frame in enumerate(video[columns]):
            image = Image.fromarray((frame * 255).round().astype(np.uint8))
            sheet.paste(image, (column * (width + 2), top + line))
    return sheet


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_id", default="models/toyworld")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", default=[25])
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[2.0, 1.0])
    parser.add_argument("--scheduler", choices=SCHEDULERS, nargs="+", default=["dpm"])
    parser.add_argument("--report", type=Path, help="also write the JSON here")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 24 here")
    arguments = parser.parse_args()
    # The readers fork before CUDA starts, which forked processes cannot use.
    with multiprocessing.get_context("fork").Pool(
        os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        report = evaluate(arguments, pool)
    print(json.dumps(report, indent=1))
    if arguments.report:
        arguments.report.write_text(json.dumps(report, indent=1) + "\n")


def evaluate(arguments: argparse.Namespace, pool) -> dict:
    """Returns the report; the first value of each setting is the default."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load(arguments.model_id, device)
    config = pipeline.scheduler.config
    n = arguments.captions
    prompts, pairs = held_out_captions(n), two_thing_captions(n)
    texts, seeds = [p.text for p in prompts], [p.seed for p in prompts]

    report: dict = {"dtype": "float32", "device": device.type, "torch": torch.__version__}
    report["autoencoder"] = []
    for noise in (0.0, 0.25):
        drawn, psnr = reconstruct(pipeline, prompts, noise)
        seen = score(pool.map(read_video, drawn), prompts)
        report["autoencoder"].append({"noise": noise, "psnr_db": round(psnr, 2)} | seen)
    report["held out"], report["two things"] = [], []
    for scheduler in arguments.scheduler:
        pipeline.scheduler = SCHEDULERS[scheduler].from_config(config)
        for steps in arguments.num_inference_steps:
            for guidance in arguments.guidance_scale:
                videos = generate(pipeline, texts, seeds, steps, guidance)
                if arguments.sheet and not report["held out"]:
                    contact_sheet(videos[:24], texts[:24]).save(arguments.sheet)
                setting = {"scheduler": scheduler, "steps": steps, "guidance": guidance}
                row = setting | score(pool.map(read_video, videos), prompts)
                report["held out"].append(row)
                both = generate(pipeline, [p.text for p in pairs], seeds, steps, guidance)
                readings = pool.map(read_video, both)
                right = [agrees(r, p.scene) for r, p in zip(readings, pairs, strict=True)]
                percent = {"everything right": round(100 * float(np.mean(right)), 1)}
                two = {"videos": n, "percent": percent, "outline fit": mean_fit(readings)}
                report["two things"].append(setting | two)
                brief = {"outline fit": row["outline fit"], "two things": two}
                print(json.dumps(setting | row["percent"] | brief), flush=True)

    pipeline.scheduler = SCHEDULERS[arguments.scheduler[0]].from_config(config)
    steps, guidance = arguments.num_inference_steps[0], arguments.guidance_scale[0]
    report["negative prompts"] = negative_prompts(pipeline, pool, n // 4, steps, guidance)
    other = generate(pipeline, texts[:20], [seed + 1000 for seed in seeds[:20]], steps, guidance)
    first = generate(pipeline, texts[:20], seeds[:20], steps, guidance)
    apart = np.abs(other - first).max(axis=-1).max(axis=1).mean(axis=(1, 2))
    report["another seed"] = {
        "videos": len(first),
        "least share of pixels x difference": round(float(apart.min()), 4),
    }
    return report


if __name__ == "__main__":
    main()
