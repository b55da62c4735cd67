"""A folder that was removed, moved or replaced during a run is noticed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import stage1_text_encoder as stage1
import stage2_transformer as stage2
from runtime.errors import RunError
from runtime.open_folder import OpenFolder
from stages import denoise, encode
from tests.tiny_models import save_tiny_model

SIZES = ["--height=32", "--width=48", "--num_frames=5", "--allow_unsupported"]


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def replace(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def move(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


@pytest.mark.parametrize("change", [remove, replace, move])
def test_a_change_is_noticed(change: Callable[[Path], None], tmp_path: Path):
    with OpenFolder(tmp_path / "new" / "folder") as folder:
        folder.check()
        (tmp_path / "new" / "folder" / "file").touch()
        folder.check()
        change(tmp_path / "new" / "folder")
        with pytest.raises(RunError, match="folder was removed, moved or replaced"):
            folder.check()


def test_stages_1_and_2_fail_if_their_folder_is_removed(tmp_path: Path, monkeypatch):
    """Files written after the removal would make a new folder that lacks those before it."""
    where = ["--prompt=A red cat", f"--model_id={save_tiny_model(tmp_path / 'model')}"]
    stage1.run(stage1.parse_arguments([*where, f"--output_dir={tmp_path / 'one'}"]))
    embed, run = encode.embed, denoise.denoise

    def embed_and_remove(*arguments, **options):
        shutil.rmtree(tmp_path / "two")
        return embed(*arguments, **options)

    def run_and_remove(*arguments, **options):
        shutil.rmtree(tmp_path / "two")
        return run(*arguments, **options)

    monkeypatch.setattr(encode, "embed", embed_and_remove)
    with pytest.raises(RunError, match="two was removed"):
        stage1.run(stage1.parse_arguments([*where, f"--output_dir={tmp_path / 'two'}"]))
    monkeypatch.setattr(denoise, "denoise", run_and_remove)
    common = [f"--input_dir={tmp_path / 'one'}", "--num_inference_steps=1", *SIZES]
    with pytest.raises(RunError, match="two was removed"):
        stage2.run(stage2.parse_arguments([*common, f"--output_dir={tmp_path / 'two'}"]))
