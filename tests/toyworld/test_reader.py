"""The reader sees in drawn videos what was drawn, and says so when there is nothing to see."""

import numpy as np
import pytest
import torch

from toyworld.captions import held_out_captions, two_thing_captions
from toyworld.reader import NONE, evaluate_video, read_video, shows, truth_of
from toyworld.world import SHAPES, Scene, Thing, render, scenes_of


def drawn(scenes: list[Scene]) -> np.ndarray:
    return render(scenes_of(scenes, torch.Generator().manual_seed(0))).numpy()


def noisy(videos: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(scale=0.04, size=videos.shape)
    return np.clip(videos + noise, 0, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("degrade", "first"), [(lambda videos: videos, 0), (noisy, 1)], ids=["clean", "noisy"]
)
def test_held_out_combinations_are_read_right(degrade, first):
    """Every fourth one: a video takes half a second to read."""
    scenes = [prompt.scene for prompt in held_out_captions(96)[first::4]]
    readings = [evaluate_video(video) for video in degrade(drawn(scenes))]
    assert readings == [truth_of(scene) for scene in scenes]


def test_two_things_are_read_right_and_not_mistaken_for_others():
    scenes = [prompt.scene for prompt in two_thing_captions(5)]
    for i, video in enumerate(drawn(scenes)):
        assert shows(video, scenes[i])
        assert not shows(video, scenes[i - 1])
        assert not shows(video, Scene(scenes[i].background, scenes[i].things[:1]))


def test_a_dented_outline_fits_worse_than_a_true_one():
    scenes = [Scene("black", (Thing("red", shape, "left"),)) for shape in SHAPES]
    for video in drawn(scenes):
        (fit,) = read_video(video).fits
        assert 0.95 < fit <= 1
        inside = np.argwhere((video[8] != video[8, 0, 0]).any(axis=-1))
        top, left = inside.min(axis=0)
        bottom = inside.max(axis=0)[0]
        video[8:, top : (top + bottom) // 2, : left + 6] = video[0, 0, 0]
        video[8:, bottom - 5 : bottom + 1] = video[0, 0, 0]
        (dented,) = read_video(video).fits
        assert dented < fit - 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_time_reversed_motion_is_read_as_its_opposite(shape):
    opposite = {"left": "right", "up": "down", "grow": "shrink"}
    scenes = [Scene("grey", (Thing("green", shape, motion),)) for motion in opposite]
    backwards = [evaluate_video(video[::-1])["motion"] for video in drawn(scenes)]
    assert backwards == list(opposite.values())


def test_a_still_thing_has_no_motion_and_an_empty_video_no_thing():
    video = drawn([Scene("black", (Thing("red", "circle", "left"),))])[0]
    still = np.repeat(video[:1], len(video), axis=0)
    assert evaluate_video(still)["motion"] == NONE
    empty = read_video(np.full((17, 96, 160, 3), 0.5, np.float32))
    assert empty.background == "grey" and empty.things == ()
    assert evaluate_video(np.full((17, 96, 160, 3), 0.3, np.float32))["background"] == NONE


@pytest.mark.parametrize(
    "video",
    [np.zeros((17, 96, 160, 3), np.uint8), np.zeros((96, 160, 3)), np.full((2, 8, 8, 3), np.nan)]
    + [np.full((2, 8, 8, 3), 2.0)],
    ids=["integers", "one frame", "not a number", "out of range"],
)
def test_what_is_no_video_is_refused(video):
    with pytest.raises(ValueError, match="video"):
        read_video(video)
