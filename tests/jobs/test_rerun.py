"""A video is reproduced from its tag or from the settings next to it; else the reason is given."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import batch
import generate
from cogvideox.video.writing import open_video_writer
from jobs import rerun
from runtime.errors import InputError
from stages import files as stage_files
from stages.sections import DECODE, checksum, fingerprint
from stages.video_digest import with_digests
from tests.tiny_models import save_tiny_model

PROMPT = '-- a "red" cat = 100%; #1 \\ <b>猫'
SETTINGS = ["--num_frames", "9", "--allow_unsupported", "--num_inference_steps", "2"]
SETTINGS += ["--height", "48", "--width", "80", "--seed", "0", "--scheduler", "ddim"]
SETTINGS += ["--guidance_scale", "3.3", "--use_dynamic_cfg", "--dtype", "float32"]
SETTINGS += ["--fps", "5", "--quality", "9", "--negative_prompt=-blurry", "--decoder", "flax"]
SETTINGS += [
    "--max_sequence_length",
    "12",
    "--allow_unsupported",
    "--dp",
    "1",
    "--sp",
    "1",
    "--tp",
    "1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Makes a folder with the files of a run, including two videos made together."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(tmp_path_factory.mktemp("model"))
    texts = [f"--prompt={PROMPT}", "--prompt=A blue dog"]
    arguments = [*texts, "--model_id", str(model), *SETTINGS, "--output_dir", str(folder)]
    generate.run(generate.parse_arguments([*arguments, "--output_video", str(folder / "a.mp4")]))
    return folder


def again(*arguments: object) -> None:
    batch.rerun(batch.parse_rerun([*map(str, arguments), "--dp", "1", "--sp", "1", "--tp", "1"]))


def frames(video: Path) -> np.ndarray:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", "-i", video, "-f", "rawvideo", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "uint8")


def test_from_the_tag(made, tmp_path):
    alone = shutil.copy(made / "a-1.mp4", tmp_path / "moved.mp4")
    again(alone)
    found = tmp_path / "moved_rerun"
    for name in ("a-0.mp4", "a-1.mp4"):
        assert np.array_equal(frames(made / name), frames(found / name))
    one, two = (load_file(folder / stage_files.LATENTS_FILE)["latents"] for folder in (made, found))
    assert np.array_equal(one, two)
    first, second = map(stage_files.read_config, (made, found))
    for stage in ("stage1_text_encoder", "stage2_transformer"):
        assert first[stage]["fingerprint"] == second[stage]["fingerprint"]


def test_settings_beside_the_video(made, tmp_path):
    """Videos without a tag use them; only settings that will be run are checked."""
    folder = tmp_path / "files"
    shutil.copytree(made, folder)
    strip_tag(folder)
    options = rerun.RerunOptions(folder / "a-0.mp4")
    provenance = rerun.read_provenance(options.video)
    assert provenance.source == folder / stage_files.CONFIG_FILE and provenance.decoder == "flax"
    first, second, third = rerun.stage_options(provenance, options, tmp_path / "out")
    assert first.prompt == [PROMPT, "A blue dog"] and first.negative_prompt == "-blurry"
    assert (second.seed, second.guidance_scale, second.use_dynamic_cfg) == (0, 3.3, True)
    assert third.output_video == tmp_path / "out" / "a.mp4" and third.no_metadata
    assert (third.fps, third.quality, third.dtype) == (5, 9, "float32")


def strip_tag(folder: Path) -> None:
    """Replaces a video by one without a tag, as if it had been made without one."""
    with open_video_writer(folder / "a-0.mp4", fps=5, num_frames=1) as writer:
        writer.write(np.zeros((1, 48, 80, 3), np.uint8))
    config = json.loads((folder / stage_files.CONFIG_FILE).read_text())
    third = config[DECODE]
    config[DECODE] = with_digests(third, [folder / "a-0.mp4", folder / "a-1.mp4"])
    (folder / stage_files.CONFIG_FILE).write_text(json.dumps(config))


def test_settings_of_another_run_are_refused(made, tmp_path):
    """A later run replaced the settings beside the video; the video stayed."""
    shutil.copytree(made, tmp_path / "files")
    strip_tag(tmp_path / "files")
    config = json.loads((tmp_path / "files" / stage_files.CONFIG_FILE).read_text())
    assert rerun.read_provenance(tmp_path / "files/a-0.mp4")
    with open_video_writer(tmp_path / "files/a-0.mp4", fps=9, num_frames=1) as writer:
        writer.write(np.zeros((1, 48, 80, 3), np.uint8))
    with pytest.raises(InputError, match="describes another a-0.mp4"):
        again(tmp_path / "files/a-0.mp4")
    first = config["stage1_text_encoder"]
    first["prompt"] = "Another"
    first["fingerprint"] = fingerprint(first)
    first["checksum"] = checksum(first)
    (tmp_path / "files" / stage_files.CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="stage1_text_encoder.py ran again"):
        again(tmp_path / "files/a-0.mp4")
    assert not (tmp_path / "files/a-0_rerun").exists()


def test_a_tag_cannot_steer_the_terminal(made, tmp_path, capsys):
    """Its versions of an absent library contain terminal escapes."""
    config = json.loads((made / stage_files.CONFIG_FILE).read_text())
    second = config["stage2_transformer"]
    second["made_with"]["versions"] = {"no\x1b[31mlibrary": "\x1b]0;owned\x07", "jax": 9}
    second["checksum"] = checksum(second)
    with open_video_writer(
        tmp_path / "v.mp4", fps=5, num_frames=1, comment=json.dumps(config)
    ) as writer:
        writer.write(np.zeros((1, 48, 80, 3), np.uint8))
    again(tmp_path / "v.mp4")
    said = capsys.readouterr()
    assert "\x1b]" not in said.out and "\x1b[31m" not in said.out + said.err
    assert r"made with no\x1b[31mlibrary \x1b]0;owned\x07, this is not installed" in said.out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.mp4", None, "does not exist"),
        ("text.mp4", b"no video", "ffmpeg cannot read"),
        ("other.gif", b"", "is about a-0.mp4, a-1.mp4, not about other.gif"),
    ],
)
def test_what_nothing_is_known_of(name, content, said, made, tmp_path):
    shutil.copy(made / stage_files.CONFIG_FILE, tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        again(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_no_regular_file(make, tmp_path):
    make(tmp_path / "v.mp4")
    with pytest.raises(InputError, match="v.mp4"):
        again(tmp_path / "v.mp4")


@pytest.mark.parametrize("comment", ["a note", "[]", '{"stage1_text_encoder": 3}', "{}"])
def test_tags_of_others(comment, tmp_path):
    with open_video_writer(tmp_path / "v.mp4", fps=5, num_frames=1, comment=comment) as writer:
        writer.write(np.zeros((1, 48, 80, 3), np.uint8))
    with pytest.raises(InputError, match="the tag of|does not say what"):
        again(tmp_path / "v.mp4")


def test_nothing_is_overwritten(made, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not empty"):
        again(made / "a-0.mp4", "--output_dir", tmp_path)


def test_changed_settings_end_with_one_line(made, tmp_path):
    config = json.loads((made / stage_files.CONFIG_FILE).read_text())
    config["stage2_transformer"]["seed"] = 8
    with open_video_writer(
        tmp_path / "v.mp4", fps=5, num_frames=1, comment=json.dumps(config)
    ) as writer:
        writer.write(np.zeros((1, 48, 80, 3), np.uint8))
    command = [sys.executable, "batch.py", "rerun", str(tmp_path / "v.mp4")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "does not say what stage2" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "v_rerun").exists()
