"""Previews show the video so far, change nothing else, and are fitted to the model's own videos."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import calibrate
import stage1_text_encoder as stage1
import stage2_transformer as stage2
from cogvideox.video import preview
from cogvideox.video.preview import (
    PreviewFactors,
    fit_factors,
    pictures_of,
    published_factors,
    read_factors,
    small_frames,
    write_factors,
)
from cogvideox.video.writing import open_video_writer
from runtime.exit_codes import run_main
from stages import files as stage_files
from stages.preview import Previews
from stages.sections import DECODE, DENOISE, make_section
from tests.tiny_models import save_tiny_model

RNG = np.random.default_rng(0)
CHANNELS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Embeddings of two prompts, for a model with a padded latent frame."""
    folder = tmp_path_factory.mktemp("stages")
    model = save_tiny_model(folder / "model", sample_height=4, sample_width=6)
    where = [f"--model_id={model}", f"--output_dir={folder}", "--dtype=float32"]
    stage1.run(stage1.parse_arguments(["--prompt=A red cat", "--prompt=A blue cat", *where]))
    weights = tuple(map(tuple, 0.1 * RNG.normal(size=(CHANNELS, 3))))
    write_factors(folder / "factors.json", PreviewFactors(weights, (0.5, 0.5, 0.5)), 30.0, 1)
    return folder


def run(folder: Path, output_dir: Path, *more: str) -> bytes:
    arguments = [f"--input_dir={folder}", f"--output_dir={output_dir}", "--dtype=float32"]
    stage2.run(stage2.parse_arguments([*arguments, "--num_inference_steps=5", *more]))
    return (output_dir / stage_files.LATENTS_FILE).read_bytes()


def test_previews_show_x0_and_change_no_latent(folder, tmp_path, monkeypatch):
    seen, show = [], Previews.show

    def watch(self, state, total):
        seen.append(np.asarray(state.denoiser.layout.to_latents(np.asarray(state.previous_x0))))
        show(self, state, total)

    drawn, write = [], preview.write_preview

    def write_and_keep(path, pictures, fps):
        drawn.append(pictures)
        assert fps == 4
        write(path, pictures, fps)

    monkeypatch.setattr(Previews, "show", watch)
    monkeypatch.setattr(preview, "write_preview", write_and_keep)
    without = run(folder, tmp_path / "without")
    assert not drawn and not list((tmp_path / "without").glob("*.webp"))
    factors = folder / "factors.json"
    more = ["--preview_every=4", f"--preview_factors={factors}"]
    assert run(folder, tmp_path / "with", *more) == without
    assert len(seen) == 5 and len(drawn) == 2
    for number, x0 in enumerate(seen[3]):
        # 17 frames are five latent frames, which the model takes as six.
        expected = pictures_of(x0[1:].swapaxes(0, 1), read_factors(factors))
        np.testing.assert_array_equal(drawn[number], expected)
        with Image.open(tmp_path / "with" / f"stage2_preview-{number}.webp") as image:
            assert (image.n_frames, image.size) == (5, (6, 4))


def test_a_model_without_factors_is_refused_before_work(folder, tmp_path, capsys):
    for more, reason in (
        (["--preview_every=2"], "the published factors are for 16 channels, the model has 8"),
        (["--preview_factors=x"], "--preview_factors is for --preview_every"),
        (["--preview_every=2", f"--preview_factors={folder}/none"], "cannot read"),
    ):
        with pytest.raises(SystemExit) as end:
            run_main(lambda more=more: run(folder, tmp_path, *more) and None)
        assert end.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [{"format": "x"}, {"weights": []}, {"weights": [[1, 2]]}, {"bias": [1]}, {"more": 1}],
)
def test_damaged_factors_are_refused(damage, folder, tmp_path):
    file = json.loads((folder / "factors.json").read_text()) | damage
    (tmp_path / "factors.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="factors.json"):
        read_factors(tmp_path / "factors.json")


def test_a_fit_finds_the_map():
    weights = 0.01 * RNG.normal(size=(CHANNELS, 3))
    true = PreviewFactors(tuple(map(tuple, weights)), (0.4, 0.5, 0.6))
    latents = [RNG.normal(size=(CHANNELS, 3, 4, 6)) for _ in range(4)]
    pictures = [np.einsum("cthw,cr->thwr", x, true.weights) + true.bias for x in latents]
    found, psnr = fit_factors(latents, pictures)
    np.testing.assert_allclose(found.weights, true.weights, atol=1e-12)
    np.testing.assert_allclose(found.bias, true.bias, atol=1e-12)
    assert psnr > 100


@pytest.mark.parametrize(("frames", "latent_frames"), [(17, 5), (16, 4), (1, 1)])
def test_frames_are_averaged_over_what_a_latent_stands_for(frames, latent_frames):
    video = RNG.integers(0, 256, (frames, 16, 24, 3)).astype(np.uint8)
    small = small_frames(video, latent_frames, 8)
    assert small.shape == (latent_frames, 2, 3, 3)
    first = frames % 4
    last = video[frames - 4 if frames > 1 else 0 :, 8:16, 16:24].mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(small[-1, 1, 2], last, rtol=1e-5)
    if first:
        np.testing.assert_allclose(small[0, 0, 0], video[0, :8, :8].mean(axis=(0, 1)) / 255, 1e-5)
    with pytest.raises(ValueError, match="are not those of"):
        small_frames(video[:-1] if frames > 1 else video[:0], latent_frames, 8)


def test_published_factors_are_those_of_sixteen_channels():
    """Zero latents are nearly grey, as (1 + bias) / 2 says."""
    picture = pictures_of(np.zeros((16, 1, 1, 1), np.float32), published_factors())
    assert picture.ravel().tolist() == [125, 128, 125]
    ones = pictures_of(np.ones((16, 1, 1, 1), np.float32), published_factors())
    assert ones.shape == (1, 1, 1, 3)


def test_calibrate_fits_the_colours_of_videos(folder, tmp_path, capsys):
    run(folder, tmp_path)
    latents = load_file(tmp_path / stage_files.LATENTS_FILE)["latents"]
    denoised = stage_files.read_config(tmp_path)[DENOISE]
    section = make_section({"latents": denoised["fingerprint"]})
    stage_files.record_section(tmp_path, DECODE, section, inherited=tmp_path)
    for number, one in enumerate(latents):
        picture = (128 + 40 * one[:3].clip(-2, 2)).transpose(1, 2, 3, 0).astype(np.uint8)
        frames = picture.repeat(4, 0).repeat(8, 1).repeat(8, 2)[3:]
        video = tmp_path / f"output_video-{number}.mp4"
        with open_video_writer(video, fps=16, num_frames=17, quality=10) as writer:
            writer.write(frames)
    arguments = [f"--output_dir={tmp_path}/out", "--preview", str(tmp_path)]
    calibrate.run(calibrate.parse_arguments(arguments))
    said = capsys.readouterr().out
    assert float(re.search(r"8 channels, (\S+) dB over 2 video\(s\)", said)[1]) > 20
    factors = np.array(read_factors(tmp_path / "out/preview_factors.json").weights)
    assert (factors[:3].argmax(1) == range(3)).all() and abs(factors[3:]).max() < 0.05
    video.unlink()
    with pytest.raises(SystemExit) as end:
        run_main(lambda: calibrate.run(calibrate.parse_arguments(arguments)))
    assert end.value.code == 2 and "does not exist" in capsys.readouterr().err
