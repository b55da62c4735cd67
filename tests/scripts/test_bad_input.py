"""Bad input ends with exit code 2 and one clear line, before any weight is read."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

import generate
import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from cogvideox.model.folder import find_model
from runtime.exit_codes import run_main
from stages import denoise, sections
from stages import files as stage_files
from tests.lora_files import random_factors, write_lora
from tests.tiny_models import save_tiny_model

PROMPT = ["--prompt", "A red cat"]
_NEEDED = {
    *("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers"),
    *("time_embed_dim", "text_embed_dim", "use_rotary_positional_embeddings"),
    *("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "good")
    save_tiny_model(folder / "other", seed=1)
    return folder


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    """Makes the stage files of a good run of stages 1 and 2."""
    folder = tmp_path_factory.mktemp("finished")
    model = ["--model_id", str(models / "good")]
    stage1.run(stage1.parse_arguments([*PROMPT, *model, "--output_dir", str(folder)]))
    arguments = ["--input_dir", str(folder), "--num_inference_steps", "1"]
    stage2.run(stage2.parse_arguments(arguments))
    return folder


@pytest.fixture
def files(finished, tmp_path) -> Path:
    """Copies the stage files, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "files"))


@pytest.fixture(autouse=True)
def no_weights_are_read(request, monkeypatch):
    """Fails the test if a weight is read."""
    request.getfixturevalue("finished")

    def refuse(*_, **__):
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr("cogvideox.model.folder.StoredTensor.mapped", refuse)
    monkeypatch.setattr("cogvideox.text.encoder.load_text_encoder", refuse)
    monkeypatch.setattr("cogvideox.vae.decode.Decoder.load", refuse)


def refusal(capsys, stage, *arguments: object) -> str:
    """Runs a stage's main; returns its one line on stderr."""

    def main():
        parsed = stage.parse_arguments(list(map(str, arguments)))
        stage.run(parsed)

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height", 7], "--height 7"),
        (["--height", 0], "--height 0"),
        (["--width", 81], "nearest: 80"),
        (["--width", -80], "--width -80"),
        (["--height", 96, "--width", 96], "--allow_unsupported"),
        (["--num_frames", 0], "--num_frames 0"),
        (["--num_frames", 10], "nearest: 1 or 17"),
        (["--num_frames", 10, "--allow_unsupported"], "nearest: 9 or 13"),
        (["--num_frames", 177], "up to 161"),
        (["--num_inference_steps", 0], "--num_inference_steps"),
        (["--num_inference_steps", 1001], "1000"),
        (["--num_inference_steps", "many"], "not an integer"),
        (["--guidance_scale", "nan"], "from 0 to 1000"),
        (["--guidance_scale", -1], "--guidance_scale"),
        (["--seed", -1], "--seed"),
        (["--fps", 0], "--fps"),
        (["--dp", 3], "dp x sp x tp that fit: 2x2x1, 2x1x2, 2x1x1"),
        (["--tp", 4], "2 heads"),
        (["--dp", 2, "--tp", 16], "8 device(s)"),
        (["--attention", "splash"], "needs a TPU"),
        (["--attention", "cudnn"], "needs a GPU"),
        (["--dtype", "float16"], "float16"),
        (["--model_id", "no/such-model"], "no/such-model"),
        (["--no_such_option"], "--no_such_option"),
    ],
)
def test_stage2_settings(arguments, said, files, capsys):
    assert said in refusal(capsys, stage2, "--input_dir", files, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "   "], "--prompt is empty"),
        ([], "--prompt"),
        (["--prompt", "A", "red", "cat"], "red cat"),
        ([*PROMPT, "--max_sequence_length", 0], "--max_sequence_length"),
        ([*PROMPT, "--max_sequence_length", 500], "take 16, or allow any with --allow_unsupported"),
        (["--prompt", "\udcff"], "UTF-8"),
    ],
)
def test_stage1_settings(arguments, said, models, tmp_path, capsys):
    where = ["--model_id", models / "good", "--output_dir", tmp_path / "out"]
    assert said in refusal(capsys, stage1, *where, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ("absent.safetensors", "--lora absent.safetensors: there is no such file"),
        ("./absent", "--lora ./absent: there is no such file"),
        ("~nobody-here/a", "nobody-here"),
        ("=0.5", "names no file"),
        ("good.safetensors=nan", "the weight must be from -100 to 100"),
        ("good.safetensors=101", "the weight must be from -100 to 100"),
        ("bad.safetensors", "proj_out.lora_A.weight: there is no up factor beside it"),
        ("pickle.bin", "is a pickle, which can run code"),
        (".", "holds 2 .safetensors files (bad.safetensors, good.safetensors); name one"),
        ("empty", "holds 0 .safetensors files (none); name one"),
        ("good.safetensors:1", "there is no such file"),
        ("some..where:a.safetensors", "it is no hub id"),
    ],
)
def test_loras(lora, said, files, models, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "loras"
    good = random_factors(models / "good", ["proj_out"], 2)
    write_lora(folder / "good.safetensors", good)
    save_file({"proj_out.lora_A.weight": good["proj_out"][0]}, folder / "bad.safetensors")
    (folder / "pickle.bin").write_bytes(b"PK\x03\x04 and more")
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder)
    assert said in refusal(capsys, stage2, "--input_dir", files, "--lora", lora)


def test_one_lora_twice(files, models, capsys):
    path = write_lora(files / "a.safetensors", random_factors(models / "good", ["proj_out"], 2))
    twice = ["--lora", path, "--lora", f"{shutil.copy(path, files / 'b.safetensors')}=2"]
    assert "is given twice" in refusal(capsys, stage2, "--input_dir", files, *twice)


def test_imports_count_as_phase_start(finished):
    phases = {1: ["start", "load", "run", "save"], 2: ["start", "load", "compile", "run", "save"]}
    for stage, expected in phases.items():
        timings = json.loads((finished / f"stage{stage}_timings.json").read_text())
        assert list(timings["seconds"]) == [*expected, "total"]
        assert timings["seconds"]["start"] > 0


def test_absent_model(tmp_path, capsys):
    where = ["--model_id", tmp_path / "absent", "--output_dir", tmp_path]
    assert "there is no such folder" in refusal(capsys, stage1, *PROMPT, *where)


@pytest.mark.parametrize("name", ["moved-model", "owner/moved-model"])
def test_a_moved_model_whose_name_could_be_a_hub_id(name, tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("Got: ConnectError: Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    said = refusal(capsys, stage1, *PROMPT, "--model_id", name, "--output_dir", tmp_path)
    assert f"{name}: there is no such folder, the hub cannot be reached, and its cache" in said
    assert "(ConnectError: Name or service not known)" in said


@pytest.mark.parametrize("name", ["my model", "a--b", "owner/na..me", "-x"])
def test_a_name_that_is_no_hub_id(name, tmp_path, capsys):
    said = refusal(capsys, stage1, *PROMPT, f"--model_id={name}", "--output_dir", tmp_path)
    assert f"{name}: there is no such folder, and it is no hub id such as OWNER/NAME" in said
    assert "Repo id" not in said


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert "model_index.json" in refusal(capsys, stage1, *PROMPT, "--model_id", tmp_path)


def test_output_folder_that_is_a_file(models, tmp_path, capsys):
    (tmp_path / "file").touch()
    where = ["--model_id", models / "good", "--output_dir", tmp_path / "file"]
    assert "is a file" in refusal(capsys, stage1, *PROMPT, *where)


def test_a_config_that_is_a_folder(models, tmp_path, capsys):
    (tmp_path / stage_files.CONFIG_FILE).mkdir()
    where = ["--model_id", models / "good", "--output_dir", tmp_path]
    assert "generation_config.json is a folder" in refusal(capsys, stage1, *PROMPT, *where)


def section_of(files: Path, stage: str) -> dict:
    return json.loads((files / stage_files.CONFIG_FILE).read_text())[stage]


def edit(files: Path, stage: str, *, seal: bool = False, **settings) -> None:
    """Changes a section of the config by hand; `seal` makes it look as if the stage wrote it."""
    path = files / stage_files.CONFIG_FILE
    config = json.loads(path.read_text())
    section = config[stage] | settings
    if seal:
        kept = {k: v for k, v in section.items() if k not in ("fingerprint", "checksum")}
        made_with = kept.pop("made_with")
        section = sections.make_section(kept, **made_with)
    path.write_text(json.dumps(config | {stage: section}))


@pytest.mark.parametrize(
    ("stage", "name"), [(stage2, stage_files.EMBEDDINGS_FILE), (stage3, stage_files.LATENTS_FILE)]
)
class TestStageFiles:
    def test_missing(self, stage, name, files, capsys):
        (files / name).unlink()
        assert "does not exist" in refusal(capsys, stage, "--input_dir", files)

    def test_truncated(self, stage, name, files, capsys):
        data = (files / name).read_bytes()
        (files / name).write_bytes(data[: len(data) // 2])
        assert "truncated" in refusal(capsys, stage, "--input_dir", files)

    def test_empty(self, stage, name, files, capsys):
        (files / name).write_bytes(b"")
        assert "truncated" in refusal(capsys, stage, "--input_dir", files)

    def test_foreign(self, stage, name, files, capsys):
        save_file(load_file(files / name), files / name)
        assert "was not written by" in refusal(capsys, stage, "--input_dir", files)

    def test_other_format_version(self, stage, name, files, capsys, monkeypatch):
        monkeypatch.setattr(stage_files, "FORMAT_VERSION", "3")
        config = json.loads((files / stage_files.CONFIG_FILE).read_text())
        (files / stage_files.CONFIG_FILE).write_text(json.dumps(config | {"format_version": "3"}))
        assert "format version 2" in refusal(capsys, stage, "--input_dir", files)

    def test_no_config(self, stage, name, files, capsys):
        (files / stage_files.CONFIG_FILE).unlink()
        assert stage_files.CONFIG_FILE in refusal(capsys, stage, "--input_dir", files)

    def test_broken_config(self, stage, name, files, capsys):
        (files / stage_files.CONFIG_FILE).write_text("{")
        assert "not valid JSON" in refusal(capsys, stage, "--input_dir", files)

    def test_a_config_edited_by_hand(self, stage, name, files, capsys):
        edit(files, "stage1_text_encoder", prompt="A blue dog")
        said = refusal(capsys, stage, "--input_dir", files)
        assert "section stage1_text_encoder was changed" in said
        assert "run stage1_text_encoder.py again" in said

    def test_stale(self, stage, name, files, capsys):
        edit(files, "stage1_text_encoder", seal=True, prompt="A blue dog")
        edit(files, "stage2_transformer", seal=True, seed=7)
        said = refusal(capsys, stage, "--input_dir", files)
        made_by = sections.STAGES[stage is stage3]
        assert f"{name} is stale: {stage_files.CONFIG_FILE} beside it describes another run" in said
        assert f"run {made_by}.py again" in said

    def test_a_flipped_bit(self, stage, name, files, capsys):
        data = bytearray((files / name).read_bytes())
        data[-5] ^= 4
        (files / name).write_bytes(data)
        said = refusal(capsys, stage, "--input_dir", files)
        assert "its checksum does not match; run stage" in said

    @pytest.mark.parametrize("dtype", ["I16", "U16", "F16", "F32", "I32"])
    def test_a_relabelled_dtype(self, stage, name, files, capsys, dtype):
        data = (files / name).read_bytes()
        (files / name).write_bytes(data.replace(b'"BF16"', b'"%s"' % dtype.encode(), 1))
        said = refusal(capsys, stage, "--input_dir", files)
        assert f"run {sections.STAGES[stage is stage3]}.py again" in said

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
    def test_no_regular_file(self, stage, name, files, capsys, make):
        for damaged in (name, stage_files.CONFIG_FILE):
            (files / damaged).rename(files / "away")
            make(files / damaged)
            assert damaged in refusal(capsys, stage, "--input_dir", files)
            (files / damaged).rename(files / f"odd {damaged}")
            (files / "away").rename(files / damaged)

    def test_deep_config(self, stage, name, files, capsys):
        (files / stage_files.CONFIG_FILE).write_text("[" * 100_000)
        assert "nested deeper" in refusal(capsys, stage, "--input_dir", files)

    def test_of_another_model(self, stage, name, files, models, capsys):
        model = ["--model_id", models / "other"]
        said = refusal(capsys, stage, "--input_dir", files, *model)
        part = "transformer" if stage is stage2 else "vae"
        now = find_model(str(models / "other"), []).digest(part)
        was = find_model(str(models / "good"), []).digest(part)
        assert f"was made with another {part} than that of" in said
        assert f"its digest was {was}, now it is {now}" in said

    def test_of_a_model_that_is_gone(self, stage, name, files, models, capsys):
        edit(files, "stage1_text_encoder", seal=True, model_id="/gone/model")
        edit(files, "stage2_transformer", seal=True, model_id="/gone/model")
        said = refusal(capsys, stage, "--input_dir", files)
        assert "/gone/model: there is no such folder" in said and "with --model_id" in said


@pytest.fixture
def read_only(files, monkeypatch) -> Path:
    """A folder that takes no files; root may write to any folder, so its mode would not do."""
    access = os.access
    refuse = lambda path, mode: access(path, mode) and not (mode & os.W_OK and path == files)  # noqa: E731
    monkeypatch.setattr(os, "access", refuse)
    return files


def test_stage3_with_an_input_folder_that_is_read_only(read_only, tmp_path, capsys):
    """Its section of the config belongs into that folder, beside the latents."""
    video = ["--output_video", tmp_path / "elsewhere.mp4"]
    said = refusal(capsys, stage3, "--input_dir", read_only, *video)
    assert f"{read_only} is not writable" in said
    assert not (tmp_path / "elsewhere.mp4").exists()


def test_stage2_with_an_input_folder_that_is_read_only(read_only, tmp_path, capsys):
    assert f"{read_only} is not writable" in refusal(capsys, stage2, "--input_dir", read_only)
    where = ["--input_dir", read_only, "--output_dir", tmp_path / "elsewhere"]
    with pytest.raises(AssertionError, match="weights were read"):  # all checks have passed
        stage2.run(stage2.parse_arguments(list(map(str, where))))


def test_latents_whose_prompt_was_encoded_anew(files, capsys):
    edit(files, "stage1_text_encoder", seal=True, prompt="A blue dog")
    said = refusal(capsys, stage3, "--input_dir", files)
    assert "stage1_text_encoder.py ran again since; run stage2_transformer.py again" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output_video", "video.avi"], ".avi"),
        (["--quality", 11], "--quality"),
        (["--output_video", "video.npy", "--quality", 5], "--quality"),
        (["--dp", 4, "--tp", 4], "16 devices"),
    ],
)
def test_stage3_settings(arguments, said, files, capsys):
    assert said in refusal(capsys, stage3, "--input_dir", files, *arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("proj_out.bias"), "missing proj_out.bias"),
        (lambda w: w.update(stranger=w["proj_out.bias"]), "extra stranger"),
        (lambda w: w.update({"proj_out.bias": w["norm_final.bias"]}), "proj_out.bias is ["),
    ],
)
def test_transformer_weights_that_do_not_fit(change, said, models, files, tmp_path, capsys):
    with_weights(models, files, tmp_path, change)
    assert said in refusal(capsys, stage2, "--input_dir", files)


def test_truncated_transformer_weights(models, files, tmp_path, capsys):
    weights = with_weights(models, files, tmp_path, lambda w: None)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "damaged" in refusal(capsys, stage2, "--input_dir", files)


def test_truncated_vae_weights(models, finished, tmp_path, capsys):
    model = Path(shutil.copytree(models / "good", tmp_path / "model"))
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    where = ["--model_id", model, "--output_dir", tmp_path / "out"]
    assert "damaged" in refusal(capsys, generate, *PROMPT, *where)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_integers_are_no_weights(name, models, tmp_path, capsys):
    """A relabelled dtype of the same size fits every shape."""
    model = Path(shutil.copytree(models / "good", tmp_path / "model"))
    content = (model / name).read_bytes()
    (model / name).write_bytes(content.replace(b'"F32"', b'"I32"', 1))
    where = ["--model_id", model, "--output_dir", tmp_path / "out"]
    assert "is of dtype int32, not a floating-point one" in refusal(
        capsys, generate, *PROMPT, *where
    )


def test_text_encoder_that_transformers_would_fill_up(models, tmp_path, capsys):
    model = Path(shutil.copytree(models / "good", tmp_path / "model"))
    config = model / "text_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    where = ["--model_id", model, "--output_dir", tmp_path / "out"]
    assert "missing encoder.block.2" in refusal(capsys, stage1, *PROMPT, *where)


def test_configs_from_before_a_key_existed(models, tmp_path):
    """A config may lack patch_size_t; diffusers' default is used."""
    folder = save_tiny_model(tmp_path, "1.0-rope")
    for part in ("transformer", "vae"):
        config = folder / part / "config.json"
        values = json.loads(config.read_text())
        kept = {k: v for k, v in values.items() if k.startswith("_") or k in _NEEDED}
        config.write_text(json.dumps(kept))
    checked = denoise.check(
        denoise.DenoiseOptions(tmp_path, tmp_path, "float32", seed=0, allow_unsupported=True),
        find_model(str(folder), ["transformer"]),
        batch=1,
        tokens=226,
    )
    assert checked.denoiser.config.patch_size_t is None


def test_image_to_video_model(models, files, tmp_path, capsys):
    config = with_weights(models, files, tmp_path, lambda w: None).with_name("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 16}))
    assert "image-to-video" in refusal(capsys, stage2, "--input_dir", files)


def test_generate_refuses_for_every_stage(models, tmp_path, capsys):
    where = ["--model_id", models / "good", "--output_dir", tmp_path]
    assert "--height 7" in refusal(capsys, generate, *PROMPT, *where, "--height", 7)
    assert ".avi" in refusal(capsys, generate, *PROMPT, *where, "--output_video", "x.avi")
    assert not any(tmp_path.iterdir())


def with_weights(models: Path, files: Path, tmp_path: Path, change) -> Path:
    """Copies the good model with changed transformer weights; the stage files name the copy."""
    model = Path(shutil.copytree(models / "good", tmp_path / "model"))
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    section = section_of(files, "stage1_text_encoder")
    edit(files, "stage1_text_encoder", seal=True, model_id=str(model), made_with={})
    assert section_of(files, "stage1_text_encoder")["fingerprint"] == section["fingerprint"]
    return weights
