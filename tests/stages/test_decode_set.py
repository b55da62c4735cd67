"""Stage 3's files are all old or all new; the mp4 holds long prompts."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import generate
import stage3_vae_decoder as stage3
from cogvideox.video import contact_sheet
from cogvideox.video.reading import read_comment
from runtime import files as runtime_files
from runtime.errors import InputError, RunError
from stages import files as stage_files
from stages import sections, video_digest
from tests.tiny_models import save_tiny_model

PROMPT = "猫" * 19_998 + "=;"
SIZES = ["--height=32", "--width=48", "--num_frames=5", "--allow_unsupported"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs generate.py with the longest prompts that stage 1 takes."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(folder / "model")
    arguments = [f"--model_id={model}", f"--output_dir={folder / 'out'}", "--dtype=float32"]
    arguments += [f"--prompt={PROMPT}", f"--negative_prompt={PROMPT}", "--num_inference_steps=1"]
    generate.run(generate.parse_arguments([*arguments, *SIZES]))
    return folder / "out"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def decode(folder: Path, *arguments: str) -> None:
    common = [f"--input_dir={folder}", "--dtype=float32"]
    stage3.run(stage3.parse_arguments([*common, *arguments]))


def test_the_longest_prompts_are_in_the_tag(made: Path):
    """120 kB of prompts, more than one command-line argument may hold."""
    comment = read_comment(made / stage_files.VIDEO_FILE)
    assert comment is not None
    tag = json.loads(comment)
    assert tag[sections.ENCODE]["prompt"] == tag[sections.ENCODE]["negative_prompt"] == PROMPT
    assert all(sections.is_whole(tag[stage]) for stage in sections.STAGES)


def test_the_config_holds_the_checksum_of_the_video(made: Path):
    section = stage_files.read_config(made, *sections.STAGES)[sections.DECODE]
    digest = video_digest.digest(made / stage_files.VIDEO_FILE)
    assert section["made_with"]["video_sha256"] == {stage_files.VIDEO_FILE: digest}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_whole_old_set(folder: Path, monkeypatch):
    before = snapshot(folder)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(contact_sheet, "write_contact_sheet", refuse)
    with pytest.raises(RunError, match="^cannot write .*: No space left on device$"):
        decode(folder, "--fps=9")
    assert snapshot(folder) == before


def test_the_video_replaces_the_old_one_last(folder: Path, monkeypatch):
    order, replace = [], os.replace

    def note(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(runtime_files.os, "replace", note)
    decode(folder, "--fps=9")
    sheet = stage_files.contact_sheet(Path(stage_files.VIDEO_FILE)).name
    names = [sheet, stage_files.CONFIG_FILE, stage_files.VIDEO_FILE]
    assert [name for name in order if name in names] == names


def test_a_kill_while_the_sheet_is_written_leaves_nothing_for_ever(folder: Path, monkeypatch):
    """The next run removes temporary names of its own files, but none made from such a name."""
    before, at_write = set(snapshot(folder)), list[set[str]]()
    save = Image.Image.save

    def note(*arguments, **options):
        save(*arguments, **options)
        at_write.append({path.name for path in folder.iterdir()} - before)

    monkeypatch.setattr(Image.Image, "save", note)
    decode(folder)
    written = [stage_files.VIDEO_FILE, stage_files.CONFIG_FILE]
    written.append(stage_files.contact_sheet(Path(stage_files.VIDEO_FILE)).name)
    starts = tuple(f".{name}." for name in written)
    assert at_write and all(name.startswith(starts) for name in at_write[-1]), at_write


def test_a_folder_removed_while_decoding_fails(folder: Path, monkeypatch):
    write = contact_sheet.write_contact_sheet

    def remove(*arguments, **options):
        write(*arguments, **options)
        shutil.rmtree(folder)

    monkeypatch.setattr(contact_sheet, "write_contact_sheet", remove)
    with pytest.raises(RunError):
        decode(folder)


def test_a_read_only_input_folder_is_refused_before_the_work(folder: Path, tmp_path, monkeypatch):
    """It takes generation_config.json, wherever the video goes."""
    access = os.access
    readable = lambda path, mode: path != folder and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", readable)
    monkeypatch.setattr("cogvideox.vae.decode.Decoder.load", None)
    with pytest.raises(InputError, match=f"{folder} is not writable"):
        decode(folder, f"--output_video={tmp_path / 'elsewhere.mp4'}")


def test_long_names(folder: Path):
    """The contact sheet has the longest name; temporary names are not longer."""
    before = snapshot(folder)
    with pytest.raises(ValueError, match="is too long by 14 bytes"):
        decode(folder, f"--output_video={folder / ('v' * 250)}.mp4")
    with pytest.raises(ValueError, match="is too long by 10 bytes"):
        decode(folder, f"--output_video={folder / ('v' * 240)}")
    assert snapshot(folder) == before
    video = folder / f"{'v' * 236}.mp4"
    decode(folder, f"--output_video={video}")
    assert video.is_file() and stage_files.contact_sheet(video).is_file()
