"""compare.py measures videos, latents files and output folders, or refuses them."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import compare
from cogvideox.video.writing import open_video_writer
from runtime.errors import InputError
from stages import files
from stages.sections import DECODE, make_section

ROOT = Path(__file__).parents[2]


def video(frames=3, height=48, width=64, shift=0.0):
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.stack([x / width, y / height, (x + y) % 16 / 16], axis=-1)
    return np.clip(np.stack([picture] * frames) + shift, 0, 1).astype(np.float32)


def latents(noise=0.0):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 4, 3, 6, 8)).astype(np.float32)
    return values + noise * rng.standard_normal(values.shape).astype(np.float32)


def write_video(path, frames, fps=16):
    with open_video_writer(path, fps=fps, num_frames=len(frames)) as writer:
        writer.write(frames)


@pytest.fixture
def folders(tmp_path):
    """Makes two output folders with videos and latents, and single files next to them."""
    for name, noise in (("a", 0.0), ("b", 0.02)):
        folder = tmp_path / name
        folder.mkdir()
        write_video(folder / "output_video.mp4", video(shift=noise))
        scaling = {"vae_scaling_applied": "false"}
        save_file({"latents": latents(noise)}, folder / "stage2_latents.safetensors", scaling)
    write_video(tmp_path / "long.mp4", video(frames=5))
    write_video(tmp_path / "wide.mp4", video(width=80))
    write_video(tmp_path / "slow.mp4", video(), fps=8)
    np.save(tmp_path / "tiny.npy", video(height=20, width=20))
    (tmp_path / "bad.safetensors").write_bytes(b"no latents")
    save_file({"other": latents()}, tmp_path / "other.safetensors")
    save_file({"latents": latents()[:, :, :2]}, tmp_path / "short.safetensors")
    save_file({"latents": latents()}, tmp_path / "scaled.safetensors", {"vae_scaling_applied": "1"})
    return tmp_path


def run(*words):
    compare.run(compare.parse_arguments([str(word) for word in words]))


def report(capsys, *words):
    capsys.readouterr()
    run(*words, "--json")
    return json.loads(capsys.readouterr().out)


def test_output_folders(folders, capsys):
    done = report(capsys, folders / "a", folders / "b", "--difference", folders / "worst.png")
    (of_video,) = done["videos"]
    assert of_video["num_frames"] == 3 and of_video["fps"] == 16 and not of_video["identical"]
    assert 30 < of_video["psnr"]["mean"] < 40 and len(of_video["psnr"]["frames"]) == 3
    assert 0 < of_video["ssim"]["mean"] < 1 and of_video["vmaf"]["mean"] > 0
    assert of_video["lpips"] is None
    exact, other = latents().astype(np.float64), latents(0.02).astype(np.float64)
    error, peak = np.square(exact - other), exact.max() - exact.min()
    expected = 10 * np.log10(peak**2 / error.mean((0, 1, 3, 4)))
    assert done["latents"]["psnr"]["frames"] == pytest.approx(expected.tolist())
    assert done["latents"]["psnr"]["worst_frame"] == expected.argmin()
    assert done["latents"]["peak"] == peak
    norms = np.linalg.norm(exact - other) / np.linalg.norm(exact)
    assert done["latents"]["relative_l2"] == pytest.approx(norms)
    assert (folders / "worst.png").exists()


def test_text_names_what_was_compared(folders, capsys):
    run(folders / "a", folders / "b")
    text = capsys.readouterr().out
    for part in ("PSNR dB", "SSIM", "VMAF", "worst frame", "relative L2", "peak"):
        assert part in text
    run(folders / "a", folders / "a")
    text = capsys.readouterr().out
    assert text.count("identical") == 2 and "inf" in text


def test_identical_is_inf_in_json(folders, capsys):
    done = report(capsys, folders / "a", folders / "a")
    assert done["videos"][0]["identical"] and done["latents"]["identical"]
    for psnr in (done["videos"][0]["psnr"], done["latents"]["psnr"]):
        assert psnr["mean"] == "inf" and set(psnr["frames"]) == {"inf"}


def test_what_only_one_folder_has_is_said(folders, capsys):
    (folders / "b" / "output_video.mp4").unlink()
    done = report(capsys, folders / "a", folders / "b")
    assert done["videos"] == [] and done["latents"] is not None
    assert "has a video; not compared" in done["notes"][0]


def test_the_videos_of_a_batch_by_their_recorded_names(folders, capsys):
    for folder in (folders / "a", folders / "b"):
        (folder / "output_video.mp4").rename(folder / "v-0.mp4")
        write_video(folder / "v-1.mp4", video())
        # Recorded where the folder was before it moved.
        names = ["/elsewhere/v-0.mp4", "/elsewhere/v-1.mp4"]
        section = make_section({"output_video": names})
        config = {"format_version": files.FORMAT_VERSION, DECODE: section}
        (folder / files.CONFIG_FILE).write_text(json.dumps(config))
    done = report(capsys, folders / "a", folders / "b", "--side_by_side", folders / "s.mp4")
    assert [v["identical"] for v in done["videos"]] == [False, True]
    assert (folders / "s-0.mp4").exists() and (folders / "s-1.mp4").exists()


def test_bfloat16_latents(folders, capsys):
    rounded = latents().astype(ml_dtypes.bfloat16)
    save_file({"latents": rounded}, folders / "rounded.safetensors")
    save_file({"latents": latents()}, folders / "plain.safetensors")
    done = report(capsys, folders / "plain.safetensors", folders / "rounded.safetensors")
    assert 0 < done["latents"]["relative_l2"] < 4e-3


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("a/output_video.mp4 long.mp4", "3 frames, .* 5"),
        ("a/output_video.mp4 wide.mp4", "48x64, .* 48x80"),
        ("a/output_video.mp4 slow.mp4", "frames a second"),
        ("a/output_video.mp4 missing.mp4", "missing.mp4 does not exist"),
        ("a/output_video.mp4 a/stage2_latents.safetensors", "is a video, .* latents"),
        ("a bad.safetensors", "truncated or not a safetensors file"),
        ("a other.safetensors", "no tensor 'latents'"),
        ("a short.safetensors", "has shape"),
        ("a scaled.safetensors", "has VAE scaling false, .* 1"),
        ("a missing.safetensors", "does not exist"),
        ("a missing", "is a video, .*|does not exist"),
        ("a b --side_by_side x.avi", "--side_by_side .*use .mp4"),
        ("a b --difference a/output_video.mp4", r"\.png"),
        ("a b --side_by_side a/output_video.mp4", "would write into"),
        ("a b --difference nowhere.txt/x.png", "cannot be a folder"),
        ("a b --lpips_weights bad.safetensors", "does not hold LPIPS weights"),
        ("tiny.npy tiny.npy --lpips_weights bad.safetensors", "at least 31x31"),
        ("a/stage2_latents.safetensors b --difference x.png", "no videos to compare"),
    ],
)
def test_refusals(folders, words, what, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "nowhere.txt").write_text("")
    monkeypatch.setattr("cogvideox.video.metrics.ssim", None)  # nothing is measured
    before = {path: path.stat().st_mtime_ns for path in folders.rglob("*")}
    with pytest.raises(InputError, match=what) as refusal:
        run(*words.split())
    assert "\n" not in str(refusal.value)
    assert {path: path.stat().st_mtime_ns for path in folders.rglob("*")} == before


def test_exit_codes(folders):
    def ended(*words):
        command = [sys.executable, str(ROOT / "compare.py"), *words]
        return subprocess.run(command, cwd=folders, capture_output=True, text=True)

    done = ended("a", "b")
    assert done.returncode == 0 and "SSIM" in done.stdout
    done = ended("a/output_video.mp4", "long.mp4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: cannot compare") and done.stderr.count("\n") == 1
