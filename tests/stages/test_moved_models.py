"""Stage files continue with any copy of the model that made them, and with no other model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from stages import files as stage_files
from tests.tiny_models import save_tiny_model

SIZES = ["--height=32", "--width=48", "--num_frames=5", "--allow_unsupported"]
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Runs all stages with folder/model; returns folder, whose sub-folder `out` has the files."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(folder / "model")
    where = [f"--output_dir={folder / 'out'}", "--dtype=float32"]
    stage1.run(stage1.parse_arguments(["--prompt=A red cat", f"--model_id={model}", *where]))
    denoise(folder / "out")
    decode(folder / "out")
    return folder


@pytest.fixture
def moved(made, tmp_path) -> Iterator[Path]:
    """The files without the video, and the model elsewhere: the recorded path does not exist."""
    folder = Path(shutil.copytree(made, tmp_path / "elsewhere"))
    (folder / "out" / stage_files.VIDEO_FILE).unlink()
    made.joinpath("model").rename(made / "hidden")
    yield folder
    made.joinpath("hidden").rename(made / "model")


def denoise(folder: Path, *arguments: str) -> None:
    common = [f"--input_dir={folder}", "--dtype=float32", "--num_inference_steps=1", *SIZES]
    stage2.run(stage2.parse_arguments([*common, *arguments]))


def decode(folder: Path, *arguments: str) -> None:
    stage3.run(stage3.parse_arguments([f"--input_dir={folder}", "--dtype=float32", *arguments]))


def frames(folder: Path) -> bytes:
    """The encoded video; the settings in its tag name other paths."""
    from tests.fuzz.stages import packets

    return packets(folder / stage_files.VIDEO_FILE).encode()


def only_the_vae(model: Path) -> Path:
    for part in model.iterdir():
        if part.is_dir() and part.name != "vae":
            shutil.rmtree(part)
    return model


def through_a_link(model: Path) -> Path:
    link = model.with_name("link")
    link.symlink_to(model)
    return link


def in_shards(model: Path) -> Path:
    """The weights of the VAE in two files and an index, as large models come."""
    path = model / WEIGHTS["vae"]
    tensors = load_file(path)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, path.with_name(file))
    weight_map = {name: file for file, own in halves.items() for name in own}
    path.unlink()
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


@pytest.mark.parametrize("place", [lambda model: model, through_a_link, only_the_vae, in_shards])
def test_latents_decode_with_a_copy_elsewhere(place, moved, made):
    decode(moved / "out", f"--model_id={place(moved / 'model')}")
    assert frames(moved / "out") == frames(made / "out")


def test_embeddings_continue_with_a_copy_elsewhere(moved, made):
    shutil.rmtree(moved / "model/text_encoder")  # of stage 1 alone
    denoise(moved / "out", f"--model_id={moved / 'model'}")
    ours, theirs = (load_file(f / "out" / stage_files.LATENTS_FILE) for f in (moved, made))
    np.testing.assert_array_equal(ours["latents"], theirs["latents"])


def test_a_model_moved_and_its_path_recorded_anew_by_a_link(moved, made):
    """Without --model_id the recorded path counts; a link there leads to the copy."""
    made.joinpath("model").symlink_to(moved / "model")
    try:
        decode(moved / "out")
    finally:
        made.joinpath("model").unlink()
    assert frames(moved / "out") == frames(made / "out")


def change_weight(model: Path, part: str) -> None:
    """Changes one value in the middle of the largest tensor that the digest holds whole."""
    path = model / WEIGHTS[part]
    tensors = load_file(path)
    small = {name: tensor for name, tensor in tensors.items() if tensor.nbytes <= 16 << 10}
    name = max(small, key=lambda name: (small[name].size, name))
    changed = small[name].copy()
    changed.reshape(-1)[changed.size // 2] += 1e-3
    save_file({**tensors, name: changed}, path)


@pytest.mark.parametrize(("run", "part"), [(denoise, "transformer"), (decode, "vae")])
def test_a_changed_weight_is_refused(run, part, moved):
    change_weight(moved / "model", part)
    with pytest.raises(ValueError, match=f"was made with another {part} than that of"):
        run(moved / "out", f"--model_id={moved / 'model'}")
    assert not (moved / "out" / stage_files.VIDEO_FILE).exists()


def test_a_changed_weight_of_a_part_that_the_stage_does_not_load_is_allowed(moved, made):
    change_weight(moved / "model", "transformer")
    decode(moved / "out", f"--model_id={moved / 'model'}")
    assert frames(moved / "out") == frames(made / "out")


def test_a_moved_model_is_named_with_what_to_do(moved):
    with pytest.raises(ValueError, match="there is no such folder.*with --model_id"):
        decode(moved / "out")
