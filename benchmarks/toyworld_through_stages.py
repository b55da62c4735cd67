"""Held-out captions through the stage scripts on this machine, read back from the videos.

    python benchmarks/toyworld_through_stages.py --captions 200

Runs stage 1, stage 2 and both decoders of stage 3 as the scripts do (float32, the model's default
steps and guidance), in batches, and prints as JSON the percentages read right and how well the
outlines keep to their shapes. With `--things 2` the captions ask for two objects each.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from toyworld.captions import held_out_captions, two_thing_captions
from toyworld.reader import ATTRIBUTES, agrees, largest_of, read_video, truth_of

MODEL = Path(__file__).parents[1] / "models/toyworld"


def generate(texts: list[str], seed: int, decoder: str, options: list[str]) -> list[np.ndarray]:
    """Returns the videos [F, height, width, 3] in 0..1 that the three stages make of a batch."""
    with tempfile.TemporaryDirectory() as folder:
        stage1.run(
            stage1.parse_arguments(
                ["--model_id", str(MODEL), "--dtype=float32", "--output_dir", folder]
                + [f"--prompt={text}" for text in texts]
            )
        )
        common = ["--input_dir", folder, "--dtype=float32"]
        stage2.run(stage2.parse_arguments([*common, f"--seed={seed}", *options]))
        video = Path(folder, "video.npy")
        stage3.run(
            stage3.parse_arguments([*common, "--output_video", str(video)]),
            decoder.removeprefix("vae_"),
        )
        names = [video.with_stem(f"video-{i}") for i in range(len(texts))]
        return [np.load(name) for name in (names if len(texts) > 1 else [video])]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--things", type=int, choices=(1, 2), default=1)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--decoder", choices=("vae_torchax", "vae_flax"), default="vae_torchax")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's")
    arguments = parser.parse_args()
    options = []
    if arguments.guidance_scale is not None:
        options = [f"--guidance_scale={arguments.guidance_scale}"]
    prompts_of = held_out_captions if arguments.things == 1 else two_thing_captions
    prompts = prompts_of(arguments.captions)
    right: list[dict[str, bool]] = []
    fits: list[float] = []
    for first in range(0, len(prompts), arguments.batch):
        batch = prompts[first : first + arguments.batch]
        texts = [prompt.text for prompt in batch]
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report
            videos = generate(texts, first, arguments.decoder, options)
        for prompt, video in zip(batch, videos, strict=True):
            reading = read_video(video)
            fits += reading.fits
            if arguments.things == 1:
                truth, seen = truth_of(prompt.scene), largest_of(reading)
                row = {name: seen[name] == truth[name] for name in ATTRIBUTES}
                right.append(row | {"all four": all(row.values())})
            else:
                right.append({"everything": agrees(reading, prompt.scene)})
        whole = sum(all(row.values()) for row in right)
        print(f"{len(right)} captions, {whole} right", file=sys.stderr, flush=True)
    percent = {name: 100 * np.mean([row[name] for row in right]) for name in right[0]}
    report = {
        "captions": len(right),
        "things": arguments.things,
        "decoder": arguments.decoder,
        "guidance_scale": arguments.guidance_scale or "default",
        "percent": {name: round(float(value), 1) for name, value in percent.items()},
        "outline_fit": round(float(np.mean(fits)), 3),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
