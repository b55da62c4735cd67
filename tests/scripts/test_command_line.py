"""What a user types: the examples of each --help, and prompts in any locale."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import batch
import compare
import compile_ahead
import generate
import stage1_text_encoder as stage1
import stage2_transformer as stage2
import stage3_vae_decoder as stage3
from stages.files import CONFIG_FILE

ROOT = Path(__file__).parents[2]
PARSERS = {
    "stage1_text_encoder.py": stage1.parse_arguments,
    "stage2_transformer.py": stage2.parse_arguments,
    "stage3_vae_decoder.py": stage3.parse_arguments,
    "stage3_vae_decoder_flax.py": stage3.parse_arguments,
    "generate.py": generate.parse_arguments,
    "compare.py": compare.parse_arguments,
    "compile_ahead.py": compile_ahead.parse_arguments,
    "batch.py": batch.parse_arguments,
    "batch.py status": batch.parse_status,
    "batch.py prune": batch.parse_prune,
    "batch.py rerun": batch.parse_rerun,
}


def help_of(parse) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        parse(["--help"])
    return said.getvalue()


@pytest.mark.parametrize("script", PARSERS)
def test_the_examples_of_the_help_are_accepted(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("night.json").write_text('{"steps": 50}')  # which an example of generate.py names
    text = help_of(PARSERS[script]).replace("\\\n", " ")
    examples = re.findall(r"^ +python (.*)$", text, re.MULTILINE)
    assert examples or script == "stage3_vae_decoder_flax.py"
    for example in examples:
        name, *words = shlex.split(example, comments=True)
        if words and f"{name} {words[0]}" in PARSERS:
            name, words = f"{name} {words[0]}", words[1:]
        PARSERS[name](words)


def test_the_first_example_of_compile_ahead_names_a_folder():
    (first,) = re.findall(
        r"examples:\n +(python .*)$", help_of(compile_ahead.parse_arguments), re.M
    )
    assert "--executables" in first


@pytest.mark.parametrize("locale", [{"LANG": "C"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}])
def test_a_prompt_of_any_script_in_the_c_locale(locale, tmp_path):
    prompt = "a red circle 猫 moves 🐼"
    environment = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_ALL", "LC_CTYPE")}
    done = subprocess.run(
        [sys.executable, ROOT / "stage1_text_encoder.py", "--model_id", ROOT / "models/toyworld"]
        + ["--prompt", prompt, "--output_dir", tmp_path / "föö"],
        **{"env": environment | locale, "capture_output": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    assert "does not know: 猫 🐼" in done.stdout.decode()
    config = json.loads((tmp_path / "föö" / CONFIG_FILE).read_text("utf-8"))
    assert config["stage1_text_encoder"]["prompt"] == prompt
