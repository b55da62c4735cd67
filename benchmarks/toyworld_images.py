"""Held-out pairs of a picture and a caption through the stages, judged by their videos.

    python benchmarks/toyworld_images.py --pairs 100

Runs the stages as `stages.pipeline` does, in float32 with the model's default steps and guidance.
Prints as JSON how near the first frames are to the pictures, and what was read right.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from stages.pipeline import Pipeline, Settings
from toyworld.evaluate import contact_sheet
from toyworld.pictures import Judgement, Pair, held_out_pairs, judge
from toyworld.reader import largest_of, read_video

MODEL = Path(__file__).parents[1] / "models/toyworld-i2v"


def report(judged: list[tuple[Pair, Judgement, np.ndarray]]) -> dict:
    """Returns the percentages, the first frames' PSNR, and each pair that went wrong."""
    psnr = np.array([judgement.psnr for _, judgement, _ in judged])
    right = {
        name: round(100 * float(np.mean([one.right[name] for _, one, _ in judged])), 1)
        for name in judged[0][1].right
    }
    wrong = [
        {
            "seed": pair.prompt.seed,
            "caption": pair.prompt.text,
            "psnr_db": round(judgement.psnr, 2),
            "seen": largest_of(read_video(video)),
        }
        for pair, judgement, video in judged
        if judgement.psnr < 30 or not all(judgement.right.values())
    ]
    return {
        "pairs": len(judged),
        "first_frame_psnr_db": {
            "mean": round(float(psnr.mean()), 2),
            "least": round(float(psnr.min()), 2),
        },
        "first_frames_above_30_db": int((psnr >= 30).sum()),
        "percent_right": right,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model_id", default=str(MODEL))
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="leave out the pairs before this one")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first 24 here")
    arguments = parser.parse_args()
    pipeline = Pipeline(arguments.model_id, dtype="float32")
    judged = []
    began = time.monotonic()
    # stdout is for the report.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        file = Path(folder, "picture.png")
        for pair in held_out_pairs(arguments.pairs)[arguments.first :]:
            Image.fromarray(pair.picture).save(file)
            settings = Settings(seed=pair.prompt.seed, guidance_scale=arguments.guidance_scale)
            start = pipeline.start_from(image=file)
            video = pipeline.generate(pair.prompt.text, settings, start=start, output="float32")
            judged.append((pair, judge(video, pair), video))
    result = report(judged)
    if arguments.sheet:
        shown = judged[:24]
        videos = np.stack([video for _, _, video in shown])
        contact_sheet(videos, [pair.prompt.text for pair, _, _ in shown]).save(arguments.sheet)
    print(json.dumps(result | {"seconds": round(time.monotonic() - began, 1)}, indent=1))


if __name__ == "__main__":
    main()
