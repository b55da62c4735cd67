"""Stages require finite results, keep other sections, and write arrays as numpy reads them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from runtime.errors import RunError
from stages import files as stage_files
from stages.sections import DECODE, DENOISE, ENCODE, STAGES, make_section


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_end_the_run(bad):
    latents = np.zeros((1, 2, 3), np.float32)
    stage_files.check_finite({"latents": latents}, "stage2_transformer")
    latents[0, 1, 2] = bad
    with pytest.raises(RunError, match="1 of 6 values of latents"):
        stage_files.check_finite({"latents": latents}, "stage2_transformer")


def test_a_stage_keeps_the_sections_of_the_others(tmp_path: Path):
    for stage in ("stage1_text_encoder", "stage2_transformer", "stage1_text_encoder"):
        section = make_section({"model_id": "m", "seed": 0})
        stage_files.record_section(tmp_path, stage, section, inherited=tmp_path)
    config = json.loads((tmp_path / stage_files.CONFIG_FILE).read_text())
    assert {"stage1_text_encoder", "stage2_transformer"} <= config.keys()


def test_a_stage_copies_no_section_that_was_changed(tmp_path: Path):
    """Whoever reads the config later would believe it."""
    for stage in STAGES:
        section = make_section({"model_id": "m", "seed": 0})
        stage_files.record_section(tmp_path, stage, section, inherited=tmp_path)
    path = tmp_path / stage_files.CONFIG_FILE
    config = json.loads(path.read_text())
    config[DECODE]["seed"] = 1
    config[DENOISE] = "no object"
    path.write_text(json.dumps(config))
    section = make_section({"model_id": "m", "seed": 2})
    stage_files.record_section(tmp_path, ENCODE, section, inherited=tmp_path)
    config = json.loads(path.read_text())
    assert config.keys() == {"format_version", ENCODE}
    assert config[ENCODE]["seed"] == 2


def test_folders_that_cannot_take_the_files_are_refused(tmp_path: Path, monkeypatch):
    usage = os.statvfs(tmp_path)
    no_inodes = os.statvfs_result((*usage[:5], 1000, 0, 0, *usage[8:]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: no_inodes)
        with pytest.raises(ValueError, match="no inodes left"):
            stage_files.check_output_folder(tmp_path / "new", "a", needed_bytes=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda _, mode: mode != os.W_OK)
        with pytest.raises(ValueError, match="is not writable"):
            stage_files.check_output_folder(tmp_path / "new", "a", needed_bytes=0)
    with pytest.raises(ValueError, match="too long by 1 bytes"):
        stage_files.check_output_folder(tmp_path, "a" * 256, needed_bytes=0)
    stage_files.check_output_folder(tmp_path / "new", "a", needed_bytes=0)
    assert not (tmp_path / "new").exists()


def test_equal_runs_write_equal_files(tmp_path: Path):
    """safetensors writes metadata in random order."""
    tensors = {"b": np.ones((3, 5), np.float32), "a": np.zeros(2, np.int8)}
    section = make_section({"model_id": 'm"é'})
    for i in range(8):
        stage_files.write_stage_file(
            tmp_path / f"{i}.safetensors", "stage", tensors, section, more="x"
        )
    first, *others = [path.read_bytes() for path in tmp_path.iterdir()]
    assert others == [first] * 7
    read = load_file(tmp_path / "0.safetensors")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def test_transposed_arrays_are_written_as_they_read(tmp_path: Path):
    """safetensors writes memory in its order, which differs for a transposed array."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).swapaxes(0, 2)
    section = make_section({"model_id": "m"})
    stage_files.write_stage_file(tmp_path / "file.safetensors", "stage", {"array": array}, section)
    np.testing.assert_array_equal(load_file(tmp_path / "file.safetensors")["array"], array)


def test_every_kind_of_video_has_its_own_sheet_and_timings():
    names = ["a.mp4", "a.gif", "a.webp", "a.npy", "a"]
    for of in (stage_files.contact_sheet, stage_files.timings_file):
        assert len({of(Path("out") / name) for name in names}) == len(names)
        assert of(Path("out/a.gif")).parent == Path("out")
    assert stage_files.contact_sheet(Path("a.mp4")).name == "a_contact_sheet.png"
