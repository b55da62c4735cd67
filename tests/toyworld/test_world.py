"""The toy world's drawing: areas, places and the way things move."""

import random

import pytest
import torch

from toyworld.captions import all_things, draw_scene
from toyworld.world import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    HEIGHT,
    SHAPES,
    WIDTH,
    Scene,
    Thing,
    coverage,
    render,
    scenes_of,
)


def a_scene(motion: str, shape: str = "circle") -> Scene:
    return Scene("black", (Thing("red", shape, motion),))


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_every_shape_has_the_area_of_its_circle_and_its_centroid_in_the_middle(shape):
    grid = torch.arange(-40, 40) + 0.5
    alpha = coverage(torch.tensor(shape), grid[None, :], grid[:, None], torch.tensor(12.0))
    # A clipped distance is the exact coverage of a straight edge; at the corners of the triangle
    # and the star it is off by a fraction of a pixel each, 2% of the 452 pixels together.
    assert alpha.sum().item() == pytest.approx(torch.pi * 144, rel=0.02)
    assert ((alpha * grid[None, :]).sum() / alpha.sum()).abs() < 0.01
    assert ((alpha * grid[:, None]).sum() / alpha.sum()).abs() < 0.2


@pytest.mark.parametrize(
    "motion, axis, sign",
    [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1), ("grow", 2, 1)]
    + [("shrink", 2, -1)],
)
@pytest.mark.parametrize("open_start", [False, True])
def test_a_motion_changes_one_thing_in_one_direction(motion, axis, sign, open_start):
    generator = torch.Generator().manual_seed(0)
    scenes = scenes_of([a_scene(motion)] * 50, generator, open_start=open_start)
    change = scenes.end[:, 0] - scenes.start[:, 0]
    assert (change[:, axis] * sign > 0).all()
    assert (change[:, [other for other in range(3) if other != axis]] == 0).all()


@pytest.mark.parametrize("open_start", [False, True])
def test_things_stay_inside_their_frame_and_apart(open_start):
    rng = random.Random(0)
    described = [draw_scene(rng, all_things(False), two=i % 2 == 0) for i in range(40)]
    generator = torch.Generator().manual_seed(0)
    video = render(scenes_of(described, generator, open_start=open_start))
    backgrounds = torch.tensor([BACKGROUNDS[scene.background] for scene in described])
    stands_out = (video - backgrounds[:, None, None, None, :]).abs().amax(dim=-1) > 1e-6
    border = [stands_out[:, :, 0], stands_out[:, :, -1], stands_out[..., 0], stands_out[..., -1]]
    assert not any(edge.any() for edge in border)
    # Of two things, each keeps to its half.
    middle = stands_out[::2, :, :, WIDTH // 2 - 1 : WIDTH // 2 + 1]
    assert not middle.all(dim=-1).any()


def test_render_has_the_stated_shape_range_and_colors():
    scene = Scene("white", (Thing("blue", "square", "right"),))
    video = render(scenes_of([scene, scene], torch.Generator().manual_seed(0)))
    assert video.shape == (2, FRAMES, HEIGHT, WIDTH, 3) and video.dtype == torch.float32
    assert video.min() >= 0 and video.max() <= 1
    torch.testing.assert_close(video[0, 0, 0, 0], torch.tensor(BACKGROUNDS["white"]))
    blue = torch.tensor(COLORS["blue"])
    assert ((video[0] - blue).abs().amax(dim=-1) < 1e-6).any(dim=(1, 2)).all()
    assert not torch.equal(video[0], video[1])
