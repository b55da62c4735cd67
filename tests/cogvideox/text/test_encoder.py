"""Which words a model's tokenizer knows, and what is said about the others."""

from pathlib import Path

import pytest
import transformers

import stage1_text_encoder as stage1
from cogvideox.text.encoder import known_words, unknown_words

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
