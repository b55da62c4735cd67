"""Errors in job files name their line before work starts; valid files are read correctly."""

import json
import os
from pathlib import Path

import pytest

import batch
import utils
from jobs.batch import read_jobs
from jobs.jobfile import LineSettings, read_job_file
from jobs.options import BatchOptions
from runtime.exit_codes import run_main

MODEL = Path(__file__).parents[2] / "models/toyworld"
GOOD = {"prompt": "A red kite"}


def j(**settings) -> str:
    return json.dumps(GOOD | settings)


def lines(*texts: str) -> bytes:
    return "\n".join(texts).encode()


# File name, content, the wrong line (None: the complete file), part of the message.
MALFORMED = [
    ("empty.jsonl", b"", None, "holds no job"),
    ("blank.jsonl", b"\n \n\n", None, "holds no job"),
    ("comments.txt", b"# nothing\n#\n", None, "holds no job"),
    ("cut.jsonl", lines(j(), '{"prompt": "cut'), 2, "not valid JSON"),
    ("list.jsonl", b'["A red kite"]', 1, "not a JSON object"),
    ("string.jsonl", b'"A red kite"', 1, "not a JSON object"),
    ("null.jsonl", b"null", 1, "not a JSON object"),
    ("prompts.jsonl", b"A red kite", 1, "not valid JSON"),
    ("json.txt", j().encode(), 1, "looks like JSON"),
    ("two_objects.jsonl", (j() + j(seed=1)).encode(), 1, "not valid JSON"),
    ("not_utf8.jsonl", b'{"prompt": "caf\xe9"}', 1, "not valid UTF-8"),
    ("utf16.txt", "A red kite".encode("utf-16"), 1, "not valid UTF-8"),
    ("surrogate.jsonl", b'{"prompt": "\\ud800"}', 1, "not valid UTF-8"),
    ("nul.jsonl", b'{"prompt": "a\\u0000b"}', 1, "NUL"),
    ("nul_byte.txt", b"a\0b", 1, "NUL"),
    ("huge_line.jsonl", lines(j(), j(prompt="x" * 300_000)), 2, "KiB long"),
    ("long_prompt.txt", b"x" * 20_001, 1, "20,000"),
    ("long_negative.jsonl", j(negative_prompt="x" * 20_001).encode(), 1, "20,000"),
    ("deep.jsonl", b'{"prompt":' + b"[" * 100_000, 1, "nested too deep"),
    ("nan.jsonl", lines(j(), j(guidance_scale=float("nan"))), 2, "NaN"),
    ("infinity.jsonl", lines(j(guidance_scale=float("inf"))), 1, "Infinity"),
    ("overflow.jsonl", b'{"prompt": "a", "guidance_scale": 1e999}', 1, "guidance_scale"),
    ("digits.jsonl", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 1, "integer"),
    ("large.jsonl", j(height=10**30).encode(), 1, "height"),
    ("unknown.jsonl", lines(j(), j(promt="x")), 2, "unknown key 'promt'"),
    ("twice.jsonl", b'{"prompt": "a", "prompt": "b"}', 1, "given twice"),
    ("no_prompt.jsonl", b'{"seed": 1}', 1, "no prompt"),
    ("empty_prompt.jsonl", b'{"prompt": "  "}', 1, "empty"),
    ("prompt_number.jsonl", b'{"prompt": 5}', 1, "not a string"),
    ("null_seed.jsonl", j(seed=None).encode(), 1, "seed is null"),
    ("text_seed.jsonl", j(seed="1").encode(), 1, "not an integer"),
    ("true_seed.jsonl", j(seed=True).encode(), 1, "not an integer"),
    ("fraction.jsonl", j(seed=1.5).encode(), 1, "not an integer"),
    ("negative_seed.jsonl", j(seed=-1).encode(), 1, "--seed"),
    ("large_seed.jsonl", j(seed=2**64).encode(), 1, "--seed"),
    ("both_seeds.jsonl", j(seed=1, seeds=[2]).encode(), 1, "both"),
    ("no_seeds.jsonl", j(seeds=[]).encode(), 1, "seeds"),
    ("bad_range.jsonl", j(seeds="4-1").encode(), 1, "seeds"),
    ("many_seeds.jsonl", j(seeds="0-99999999").encode(), 1, "seeds"),
    ("repeated_seed.jsonl", j(seeds=[3, 3]).encode(), 1, "the same video"),
    ("text_in_seeds.jsonl", j(seeds=[1, "2"]).encode(), 1, "seeds"),
    ("bool_text.jsonl", j(use_dynamic_cfg="yes").encode(), 1, "true or false"),
    ("scheduler.jsonl", j(scheduler="euler").encode(), 1, "euler"),
    ("size.jsonl", j(size="big").encode(), 1, "HEIGHTxWIDTH"),
    ("size_twice.jsonl", j(size="96x160", height=96).encode(), 1, "already"),
    ("steps_twice.jsonl", j(steps=3, num_inference_steps=3).encode(), 1, "the same setting"),
    ("height.jsonl", lines(j(), j(height=97)), 2, "nearest: 96"),
    ("frames.jsonl", j(frames=18).encode(), 1, "nearest: 17"),
    ("steps.jsonl", j(steps=1001).encode(), 1, "1000"),
    ("guidance.jsonl", j(guidance=-1).encode(), 1, "--guidance_scale"),
    ("fps.jsonl", j(fps=0).encode(), 1, "--fps"),
    ("quality.jsonl", j(quality=11).encode(), 1, "--quality"),
    ("escape.jsonl", j(name="../../escape").encode(), 1, "name"),
    ("absolute.jsonl", j(name="/tmp/x").encode(), 1, "name"),
    ("dots.jsonl", j(name="..").encode(), 1, "name"),
    ("backslash.jsonl", j(name="a\\b").encode(), 1, "name"),
    ("name_nul.jsonl", j(name="a\0").encode(), 1, "name"),
    ("name_number.jsonl", j(name=7).encode(), 1, "name"),
    ("name_long.jsonl", j(name="n" * 65).encode(), 1, "name"),
    ("name_newline.jsonl", j(name="a\n").encode(), 1, "name"),
    ("name_twice.jsonl", lines(j(name="kite"), j(name="Kite", seed=1)), 2, "line 1"),
    ("same.jsonl", lines(j(), "", j()), 3, "the same video as that of line 1"),
    ("same.txt", b"A red kite\n\nA red kite\r\n", 3, "the same video as that of line 1"),
    ("option.jsonl", j(output_dir="/tmp").encode(), 1, "unknown key 'output_dir'"),
]


@pytest.mark.parametrize(
    ("name", "content", "line", "said"), MALFORMED, ids=[case[0] for case in MALFORMED]
)
def test_malformed_files(name, content, line, said, tmp_path: Path, capsys):
    jobs, output_dir = tmp_path / name, tmp_path / "out"
    jobs.write_bytes(content)
    error = refusal(capsys, jobs, output_dir)
    if line is not None:
        assert f"{name}:{line}: " in error
        assert error.splitlines()[-1].endswith("nothing was done")
    assert said in error
    assert list(tmp_path.iterdir()) == [jobs]


def refusal(capsys, jobs: Path, output_dir: Path, *more: str) -> str:
    def main():
        where = [str(jobs), f"--output_dir={output_dir}", f"--model_id={MODEL}"]
        batch.run(batch.parse_arguments([*where, *more]))

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_every_problem_is_said_at_once(tmp_path: Path, capsys):
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_bytes(lines(j(seed=-1), j(), "{", j(height=97)))
    error = refusal(capsys, jobs, tmp_path / "out")
    assert all(f"jobs.jsonl:{line}: " in error for line in (1, 3, 4)) and ":2:" not in error
    assert "3 line(s)" in error


def test_files_that_cannot_be_read(tmp_path: Path, capsys):
    assert "No such file" in refusal(capsys, tmp_path / "absent.jsonl", tmp_path / "out")
    assert "is a folder" in refusal(capsys, tmp_path, tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is a named pipe" in refusal(capsys, tmp_path / "pipe.txt", tmp_path / "out")


def test_what_does_not_fit_the_batch(tmp_path: Path, capsys):
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("A red kite")
    out = tmp_path / "out"
    assert "--only blue*" in refusal(capsys, jobs, out, "--only=blue*")
    assert "lack the files of earlier stages" in refusal(capsys, jobs, out, "--stages=3")
    assert "--mirror" in refusal(capsys, jobs, out, "--mirror=gs://bucket")
    assert "nope" in refusal(capsys, jobs, out, "--mirror=nope://bucket")
    assert "2,1" in refusal(capsys, jobs, out, "--stages=2,1")
    assert not out.exists()


def read(tmp_path: Path, name: str, content: bytes, *more: str) -> list:
    (tmp_path / name).write_bytes(content)
    where = [str(tmp_path / name), f"--output_dir={tmp_path}", f"--model_id={MODEL}"]
    arguments = batch.parse_arguments([*where, *more])
    options = utils.options(BatchOptions, arguments)
    _, jobs = read_jobs(options, utils.line_parser(LineSettings, arguments))
    return jobs


def test_text_files_hold_prompts(tmp_path: Path):
    content = "\ufeff# colours\nA red kite\r\n\n  Ein grüner Drachen 🪁 \n".encode()
    jobs = read(tmp_path, "jobs.txt", content, "--seed=0", "--negative_prompt=blur")
    assert [job.prompt for job in jobs] == ["A red kite", "Ein grüner Drachen 🪁"]
    assert [job.line for job in jobs] == [2, 4]
    assert {(job.settings.seed, job.negative_prompt) for job in jobs} == {(0, "blur")}


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("A red kite  # take two", "A red kite"),
        ("A red kite #", "A red kite"),
        ("A kite\t#\tlater", "A kite"),
        ("Take #2 of a kite", "Take #2 of a kite"),
        ("A kite in C#", "A kite in C#"),
        ("# A kite", None),
        ("#A kite", None),
    ],
)
def test_comments_in_text_files(line, prompt, tmp_path: Path):
    (tmp_path / "p.txt").write_text(f"First\n{line}\n")
    lines, problems = read_job_file(
        tmp_path / "p.txt",
        utils.line_parser(LineSettings, batch.parse_arguments(["p.txt", "--output_dir=o"])),
    )
    assert not problems
    found = [line.settings.prompt for line in lines[1:]]
    assert found == ([prompt] if prompt else [])


def test_lines_override_the_command_line(tmp_path: Path):
    content = lines(
        j(seeds="0-2", name="kite", guidance=1, steps=4),
        j(size="96x160", frames=17, use_dynamic_cfg=False, prompt="-x --seed 5"),
    )
    *kites, last = read(tmp_path, "jobs.jsonl", content, "--seed=9", "--use_dynamic_cfg")
    assert [job.settings.seed for job in kites] == [0, 1, 2]
    assert [job.name for job in kites] == ["kite-seed0", "kite-seed1", "kite-seed2"]
    settings = kites[0].settings
    assert (settings.guidance_scale, settings.num_inference_steps) == (1.0, 4)
    assert settings.use_dynamic_cfg and not last.settings.use_dynamic_cfg
    assert (last.prompt, last.settings.seed) == ("-x --seed 5", 9)
    assert (last.settings.height, last.settings.width, last.settings.num_frames) == (96, 160, 17)


def test_the_id_follows_what_decides_the_output(tmp_path: Path):
    def ids(content: str, *more: str) -> str:
        (job,) = read(tmp_path, "jobs.jsonl", content.encode(), *more)
        return job.id

    one = ids(j())
    # Explicit defaults, names and the place of the work change nothing.
    default = read(tmp_path, "jobs.jsonl", j().encode())[0].settings
    said = j(height=default.height, guidance=default.guidance_scale, fps=default.fps)
    assert one == ids(said) == ids(j(name="kite"), "--dp=1")
    others = [j(seed=0), j(prompt="A red kite "), j(guidance=3.5), j(fps=8), j(quality=7)]
    others += [j(negative_prompt="blur"), j(scheduler="ddim")]
    others += [j(max_sequence_length=31, allow_unsupported=True)]
    different = {ids(other) for other in others} | {ids(j(), "--dtype=float32")}
    different |= {ids(j(), "--decoder=flax")}
    assert len(different - {one}) == len(others) + 2


def test_another_model_is_another_job(tmp_path: Path):
    from cogvideox.model.folder import find_model
    from jobs.identity import model_digest
    from tests.tiny_models import save_tiny_model

    model = find_model(str(save_tiny_model(tmp_path / "model")), ["vae"])
    digest = model_digest(model)
    moved = find_model(str((tmp_path / "model").rename(tmp_path / "moved")), ["vae"])
    assert digest == model_digest(moved)
    weights = next((tmp_path / "moved/vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # trained on: the same size and header
    weights.write_bytes(content)
    assert model_digest(find_model(str(moved.path), ["vae"])) != digest
