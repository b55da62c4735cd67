"""The split between seen and held-out combinations, and what captions say."""

import random
from itertools import combinations

import pytest

from toyworld import parts
from toyworld.captions import (
    UNSAID,
    all_things,
    corrupt,
    draw_scene,
    full_caption,
    held_out_captions,
    is_held_out,
    partial_caption,
    two_thing_captions,
)
from toyworld.training import TrainingSettings, draw_training_scenes
from toyworld.world import BACKGROUNDS


def test_the_split_is_a_sixth_and_leaves_every_pair_of_attributes_in_training():
    held_out, seen = all_things(held_out=True), all_things(held_out=False)
    assert len(held_out) == 24 and len(seen) == 120 and not set(held_out) & set(seen)
    for names in combinations(("color", "shape", "motion"), 2):
        pairs = [{tuple(getattr(t, n) for n in names) for t in ts} for ts in (held_out, seen)]
        assert pairs[0] <= pairs[1]


def test_training_never_draws_or_names_a_held_out_thing():
    rng = random.Random(0)
    for scene in draw_training_scenes(TrainingSettings(), rng, 3000):
        said = corrupt(scene, rng)
        assert said != scene
        assert not any(is_held_out(thing) for thing in scene.things + said.things)


def test_held_out_captions_cover_the_held_out_combinations_evenly():
    prompts = held_out_captions(192, seed=3)
    scenes = [prompt.scene for prompt in prompts]
    assert all(is_held_out(scene.things[0]) and len(scene.things) == 1 for scene in scenes)
    assert len(set(scenes)) == 96 and all(scenes.count(scene) == 2 for scene in set(scenes))
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert prompts == held_out_captions(192, seed=3) != held_out_captions(192, seed=4)
    assert [prompt.seed for prompt in prompts] == list(range(192))


def test_two_thing_captions_hold_two_held_out_things_of_different_colors():
    for prompt in two_thing_captions(50):
        first, second = prompt.scene.things
        assert is_held_out(first) and is_held_out(second) and first.color != second.color


def test_a_full_caption_tells_scenes_apart():
    rng = random.Random(0)
    meaning = {}
    for _ in range(3000):
        scene = draw_scene(rng, all_things(held_out=False), two=False)
        assert meaning.setdefault(full_caption(scene, rng), scene) == scene


def test_a_partial_caption_omits_something_and_says_what_it_says():
    rng = random.Random(0)
    meaning = {}
    for _ in range(3000):
        scene = draw_scene(rng, all_things(held_out=False), two=False)
        text, said = partial_caption(scene, rng)
        values = [said.background, *vars(said.things[0]).values()]
        assert 1 <= values.count(UNSAID) <= 3
        asked = [scene.background, *vars(scene.things[0]).values()]
        assert all(v in (UNSAID, a) for v, a in zip(values, asked, strict=True))
        assert meaning.setdefault(text, said) == said


@pytest.fixture(scope="module")
def tokenizer():
    return parts.make_tokenizer(seed=0)


@pytest.mark.parametrize("two", [False, True])
def test_captions_fit_the_text_length_of_the_model_and_have_no_unknown_words(two, tokenizer):
    rng = random.Random(1)
    scenes = [draw_scene(rng, all_things(held_out=False), two=two) for _ in range(2000)]
    ids = tokenizer([full_caption(scene, rng) for scene in scenes]).input_ids
    assert max(map(len, ids)) <= parts.MAX_TOKENS
    assert tokenizer.unk_token_id not in {token for row in ids for token in row}


def test_the_tokenizer_ignores_case_and_spells_unknown_words(tokenizer):
    said, shouted = tokenizer(["a red circle moves left", "A RED Circle Moves Left"]).input_ids
    assert said == shouted and len(said) == 6
    assert tokenizer.unk_token_id not in tokenizer("xylophone 42").input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
