"""The toy world: one or two flat shapes that move over a plain background, drawn from numbers.

Axis letters: B scenes, O objects a scene (0 or 1 of them may be absent), F frames, H and W pixels.
"""

import math
from dataclasses import dataclass

import torch

HEIGHT, WIDTH, FRAMES, FPS = 96, 160, 17, 16

# RGB in 0..1. The least contrast of an object with a background is green on grey: 0.53 (Euclid).
COLORS = {
    "red": (0.88, 0.12, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.88, 0.15),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.15, 0.35, 0.95),
    "purple": (0.60, 0.20, 0.75),
}
BACKGROUNDS = {
    "black": (0.02, 0.02, 0.02),
    "white": (0.96, 0.96, 0.96),
    "grey": (0.50, 0.50, 0.50),
    "dark blue": (0.07, 0.10, 0.32),
}
SHAPES = ("circle", "square", "triangle", "star")
MOTIONS = ("left", "right", "up", "down", "grow", "shrink")

# Every shape of size r has the area of a circle of radius r, so size says nothing about shape.
_SQUARE_HALF_SIDE = math.sqrt(math.pi) / 2
_TRIANGLE_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))
_STAR_VALLEY = 0.45  # inner radius over outer radius
_STAR_TIP = math.sqrt(math.pi / (5 * _STAR_VALLEY * math.sin(math.pi / 5)))
# How far the widest shape (the triangle's tip) reaches from its centre, over r.
REACH = 2 * _TRIANGLE_INRADIUS


@dataclass(frozen=True)
class Thing:
    """One object, by the names used in captions."""

    color: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Scene:
    """What a video shows, by the names used in captions."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as tensors: what `render` draws.

    Indices point into the tables above: `background` [B], `color`, `shape` and `motion` [B, O]
    int64; `present` [B, O] bool. `start` and `end` [B, O, 3] float32 hold the centre's x and y and
    the size r in pixels, in the first and the last frame; between them all three change linearly.
    """

    background: torch.Tensor
    color: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor
    present: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, rows: slice) -> "Scenes":
        return Scenes(**{name: value[rows] for name, value in vars(self).items()})

    def to(self, device: torch.device | str) -> "Scenes":
        """Returns the same scenes on another device."""
        return Scenes(**{name: value.to(device) for name, value in vars(self).items()})

    def describe(self) -> list[Scene]:
        """Returns the B scenes by name."""
        backgrounds, colors = list(BACKGROUNDS), list(COLORS)
        rows = zip(
            self.background.tolist(),
            self.color.tolist(),
            self.shape.tolist(),
            self.motion.tolist(),
            self.present.tolist(),
            strict=True,
        )
        return [
            Scene(
                backgrounds[background],
                tuple(
                    Thing(colors[c], SHAPES[s], MOTIONS[m])
                    for c, s, m, here in zip(color, shape, motion, present, strict=True)
                    if here
                ),
            )
            for background, color, shape, motion, present in rows
        ]


def scenes_of(
    described: list[Scene], generator: torch.Generator, *, open_start: bool = False
) -> Scenes:
    """Draws positions, sizes and speeds for B described scenes of one or two things.

    A lone thing has the whole frame; of two things the first gets the left or the right half, by
    chance, and the second the other, so they never touch.

    Args:
        open_start: draw shorter ways and other sizes, so that the first frame says less about the
            motion: most sizes may move, and grow or shrink.
    """
    backgrounds, colors = list(BACKGROUNDS), list(COLORS)
    # An absent second thing gets the first one's indices; `present` keeps it from being drawn.
    index = torch.tensor(
        [
            [
                (colors.index(thing.color), SHAPES.index(thing.shape), MOTIONS.index(thing.motion))
                for thing in (scene.things * 2)[:2]
            ]
            for scene in described
        ]
    )
    present = torch.tensor([[True, len(scene.things) == 2] for scene in described])
    background = torch.tensor([backgrounds.index(scene.background) for scene in described])
    start, end = _trajectories(index[..., 2], present.all(dim=1), generator, open_start)
    return Scenes(background, index[..., 0], index[..., 1], index[..., 2], present, start, end)


# Ranges of a lone thing and of each of two: radius of a thing that moves, the small radius of one
# that grows or shrinks, how many times it grows, and the pixels of the way across and down. With
# an open start (True), a radius of the first frame fits nearly every motion.
_RANGES = {
    False: (
        ((11.0, 17.0), (9.0, 12.0)),
        ((7.0, 10.0), (6.0, 7.5)),
        ((2.0, 2.5), (2.0, 2.3)),
        ((32.0, 64.0), (22.0, 34.0)),
        ((26.0, 40.0), (26.0, 40.0)),
    ),
    True: (
        ((8.0, 17.0), (7.0, 12.0)),
        ((7.0, 13.0), (6.5, 9.0)),
        ((1.7, 2.1), (1.7, 2.1)),
        ((24.0, 60.0), (20.0, 34.0)),
        ((18.0, 36.0), (18.0, 36.0)),
    ),
}


def _trajectories(
    motion: torch.Tensor, crowded: torch.Tensor, generator: torch.Generator, open_start: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws start, end [B, O, 3] for motions [B, O]; `crowded` [B] marks scenes of two things."""
    B, num_things = motion.shape

    def uniform(low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
        return low + (high - low) * torch.rand(B, num_things, generator=generator)

    two = crowded[:, None]
    still_range, small_range, growth, run_x_range, run_y_range = _RANGES[open_start]

    def uniform_of(alone: tuple[float, float], crowd: tuple[float, float]) -> torch.Tensor:
        low, high = (torch.where(two, b, a) for a, b in zip(alone, crowd, strict=True))
        return uniform(low, high)

    still = uniform_of(*still_range)
    small = uniform_of(*small_range)
    large = small * uniform_of(*growth)
    grows, shrinks = motion == MOTIONS.index("grow"), motion == MOTIONS.index("shrink")
    r_start = torch.where(grows, small, torch.where(shrinks, large, still))
    r_end = torch.where(grows, large, torch.where(shrinks, small, still))

    run_x = uniform_of(*run_x_range)
    run_y = uniform_of(*run_y_range)
    right, left = motion == MOTIONS.index("right"), motion == MOTIONS.index("left")
    down, up = motion == MOTIONS.index("down"), motion == MOTIONS.index("up")
    dx = run_x * (right.float() - left.float())
    dy = run_y * (down.float() - up.float())

    reach = REACH * torch.maximum(r_start, r_end) + 1  # a pixel of background all around
    first_is_left = torch.rand(B, 1, generator=generator) < 0.5
    is_left = torch.cat([first_is_left, ~first_is_left], dim=1)
    x_low = torch.where(two & ~is_left, WIDTH / 2, 0.0) + reach
    x_high = torch.where(two & is_left, WIDTH / 2, float(WIDTH)) - reach
    x = uniform(x_low + (-dx).clamp(min=0), x_high - dx.clamp(min=0))
    y = uniform(reach + (-dy).clamp(min=0), HEIGHT - reach - dy.clamp(min=0))
    return torch.stack([x, y, r_start], dim=-1), torch.stack([x + dx, y + dy, r_end], dim=-1)


def coverage(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor):
    """Returns how much of each pixel a shape covers, in 0..1.

    `shape` (index into SHAPES) and `r`, and the pixel centres `x` and `y` relative to the shape's
    centre, must broadcast together; y points down. The distance to the edge in pixels, clipped to
    half a pixel on either side, is the coverage of a straight edge; unlike supersampling it has no
    steps, and one evaluation a pixel is enough.
    """
    radius = torch.hypot(x, y)
    circle = radius - r
    square = torch.maximum(x.abs(), y.abs()) - _SQUARE_HALF_SIDE * r
    # Upward triangle: the bottom edge and, by symmetry, the right one.
    triangle = torch.maximum(y, x.abs() * (math.sqrt(3) / 2) - y / 2) - _TRIANGLE_INRADIUS * r
    # Five-pointed star, tip up: fold the plane into the half sector between a tip and a valley,
    # where the edge is one straight line.
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (angle - sector * torch.round(angle / sector)).abs()
    tip = (_STAR_TIP, 0.0)
    valley = tuple(
        _STAR_TIP * _STAR_VALLEY * part for part in (math.cos(sector / 2), math.sin(sector / 2))
    )
    length = math.hypot(tip[0] - valley[0], tip[1] - valley[1])
    normal = ((valley[1] - tip[1]) / length, (tip[0] - valley[0]) / length)
    star = (radius * torch.cos(folded) - tip[0] * r) * normal[0]
    star = star + radius * torch.sin(folded) * normal[1]
    distance = torch.where(
        shape == 0, circle, torch.where(shape == 1, square, torch.where(shape == 2, triangle, star))
    )
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Scenes, frames: int = FRAMES) -> torch.Tensor:
    """Draws B scenes as [B, F, H, W, 3] float32 in 0..1, on the device of the scenes."""
    device = scenes.start.device
    backgrounds = torch.tensor(list(BACKGROUNDS.values()), device=device)
    colors = torch.tensor(list(COLORS.values()), device=device)
    time = torch.linspace(0, 1, frames, device=device)[None, :, None]
    grid_y = (torch.arange(HEIGHT, device=device) + 0.5)[:, None]
    grid_x = (torch.arange(WIDTH, device=device) + 0.5)[None, :]

    video = backgrounds[scenes.background][:, None, None, None, :]
    video = video.expand(-1, frames, HEIGHT, WIDTH, -1)
    for thing in range(scenes.color.shape[1]):
        start, end = scenes.start[:, None, thing], scenes.end[:, None, thing]
        x, y, r = (start + (end - start) * time)[..., None, None].unbind(dim=2)
        shape = scenes.shape[:, thing, None, None, None]
        alpha = coverage(shape, grid_x - x, grid_y - y, r)
        alpha = (alpha * scenes.present[:, thing, None, None, None])[..., None]
        video = video + alpha * (colors[scenes.color[:, thing]][:, None, None, None, :] - video)
    return video
