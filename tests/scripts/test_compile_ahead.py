"""compile_ahead.py makes executables that later processes run without compiling."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compile_ahead
import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
import utils
from cogvideox.model.folder import stored_tensors
from runtime.errors import InputError, RunError
from runtime.exit_codes import run_main
from stages import ahead
from stages.files import check_executables
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).parents[2]
SIZE = ("--height=64", "--width=80", "--num_frames=17")
FLOAT = "--dtype=float32"
ONE_DEVICE = ("--dp=1", "--tp=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def configs(model, tmp_path_factory) -> Path:
    """Copies only the model's JSON files."""
    folder = tmp_path_factory.mktemp("configs")
    for path in model.rglob("*.json"):
        (folder / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(model)).write_text(path.read_text())
    return folder


def compile_for(configs: Path, folder: Path, *arguments: str) -> None:
    where = ["--model_id", str(configs), "--executables", str(folder), FLOAT]
    where += ["--sizes", "64x80x17", "--frames", "float32", *arguments]
    compile_ahead.run(compile_ahead.parse_arguments(where))


def run_script(name: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / name, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_later_processes_compile_nothing_and_make_the_same_bits(model, configs, tmp_path, capsys):
    """Stage 2 and a decoder on eight devices, the other decoder on one, equal plain runs."""
    folder, plain = tmp_path / "executables", tmp_path / "plain"
    compile_for(configs, folder)
    compile_for(configs, folder, "--stages", "3", "--decoder", "flax", *ONE_DEVICE)
    texts = ["--prompt", "A red cat", "--model_id", str(model), "--output_dir", str(plain), FLOAT]
    stage1.run(stage1.parse_arguments(texts))
    steps = ["--input_dir", str(plain), *SIZE, FLOAT, "--num_inference_steps=2"]
    stage2.run(stage2.parse_arguments(steps))

    ahead = ("--executables", folder)
    out = run_script("stage2_transformer.py", *steps, "--output_dir", tmp_path / "ahead", *ahead)
    assert "stage2_transformer: executable " in out
    assert "stage 2: 0 compilations, 0 cache hits" in out
    expected, found = (
        stored_tensors(tmp_path / run)["latents"].read() for run in ("plain", "ahead")
    )
    np.testing.assert_array_equal(found, expected)

    for name, script, mesh in (
        ("vae_torchax", "stage3_vae_decoder", ()),
        ("vae_flax", "stage3_vae_decoder_flax", ONE_DEVICE),
    ):
        video = ["--input_dir", str(plain), FLOAT, *mesh, "--output_video"]
        stage3.run(
            stage3.parse_arguments([*video, str(plain / f"{name}.npy")]), name.removeprefix("vae_")
        )
        out = run_script(f"{script}.py", *video, tmp_path / f"{name}.npy", *ahead)
        assert f"{name}_first: executable " in out and f"{name}_later: executable " in out
        assert "stage 3: 0 compilations, 0 cache hits" in out
        expected, found = (np.load(run / f"{name}.npy") for run in (plain, tmp_path))
        np.testing.assert_array_equal(found, expected)


def test_several_sizes_share_a_folder_and_are_made_once(configs, tmp_path, capsys):
    sizes = ("--sizes", "64x80x17,64x80x33", "--allow_unsupported", "--stages", "2")
    for said in ("compiled in", "already there"):
        compile_for(configs, tmp_path, *sizes)
        assert capsys.readouterr().out.count(said) == 2
    assert len(list(tmp_path.glob("stage2_transformer-*.json"))) == 2


def test_the_encoder_that_is_compiled_ahead_is_that_of_stage_1(
    model, configs, tmp_path, monkeypatch
):
    class Asked(Exception):
        pass

    def ask(programs, folder, *, devices):
        raise Asked([program.manifest_name for program in programs], folder)

    size = ["--allow_unsupported", "--encoder=flax", FLOAT]
    arguments = compile_ahead.parse_arguments(
        [f"--model_id={configs}", "--stages=1", "--sizes=16x32x5", *size]
    )
    (target,) = ahead.make_targets(utils.options(ahead.AheadOptions, arguments))
    assert target.encoder is not None and target.denoiser is None
    names = [program.manifest_name for program in target.encoder.programs(target.encoded)]

    np.save(tmp_path / "video.npy", np.zeros((5, 20, 30, 3), np.uint8))
    monkeypatch.setattr("cogvideox.vae.encode.find_or_compile", ask)
    given = [f"--model_id={model}", f"--video={tmp_path / 'video.npy'}", "--encode_on=devices"]
    given += ["--prompt=A kite", "--height=16", "--width=32", f"--output_dir={tmp_path}"]
    with pytest.raises(Asked) as asked:
        stage1.run(stage1.parse_arguments([*given, *size, f"--executables={tmp_path}"]))
    assert asked.value.args == (names, tmp_path)


def test_a_plan_is_json_and_writes_nothing(configs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model_id", str(configs), FLOAT, "--plan", "--json", "--dp=2", "--tp=2"]
    arguments += ["--sizes", "64x80x17,64x80x33", "--allow_unsupported"]
    compile_ahead.run(compile_ahead.parse_arguments(arguments))
    plans = json.loads(capsys.readouterr().out)
    assert [plan["size"] for plan in plans] == ["64x80x17", "64x80x33"]
    for plan in plans:
        compiled, *derived = plan["step"]
        assert compiled["mesh"] == {"dp": 2, "sp": 1, "tp": 2} and compiled["fits"]
        assert compiled["source"] == "compiled"
        assert {row["source"] for row in derived} == {"derived"}
        for row in (compiled, *derived, plan["decode"]):
            hbm = row["hbm_bytes_per_chip"]
            assert hbm["total"] == sum(size for kind, size in hbm.items() if kind != "total")
            assert row["seconds"] is None  # no estimates for a CPU
    assert not list(tmp_path.iterdir())


def test_derived_weights_are_those_of_a_compiled_mesh(configs, capsys):
    def plan(*mesh: str) -> dict:
        arguments = ["--model_id", str(configs), FLOAT, "--plan", "--json", "--stages=2", *mesh]
        compile_ahead.run(compile_ahead.parse_arguments([*arguments, "--sizes", "64x80x17"]))
        return json.loads(capsys.readouterr().out)[0]

    derived = {str(row["mesh"]): row for row in plan("--dp=2", "--sp=2", "--tp=1")["step"]}
    compiled = plan("--dp=2", "--sp=1", "--tp=2")["step"][0]
    same = derived[str(compiled["mesh"])]
    assert (same["source"], compiled["source"]) == ("derived", "compiled")
    assert same["hbm_bytes_per_chip"]["weights"] == compiled["hbm_bytes_per_chip"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "64x80"], "64x80' is not height x width x frames"),
        (["--sizes", "64xax17"], "is not height x width x frames"),
        (["--sizes", "65x80x17"], "--height 65"),
        (["--stages", "4"], "'4' does not name some of 1, 2 and 3"),
        (["--stages", "2,"], "does not name some of 1, 2 and 3"),
        (["--stages", "1", "--plan"], "leave 1 out"),
        (["--topology", "v9"], "invalid choice: 'v9'"),
        (["--plan", "--push", "x"], "--plan writes nothing"),
        (["--json"], "--json and --compile_all are for --plan"),
        (["--dp", "3"], "--dp 3"),
        (["--attention", "splash"], "needs a TPU"),
    ],
)
def test_bad_input_is_one_line(arguments, said, configs, tmp_path, capsys):
    def main():
        where = ["--model_id", str(configs), "--executables", str(tmp_path), FLOAT]
        compile_ahead.run(compile_ahead.parse_arguments([*where, *arguments]))

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert said in message


def test_a_read_only_folder_is_refused_before_anything_is_compiled(
    configs, tmp_path, capsys, monkeypatch
):
    # Whoever runs as root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="not writable"):
        compile_for(configs, tmp_path)


def test_artifacts_are_pushed_and_pulled_without_compiling(configs, tmp_path, capsys):
    compile_for(configs, tmp_path / "mine", "--stages", "2", "--push", str(tmp_path / "shared"))
    assert "pushed 1 artifacts" in capsys.readouterr().out
    where = ["--executables", str(tmp_path / "other"), "--pull", str(tmp_path / "shared")]
    compile_ahead.run(compile_ahead.parse_arguments(where))
    assert "pulled 1 artifacts" in capsys.readouterr().out
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("mine", "other")]
    assert names[0] == names[1]
    with pytest.raises(InputError, match="nowhere is not a folder"):
        where = ["--executables", str(tmp_path), "--pull", str(tmp_path / "nowhere")]
        compile_ahead.run(compile_ahead.parse_arguments(where))


@pytest.mark.parametrize(
    ("there", "said"), [(False, "is not a folder"), (True, "holds no executables")]
)
def test_pushing_nothing_is_an_error(there, said, tmp_path):
    folder = tmp_path / "mine"
    if there:
        folder.mkdir()
    where = ["--executables", str(folder), "--push", str(tmp_path / "shared")]
    with pytest.raises(InputError, match=said):
        compile_ahead.run(compile_ahead.parse_arguments(where))
    assert not (tmp_path / "shared").exists()


def test_pushing_to_a_hub_out_of_reach_is_one_line(configs, tmp_path, capsys):
    compile_for(configs, tmp_path, "--stages", "2")
    done = subprocess.run(
        [sys.executable, ROOT / "compile_ahead.py", "--executables", tmp_path]
        + ["--push", "hf://owner/repository"],
        env=os.environ | {"HF_ENDPOINT": "http://localhost:9", "HF_TOKEN": "none"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("failed: cannot reach hf://owner/repository: ")
    assert done.stderr.count("\n") == 1


def test_a_folder_removed_while_compiling_is_an_error(configs, tmp_path, monkeypatch):
    """The next program would make it again, without the earlier programs."""
    from runtime import executables

    folder, compile_into = tmp_path / "executables", executables.compile_into

    def remove_between(*arguments, **options):
        if folder.exists():
            shutil.rmtree(folder)
        return compile_into(*arguments, **options)

    monkeypatch.setattr(executables, "compile_into", remove_between)
    sizes = ("--sizes", "64x80x17,64x80x33", "--allow_unsupported", "--stages", "2")
    with pytest.raises(RunError, match="was removed or changed while this ran"):
        compile_for(configs, folder, *sizes)


def test_the_examples_of_the_help_are_complete(configs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        compile_ahead.parse_arguments(["--help"])
    text = capsys.readouterr().out.partition("examples:\n")[2]
    examples = [shlex.split(line) for line in text.splitlines() if line.strip()]
    assert len(examples) == 4
    monkeypatch.setattr(ahead, "make_targets", lambda _: ["target"])
    monkeypatch.setattr(ahead, "plan_sizes", lambda *_: [])
    monkeypatch.setattr(ahead, "folder_digest", lambda _: "")
    monkeypatch.setattr(ahead, "compile_sizes", lambda *_: None)
    (tmp_path / "executables").mkdir()
    for _, script, *arguments in examples:
        assert script == "compile_ahead.py"
        if "--plan" in arguments:
            arguments.append("--json")  # there is nothing to tabulate
        compile_ahead.run(compile_ahead.parse_arguments(arguments))


@pytest.fixture
def other_write(tmp_path) -> Path:
    """Makes a folder that everybody can write, in one that everybody can enter."""
    folder = Path(os.path.realpath("/tmp")) / f"shared-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def test_stages_take_a_shared_folder_by_its_digest_only(model, configs, other_write, tmp_path):
    mine = tmp_path / "mine"
    compile_for(configs, mine, "--stages", "2", "--push", str(other_write))
    digest = ahead.folder_digest(mine)
    texts = ["--prompt", "A red cat", "--model_id", str(model), "--output_dir", str(tmp_path)]
    stage1.run(stage1.parse_arguments([*texts, FLOAT]))
    steps = ["--input_dir", str(tmp_path), *SIZE, FLOAT, "--num_inference_steps=2"]
    steps += ["--executables", str(other_write)]
    with pytest.raises(InputError, match="can be written by everybody"):
        stage2.run(stage2.parse_arguments(steps))
    with pytest.raises(InputError, match="of --trust_executables"):
        stage2.run(stage2.parse_arguments([*steps, "--trust_executables", "0" * 64]))
    out = run_script("stage2_transformer.py", *steps, "--trust_executables", digest)
    assert "stage2_transformer: executable " in out


def test_a_second_run_without_guidance_compiles_nothing(model, tmp_path):
    texts = ["--prompt", "A red cat", "--model_id", str(model), "--output_dir", str(tmp_path)]
    stage1.run(stage1.parse_arguments([*texts, FLOAT]))
    steps = ["--input_dir", tmp_path, *SIZE, FLOAT, "--num_inference_steps=2"]
    steps += ["--guidance_scale=1"]
    # A private cache: programs from JAX's cache are not kept on a CPU.
    environment = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    first, second = (run_script("stage2_transformer.py", *steps, **environment) for _ in range(2))
    assert "stage 2: 0 compilations" not in first and "cannot keep" not in first
    assert "stage 2: 0 compilations, 0 cache hits" in second


def test_a_stage_refuses_a_folder_that_is_none(tmp_path, capsys):
    arguments = stage2.parse_arguments(["--executables", str(tmp_path / "none")])
    assert str(arguments.executables).endswith("none")
    with pytest.raises(ValueError, match="none is not a folder"):
        check_executables(arguments.executables)


FINGERPRINTS = """
import json, sys
import compile_ahead, utils
from stages import ahead
found = {}
for extra in json.loads(sys.argv[2]):
    arguments = ["--model_id", sys.argv[1], "--topology", "v6e-8", "--plan", *extra]
    arguments = compile_ahead.parse_arguments(arguments)
    (target,) = ahead.make_targets(utils.options(ahead.AheadOptions, arguments))
    decoder = target.decoder.programs(target.latents, output=arguments.frames)
    programs = [target.denoiser.program, *decoder]
    found[" ".join(extra)] = {program.name: program.fingerprint for program in programs}
    # The tiles of the TPU's kernel have a field of their own, so that a message can name them.
    tiles = programs[0].fields["block_sizes"].keys()
    splash = target.denoiser.backend.name == "splash"
    assert tiles == ({"block_q", "block_kv", "chunk", "unroll"} if splash else set())
print(json.dumps(found))
"""


def test_fingerprints_for_a_tpu_are_the_same_in_every_process_and_differ_with_the_request(configs):
    variants = [
        ["--sizes=64x80x17"],
        ["--sizes=64x80x17", "--decoder=flax"],
        ["--sizes=80x64x17", "--allow_unsupported"],
        ["--sizes=64x80x17", "--dp=1", "--sp=2", "--tp=1"],
        ["--sizes=64x80x17", "--unguided"],
        ["--sizes=64x80x17", "--batch=2"],
        ["--sizes=64x80x17", "--attention=reference"],
        ["--sizes=64x80x17", "--max_sequence_length=8", "--allow_unsupported"],
        ["--sizes=64x80x17", "--frames=float32"],
        # Must be last: it sets the precision of the process.
        ["--sizes=64x80x17", "--dtype=float32"],
    ]
    both = [
        subprocess.run(
            [sys.executable, "-c", FINGERPRINTS, str(configs), json.dumps(variants)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]
    assert both[0] == both[1]
    found = json.loads(both[0])
    base = found["--sizes=64x80x17"]
    decoder_only, step_only = {"--decoder", "--frames"}, {"--unguided", "--attention", "--max_seq"}
    for variant, programs in list(found.items())[1:]:
        changed = {name for name, print_ in programs.items() if base.get(name) != print_}
        if any(flag in variant for flag in decoder_only):
            assert "stage2_transformer" not in changed and len(changed) == 2, variant
        elif any(flag in variant for flag in step_only):
            assert changed == {"stage2_transformer"}, variant
        else:
            assert "stage2_transformer" in changed, variant
            assert len(changed) == 3 or "--dp" in variant, variant


def test_lossy_programs_are_compiled_ahead(model, configs, tmp_path):
    """near covers every mask; turbo also covers sparse steps, gated or not."""
    folder, mask = tmp_path / "executables", tmp_path / "mask.json"
    compile_for(configs, folder, "--stages=2", "--speed=exact,near,turbo")
    assert len(list(folder.glob("stage2_transformer*.json"))) == 9
    mask.write_text('{"steps": "1101"}')
    texts = ["--prompt", "A red cat", "--model_id", str(model), "--output_dir", str(tmp_path)]
    stage1.run(stage1.parse_arguments([*texts, FLOAT]))
    steps = ["--input_dir", tmp_path, *SIZE, FLOAT, "--num_inference_steps=4"]
    steps += ["--executables", folder]
    for lossy in ([], ["--step_mask", mask], ["--speed=turbo"]):
        out = run_script("stage2_transformer.py", *steps, *lossy)
        assert "stage 2: 0 compilations, 0 cache hits" in out
        assert ("lossy: " in out) == bool(lossy)


def test_a_speed_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        compile_ahead.parse_arguments(["--speed", "exact,quick"])
    assert "'quick' is not one of exact, near, fast, turbo" in capsys.readouterr().err
