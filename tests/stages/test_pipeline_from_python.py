"""The stages from Python give the arrays of the stage files, bit for bit, and load once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from cogvideox.denoising.program import Denoiser
from cogvideox.video.frames import inspect_video, read_frames
from cogvideox.video.preview import PreviewFactors, write_factors
from stages import files as stage_files
from stages.pipeline import Pipeline, Settings
from tests.tiny_models import save_tiny_model
from tests.web.serving import ONE_DEVICE

PROMPT = "A red kite"
SETTINGS = Settings(seed=5, num_inference_steps=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(folder, sample_height=4, sample_width=6, sample_frames=5)
    factors = PreviewFactors(((0.1, 0.0, 0.0),) * 8, (0.5, 0.5, 0.5))
    write_factors(folder / "preview_factors.json", factors, 30.0, 1)
    return folder


@pytest.fixture(scope="module")
def pipeline(model) -> Pipeline:
    return Pipeline(str(model), dtype="float32", dp=1, sp=1, tp=1)


def test_equal_to_the_stage_files(pipeline, model, tmp_path):
    common = ["--dtype=float32"]
    stage1.run(stage1.parse_arguments(
        [f"--prompt={PROMPT}", f"--model_id={model}", f"--output_dir={tmp_path}", *common]
    ))  # fmt: skip
    stage2.run(stage2.parse_arguments(
        [f"--input_dir={tmp_path}", f"--output_dir={tmp_path}", "--num_inference_steps=3",
         "--seed=5", *ONE_DEVICE, *common]
    ))  # fmt: skip
    video = tmp_path / "frames"  # of PNG files, which are exact
    stage3.run(stage3.parse_arguments(
        [f"--input_dir={tmp_path}", f"--output_video={video}", "--dp=1", "--tp=1", *common]
    ), "torchax")  # fmt: skip

    embeddings = pipeline.encode(PROMPT)
    stored = load_file(tmp_path / stage_files.EMBEDDINGS_FILE)
    np.testing.assert_array_equal(embeddings.prompt_embeds, stored["prompt_embeds"])
    latents = pipeline.denoise(embeddings, SETTINGS)
    stored = load_file(tmp_path / stage_files.LATENTS_FILE)
    np.testing.assert_array_equal(latents, stored["latents"])
    written = np.stack(list(read_frames(inspect_video(video))))
    np.testing.assert_array_equal(pipeline.decode(latents), written)


def test_progress_and_previews_while_nothing_loads_again(pipeline, monkeypatch):
    pipeline.generate(PROMPT, SETTINGS)
    monkeypatch.setattr(Denoiser, "load", None)
    monkeypatch.setattr(Denoiser, "compile", None)
    seen = []

    def progress(step):
        seen.append((step.done, step.total, step.preview().shape))

    settings = Settings(seed=6, num_inference_steps=4, guidance_scale=5.0)
    frames = pipeline.generate("A blue kite", settings, negative_prompt="red", progress=progress)
    # Two latent frames make eight, with this model as with diffusers.
    assert frames.shape == (8, 32, 48, 3) and frames.dtype == np.uint8
    assert seen == [(done, 4, (2, 4, 6, 3)) for done in (1, 2, 3, 4)]
    assert not np.array_equal(frames, pipeline.generate(PROMPT, SETTINGS))


def test_a_callback_ends_a_run(pipeline):
    def stop(step):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pipeline.generate(PROMPT, SETTINGS, progress=stop)


def test_starts_from_an_image_as_the_stages_do(tmp_path):
    model = save_tiny_model(
        tmp_path / "model", sample_height=4, sample_width=6, sample_frames=5, image_to_video=True
    )
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(picture)
    common = ["--dtype=float32", f"--output_dir={tmp_path}"]
    stage1.run(stage1.parse_arguments(
        [f"--prompt={PROMPT}", f"--model_id={model}", f"--image={picture}", "--image_fit=crop",
         *common]
    ))  # fmt: skip
    stage2.run(stage2.parse_arguments(
        [f"--input_dir={tmp_path}", "--num_inference_steps=3", "--seed=5", *ONE_DEVICE, *common]
    ))  # fmt: skip
    pipeline = Pipeline(str(model), dtype="float32", dp=1, sp=1, tp=1)
    start = pipeline.start_from(image=str(picture), image_fit="crop")
    for name, stored in load_file(tmp_path / stage_files.CONDITIONS_FILE).items():
        np.testing.assert_array_equal(getattr(start, name), stored)
    embeddings = pipeline.encode(PROMPT)
    latents = pipeline.denoise(embeddings, SETTINGS, start=start)
    stored = load_file(tmp_path / stage_files.LATENTS_FILE)
    np.testing.assert_array_equal(latents, stored["latents"])
    with pytest.raises(ValueError, match="give stage 1 an image"):
        pipeline.denoise(embeddings, SETTINGS)
    with pytest.raises(ValueError, match="for --video, not for --image"):
        pipeline.denoise(embeddings, Settings(strength=0.5), start=start)
    with pytest.raises(ValueError, match="an image or a video"):
        pipeline.start_from()


def test_starts_from_a_video(pipeline, tmp_path):
    file = tmp_path / "video.npy"
    np.save(file, np.random.default_rng(1).integers(0, 256, (5, 32, 48, 3), np.uint8))
    start = pipeline.start_from(video=file, encode_on="cpu")
    settings = Settings(seed=5, num_inference_steps=3, strength=0.7)
    seen = []
    embeddings = pipeline.encode(PROMPT)
    latents = pipeline.denoise(
        embeddings, settings, start=start, progress=lambda step: seen.append(step.total)
    )
    assert seen == [2, 2] and latents.shape == start.mean.shape
    assert not np.array_equal(latents, pipeline.denoise(embeddings, SETTINGS))


def test_bad_arguments(pipeline):
    with pytest.raises(ValueError, match="no such folder"):
        Pipeline("./no/such/model")
    with pytest.raises(ValueError, match="empty"):
        pipeline.encode(" ")
    with pytest.raises(ValueError, match="nearest"):
        pipeline.denoise(pipeline.encode(PROMPT), Settings(height=33))
    with pytest.raises(ValueError, match=r"not \[1, 8, T, H, W\]"):
        pipeline.decode(np.zeros((1, 16, 2, 4, 6), np.float32))
