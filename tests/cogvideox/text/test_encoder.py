"""Unknown words are named; a text encoder that cannot be read is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import stage1_text_encoder as stage1
from cogvideox.model.folder import find_model
from cogvideox.text.encoder import check_weights, known_words, load_text_encoder, unknown_words

TOYWORLD = Path(__file__).parents[3] / "models" / "toyworld"
PROMPT = "a red panda moves 猫 left"


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.T5Tokenizer.from_pretrained(TOYWORLD / "tokenizer")


def test_words_are_known_by_the_vocabulary(tokenizer):
    known = known_words(tokenizer)
    assert {"red", "circle", "moves"} <= set(known) and not {"panda", "</s>", "a"} & set(known)
    assert unknown_words(tokenizer, " ".join(known)) == []
    assert unknown_words(tokenizer, PROMPT) == ["panda", "猫"]
    assert unknown_words(tokenizer, "a red circle, moves left.") == []


def test_a_large_vocabulary_may_spell_words():
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefgh", *(f"▁word{i}" for i in range(1000))]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    assert known_words(tokenizer) == []
    assert unknown_words(tokenizer, "head word7 猫") == ["猫"]


def test_stage_1_names_unknown_and_dropped_words_once(tmp_path, capsys):
    long = f"{PROMPT} panda guitar in a bamboo forest"
    where = [f"--model_id={TOYWORLD}", f"--output_dir={tmp_path}"]
    stage1.run(stage1.parse_arguments([f"--prompt={long}", *where]))
    output = capsys.readouterr()
    (unknown,) = [line for line in output.out.splitlines() if "does not know" in line]
    said, _, knows = unknown.partition("; it knows: ")
    assert said.endswith("panda 猫 guitar in bamboo forest")
    assert "circle" in knows.split()
    assert "makes more than 32 tokens" in output.out and "forest" in output.out
    assert "Loading" not in output.err  # transformers' own bar


@pytest.fixture
def model(tmp_path) -> Path:
    return Path(shutil.copytree(TOYWORLD, tmp_path / "model"))


def refusal(model: Path) -> str:
    """What stage 1 says of a model, in one line."""
    found = find_model(str(model), ["tokenizer", "text_encoder"])
    with pytest.raises(ValueError) as error:
        check_weights(found)
        load_text_encoder(found, torch.float32)
    message = str(error.value)
    assert "\n" not in message and message.isprintable() and len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_layers", -1), ("num_layers", 10**9), ("num_heads", 0), ("d_kv", "8"), ("d_kv", 1.5)],
)
def test_sizes_that_no_encoder_has_are_refused(name, value, model):
    path = model / "text_encoder/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert f"config.json: {name} must be from 1 to 1024, not {value}" in refusal(model)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("text_encoder/config.json", {"feed_forward_proj": "x-" * 1_000_000}),
        ("text_encoder/config.json", {"layer_norm_epsilon": []}),
        ("text_encoder/config.json", {"vocab_size": -5}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "4"}),
        ("tokenizer/tokenizer.json", {"model": None}),
        ("tokenizer/tokenizer.json", {"version": 7, "added_tokens": "a\nb"}),
    ],
)
def test_what_transformers_raises_is_one_line(file, content, model):
    """It raises KeyError, RuntimeError, its own classes, or plain Exceptions, of many lines."""
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    assert f"transformers cannot read {path.parent}" in refusal(model)
