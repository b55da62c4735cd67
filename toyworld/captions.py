"""Sentences about the toy world, and which of its combinations training never shows.

Held out: every (colour, shape, motion) whose indices sum to a multiple of 6. That is 24 of the 144
triples, on all 4 backgrounds: 96 of 576 combinations. Every pair of attributes stays in training.
"""

import random
from dataclasses import dataclass, replace

from toyworld.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, Thing

_COLOR_WORDS = {"purple": ("purple", "purple", "violet")}
_SHAPE_WORDS = {"circle": ("circle", "circle", "disc"), "square": ("square", "square", "box")}
_BACKGROUND_WORDS = {"grey": ("grey", "gray"), "dark blue": ("dark blue", "dark blue", "navy")}
_MOTION_WORDS = {
    "left": ("moves left", "moving left", "moves to the left", "slides left", "goes left"),
    "right": ("moves right", "moving right", "moves to the right", "slides right", "goes right"),
    "up": ("moves up", "moving up", "moves upward", "rises", "goes up"),
    "down": ("moves down", "moving down", "moves downward", "falls", "goes down"),
    "grow": ("grows", "growing", "gets bigger", "becomes larger", "expands"),
    "shrink": ("shrinks", "shrinking", "gets smaller", "becomes smaller", "contracts"),
}
# Stands for an attribute that a caption leaves open.
UNSAID = "unsaid"
_ON = ("on a {} background", "on {}", "over a {} background", "against a {} background")


@dataclass(frozen=True)
class Prompt:
    """A caption, the scene it asks for, and the seed of its video."""

    text: str
    scene: Scene
    seed: int


def is_held_out(thing: Thing) -> bool:
    """Returns whether training leaves out this combination of colour, shape and motion."""
    total = list(COLORS).index(thing.color) + SHAPES.index(thing.shape)
    return (total + MOTIONS.index(thing.motion)) % 6 == 0


def all_things(held_out: bool) -> list[Thing]:
    """Returns the 24 held-out combinations of colour, shape and motion, or the 120 others."""
    things = [Thing(c, s, m) for c in COLORS for s in SHAPES for m in MOTIONS]
    return [thing for thing in things if is_held_out(thing) == held_out]


def draw_scene(rng: random.Random, things: list[Thing], two: bool) -> Scene:
    """Draws a scene of one of `things`, or of two that differ in colour, on any background."""
    first = rng.choice(things)
    chosen = (first,)
    if two:
        chosen += (rng.choice([thing for thing in things if thing.color != first.color]),)
    return Scene(rng.choice(list(BACKGROUNDS)), chosen)


def full_caption(scene: Scene, rng: random.Random) -> str:
    """Returns a sentence that names everything in the scene, in one of many wordings."""
    phrases = [
        f"{_noun(_color(thing, rng), rng)} {_shape(thing, rng)} {_motion(thing, rng)}"
        for thing in scene.things
    ]
    what = rng.choice((" and ", " while ")).join(phrases)
    where = _background(scene, rng)
    text = rng.choice((f"{what} {where}", f"{what} {where}", f"{where}, {what}"))
    return text + rng.choice(("", "", "."))


# The attributes that an incomplete caption of a scene with one thing may name.
_PARTS = (
    ("color", "shape", "motion"),
    ("color", "shape", "background"),
    ("shape", "motion", "background"),
    ("color", "motion", "background"),
    ("motion", "background"),
    ("shape", "motion"),
    ("color", "shape"),
    ("color",),
    ("shape",),
    ("motion",),
    ("background",),
)


def partial_caption(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """A few words about a scene with one thing, and the scene with `UNSAID` for what they omit."""
    (thing,) = scene.things
    named = rng.choice(_PARTS)
    color = _color(thing, rng) if "color" in named else ""
    shape = _shape(thing, rng) if "shape" in named else "shape"
    motion = _motion(thing, rng) if "motion" in named else ""
    where = _background(scene, rng) if "background" in named else ""
    if named == ("background",):
        text = where.split(" ", 1)[1]
    elif len(named) == 1 and (motion or rng.random() < 0.5):
        text = {"color": color, "shape": shape, "motion": motion}[named[0]]
    else:
        noun = _noun(f"{color} {shape}".strip(), rng)
        text = " ".join(part for part in (noun, motion, where) if part)
    omitted = {n: UNSAID for n in ("color", "shape", "motion") if n not in named}
    background = scene.background if "background" in named else UNSAID
    return text, Scene(background, (replace(thing, **omitted),))


def corrupt(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute changed, never into a held-out combination."""
    position = rng.randrange(len(scene.things))
    while True:
        thing, background = scene.things[position], scene.background
        what = rng.choice(("color", "shape", "motion", "background"))
        if what == "background":
            background = rng.choice(list(BACKGROUNDS))
        else:
            table = {"color": list(COLORS), "shape": SHAPES, "motion": MOTIONS}[what]
            thing = replace(thing, **{what: rng.choice(table)})
        things = scene.things[:position] + (thing,) + scene.things[position + 1 :]
        changed = Scene(background, things)
        if changed != scene and not is_held_out(thing):
            return changed


def held_out_captions(n: int, seed: int = 0) -> list[Prompt]:
    """n full captions of one held-out thing each; the 96 combinations come in equal numbers.

    Prompt i carries the generation seed i. The list depends on `n` and `seed` alone.
    """
    rng = random.Random(seed)
    combinations = [Scene(b, (thing,)) for b in BACKGROUNDS for thing in all_things(held_out=True)]
    scenes: list[Scene] = []
    while len(scenes) < n:
        rng.shuffle(combinations)
        scenes += combinations
    return [Prompt(full_caption(scene, rng), scene, i) for i, scene in enumerate(scenes[:n])]


def two_thing_captions(n: int, seed: int = 0) -> list[Prompt]:
    """n full captions of two held-out things of different colours each."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng, all_things(held_out=True), two=True) for _ in range(n)]
    return [Prompt(full_caption(scene, rng), scene, i) for i, scene in enumerate(scenes)]


def _noun(word: str, rng: random.Random) -> str:
    """Returns the word with its article."""
    return rng.choice(("an " if word[0] == "o" else "a ", "the ")) + word


def _color(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_COLOR_WORDS.get(thing.color, (thing.color,)))


def _shape(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_SHAPE_WORDS.get(thing.shape, (thing.shape,)))


def _motion(thing: Thing, rng: random.Random) -> str:
    return rng.choice(_MOTION_WORDS[thing.motion])


def _background(scene: Scene, rng: random.Random) -> str:
    word = rng.choice(_BACKGROUND_WORDS.get(scene.background, (scene.background,)))
    return rng.choice(_ON).format(word)
