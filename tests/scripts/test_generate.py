"""generate.py: arguments from a file, several seeds and prompts as a batch makes them."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import generate
import stage2_transformer as stage2
from jobs.records import read_batch
from jobs.superseded import find_superseded
from runtime.exit_codes import run_main
from stages import files
from tests.tiny_models import save_tiny_model

# On one device: two programs with collectives at once can block eight devices of two cores.
SMALL = ["--dtype=float32", "--allow_unsupported", "--steps=2", "--height=32", "--width=32"]
SMALL += ["--dp=1", "--sp=1", "--tp=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "night.json"
    settings = {"prompt": "A red kite", "steps": 30, "size": "768x1360", "seed": 3}
    path.write_text(json.dumps(settings | {"use_dynamic_cfg": True, "output_dir": "night"}))
    return path


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: generate.run(generate.parse_arguments(list(map(str, arguments)))))
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("script", [generate, stage2])
def test_short_names_of_arguments(script):
    prompt = ["--prompt=a"] if script is generate else []
    short = ["--steps=7", "--guidance=2.5", "--frames=9"]
    long = ["--num_inference_steps=7", "--guidance-scale=2.5", "--num-frames=9"]
    both = [script.parse_arguments([*prompt, *words]) for words in (short, long)]
    assert both[0] == both[1]
    assert (both[0].num_inference_steps, both[0].guidance_scale, both[0].num_frames) == (7, 2.5, 9)


def test_a_config_file_gives_arguments_and_the_command_line_wins(config):
    plain = generate.parse_arguments([f"--config={config}"])
    assert plain.prompt == ["A red kite"] and plain.output_dir == Path("night")
    assert (plain.num_inference_steps, plain.height, plain.width) == (30, 768, 1360)
    assert (plain.seed, plain.use_dynamic_cfg, plain.dtype) == (3, True, "bfloat16")

    words = ["--config", str(config), "--prompt", "A blue kite", "--steps", "7", "--seeds", "1-4"]
    changed = generate.parse_arguments([*words, "--output-dir=o", "--dtype=float32"])
    assert changed.prompt == ["A blue kite"] and changed.output_dir == Path("o")
    assert (changed.num_inference_steps, changed.height) == (7, 768)
    assert (changed.seeds, changed.seed, changed.dtype) == ("1-4", 42, "float32")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": "a", "step": 3}, "unknown key 'step'; known: allow_unsupported, attention, "),
        ({"prompt": "a", "steps": "3"}, 'num_inference_steps is "3", not an integer'),
        ({"prompt": "a", "steps": 0}, "night.json: argument --num_inference_steps"),
        ({"prompt": "a", "dtype": "float16"}, "float16"),
        ({"prompt": "a", "model_id": False}, "model_id is false; it is no switch"),
        ({"prompt": "a", "model_id": ["m"]}, 'model_id is ["m"], not a single value'),
        ({"prompt": "a", "seed": 1, "seeds": "1-2"}, "--seed and --seeds are both given"),
        ({"prompt": "a", "seeds": "4-1"}, "neither a range"),
        ({"prompt": "a", "config": "x"}, "unknown key 'config'"),
        ({}, "there is no --prompt"),
        ([], "not a JSON object"),
    ],
)
def test_a_wrong_config_file(settings, said, config, capsys):
    config.write_text(json.dumps(settings))
    assert said in refusal(capsys, "--config", config)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"prompt": "caf\xe9"}'])
def test_a_damaged_config_file(content, config, capsys):
    config.write_bytes(content)
    assert str(config) in refusal(capsys, "--config", config)
    config.unlink()
    assert str(config) in refusal(capsys, "--config", config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no --prompt"),
        (["--prompt=a", "--prompts_file=b"], "--prompt and --prompts_file are both given"),
        (["--prompt=a", "--seed=1", "--seeds=2-3"], "--seed and --seeds are both given"),
        (["--prompt=a", "--seeds=3-2"], "'3-2' is neither a range"),
        (["--prompt=a", "--seeds=1,x"], "'1,x' is neither a range"),
        (["--prompt=a", "--seeds=1-99999999"], "neither a range"),
        (["--prompt=a", "--seeds=1-2", "--output_video=a.mp4"], "--output_video is for one video"),
        (["--prompt=", "--seeds=1-2"], "--prompt '': --prompt is empty"),
        (["--prompt=a", "--seeds=1-2", "--height=7"], "--height 7"),
        (["--prompts_file=no.txt"], "cannot read no.txt"),
    ],
)
def test_refused_arguments(arguments, said, model, tmp_path, capsys):
    where = [f"--model_id={model}", f"--output_dir={tmp_path / 'out'}"]
    assert said in refusal(capsys, *where, *arguments)
    assert not (tmp_path / "out").exists()


def run(model: Path, folder: Path, *more: str) -> None:
    where = [f"--model_id={model}", f"--output_dir={folder}"]
    generate.run(generate.parse_arguments([*where, *SMALL, *more]))


def latents(folder: Path) -> bytes:
    return load_file(folder / files.LATENTS_FILE)["latents"].tobytes()


def test_seeds_make_the_videos_of_lone_runs_and_resume(model, tmp_path, capsys):
    run(model, tmp_path / "lone", "--prompt=A red kite", "--seed=2")
    many = tmp_path / "many"
    run(model, many, "--prompt=A red kite", "--seeds=1-2")
    said = capsys.readouterr().out
    states = {state.job.settings.seed: state for state in read_batch(many)}
    assert states.keys() == {1, 2} and all(s.status == "done" for s in states.values())
    assert latents(states[2].folder) == latents(tmp_path / "lone")
    assert latents(states[1].folder) != latents(tmp_path / "lone")
    assert f"video: {states[2].folder / files.VIDEO_FILE} (seed 2)" in said
    assert f"gallery: {many / 'index.html'}" in said

    before = (states[1].folder / files.VIDEO_FILE).stat().st_mtime_ns
    run(model, many, "--prompt=A red kite", "--seeds=1,5")
    assert (states[1].folder / files.VIDEO_FILE).stat().st_mtime_ns == before
    # Other seeds of the same prompt supersede none of the earlier ones.
    assert len(read_batch(many)) == 3 and not find_superseded(many, read_batch(many))


def test_a_prompts_file(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("A red kite  # first\nA blue kite\n")
    run(model, tmp_path / "out", f"--prompts_file={tmp_path / 'prompts.txt'}", "--seeds=7")
    states = read_batch(tmp_path / "out")
    assert [state.job.prompt for state in states] == ["A red kite", "A blue kite"]
    assert [state.job.settings.seed for state in states] == [7, 7]
    assert all(state.status == "done" for state in states)
