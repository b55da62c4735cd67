"""The shipped model through the stages: what the videos show is what the captions say."""

from pathlib import Path

import numpy as np
import pytest

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from toyworld.captions import held_out_captions
from toyworld.reader import largest_of, read_video, truth_of

MODEL = Path(__file__).parents[2] / "models/toyworld"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The latents of four held-out captions, with the model's default steps and guidance."""
    folder = tmp_path_factory.mktemp("stages")
    texts = [prompt.text for prompt in held_out_captions(4)]
    where = ["--model_id", str(MODEL), "--output_dir", str(folder), "--dtype=float32"]
    stage1.run(stage1.parse_arguments([*where, *(f"--prompt={text}" for text in texts)]))
    stage2.run(stage2.parse_arguments(["--input_dir", str(folder), "--dtype=float32", "--seed=0"]))
    return folder


@pytest.mark.parametrize("decoder", ["torchax", "flax"])
def test_videos_show_what_the_captions_say(decoder, folder):
    video = folder / f"{decoder}.npy"
    arguments = ["--input_dir", str(folder), "--output_video", str(video), "--dtype=float32"]
    stage3.run(stage3.parse_arguments(arguments), decoder)
    for i, prompt in enumerate(held_out_captions(4)):
        reading = read_video(np.load(video.with_stem(f"{decoder}-{i}")))
        assert largest_of(reading) == truth_of(prompt.scene), prompt.text
        # True videos have 0.99 and more, dented outlines as of a badly denoised latent 0.8.
        assert min(reading.fits) > 0.85, prompt.text
