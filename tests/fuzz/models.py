"""Damaged model folders, read by generate.py."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from tests.fuzz.damage import (
    VALUES,
    at,
    damaged_safetensors,
    damaged_text,
    not_a_file,
    paths,
    replaced,
    tensor_bytes,
)  # fmt: skip
from tests.fuzz.harness import DENOISE, PROMPT, Case, World, copy_tree, snapshot
from tests.fuzz.stages import EMBEDDINGS, LATENTS, SHEET, VIDEO, ended_well

_CONFIGS = ["model_index.json", "transformer/config.json", "vae/config.json"]
_CONFIGS += ["text_encoder/config.json", "scheduler/scheduler_config.json"]
_TOKENIZER = ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
_WEIGHTS = ["transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
_WEIGHTS += ["vae/diffusion_pytorch_model.safetensors"]
# Of a value's own type, but no model has them. Other numbers may be another, good model.
_BAD_INTEGERS = ["zero", "minus one", "a billion", "a fraction", "1e308", "NaN", "a string"]
_BAD_INTEGERS += ["a digit in a string", "an empty list", "an empty object"]
_BAD_INTEGERS += ["an integer of 400 digits", "an integer of 5000 digits", "a nested list"]
_BAD_FLOATS = ["NaN", "-Infinity", "1e999", "a string", "an empty list", "an empty object"]
_BAD_FLOATS += ["an integer of 5000 digits", "a list 100000 deep"]
_BAD_BOOLEANS = ["a string", "minus one", "an empty list", "a fraction"]
_BAD_STRINGS = ["an empty string", "a terminal escape", "a path outside", "/dev/zero", "zero"]
_BAD_STRINGS += ["an empty list", "an empty object", "a lone surrogate", "a string of 2 MB"]
_BAD_LISTS = ["an empty list", "a nested list", "a string", "zero", "an empty object", "true"]
_BAD_LISTS += ["a list 100000 deep", "an object"]


class Models:
    """Damages one file of a model folder, and runs generate.py with it.

    A run with exit code 0 must make the tensors and the video of the undamaged model.
    """

    def __init__(self, world: World):
        self._model = world.model
        self._good = world.root / "models"
        self._good.mkdir()
        copy_tree(world.model, self._good / "model")
        world.run(*self._command, cwd=self._good)

    @property
    def _command(self) -> list[str]:
        command = ["generate.py", "--model_id=model", f"--prompt={PROMPT}", "--output_dir=run"]
        return [*command, "--no_metadata", *DENOISE]

    def make(self, rng: random.Random, folder: Path) -> Case:
        folder.mkdir()
        model = copy_tree(self._model, folder / "model")
        (folder / "outside").mkdir()
        case = Case("", folder, self._command, lambda ended, changed: [])
        case.right = lambda ended, changed: self._right(folder, changed)
        case.may_change = lambda name: name.split("/")[0] == "run"
        damages = [_damage_config] * 5 + [_damage_weights] * 3 + [_damage_layout, _damage_tokenizer]
        case.what, decidable = rng.choice(damages)(rng, model)
        if not decidable:
            case.right = ended_well
        case.before = snapshot(folder)
        return case

    def _right(self, folder: Path, changed: list[str]) -> list[str]:
        run, good = folder / "run", self._good / "run"
        problems = [f"exit 0, and changed {n}" for n in changed if n.split("/")[0] != "run"]
        for name in (EMBEDDINGS, LATENTS):
            path = run / name
            if tensor_bytes(path.read_bytes()) != tensor_bytes((good / name).read_bytes()):
                return [*problems, f"exit 0 with other tensors in {name}"]
        for name in (VIDEO, SHEET):
            if (run / name).read_bytes() != (good / name).read_bytes():
                problems.append(f"exit 0 with another {name}")
        return problems


def _damage_config(rng: random.Random, model: Path) -> tuple[str, bool]:
    name = rng.choice(_CONFIGS)
    path = model / name
    content = path.read_bytes()
    if rng.random() < 0.2:
        damaged, what = damaged_text(rng, content)
        path.write_bytes(damaged)
        # A flipped bit may give another valid model.
        return f"{name}: {what}", "flipped" not in what
    document = json.loads(content)
    where = rng.choice(list(paths(document)))
    value = at(document, where)
    if isinstance(value, bool):
        bad = rng.choice(_BAD_BOOLEANS)
    elif isinstance(value, int):
        bad = rng.choice(_BAD_INTEGERS)
    elif isinstance(value, float):
        bad = rng.choice(_BAD_FLOATS)
    elif isinstance(value, str):
        bad = rng.choice(_BAD_STRINGS)
    elif value is None:
        bad = rng.choice(["a string", "an empty list", "minus one", "a billion"])
    else:
        bad = rng.choice(_BAD_LISTS)
    path.write_bytes(replaced(document, where, VALUES[bad]))
    dotted = ".".join(map(str, where)) or "the document"
    # transformers and diffusers take several spellings of these for other good models.
    undecided = {"the document", "beta_start", "beta_end", "feed_forward_proj", "dense_act_fn"}
    return f"{name}: {dotted} is {bad}", dotted not in undecided


def _damage_weights(rng: random.Random, model: Path) -> tuple[str, bool]:
    name = rng.choice(_WEIGHTS)
    path = model / name
    if rng.random() < 0.15:
        return f"{name}: {not_a_file(rng, path)}", True
    # Values of weights have no checksum in this layout: only the header is damaged.
    damaged, what = damaged_safetensors(rng, path.read_bytes(), flip_body=False)
    path.write_bytes(damaged)
    # Numbers of another type give another valid model.
    return f"{name}: {what}", not ("relabelled F16" in what or "relabelled BF16" in what)


def _damage_layout(rng: random.Random, model: Path) -> tuple[str, bool]:
    part = rng.choice(["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
    how = rng.randrange(6)
    if how == 0:
        shutil.rmtree(model / part)
        return f"{part}/ is missing", True
    if how == 1:
        shutil.rmtree(model / part)
        (model / part).write_text("x")
        return f"{part} is a file", True
    if how == 2:
        name = rng.choice([*_CONFIGS, *_TOKENIZER])
        return f"{name}: {not_a_file(rng, model / name)}", True
    name = rng.choice(_WEIGHTS)
    path = model / name
    index = path.with_name(f"{path.name}.index.json")
    tensors = list(tensor_bytes(path.read_bytes()))
    if how == 3:
        os.replace(path, model.parent / "outside/weights.safetensors")
        weight_map: object = dict.fromkeys(tensors, "../../outside/weights.safetensors")
    elif how == 4:
        names = ["absent.safetensors", "", ".", "/etc/passwd", "/dev/zero", "a\0b", "x" * 300]
        weight_map = dict.fromkeys(tensors, rng.choice(names))
    else:
        weight_map = rng.choice([{}, [], "x", {"a": 1}, {"a": None}, {"a": ["b"]}, None])
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return f"{index.name} of {part_of(name)}: weight_map {str(weight_map)[:60]}", True


def part_of(name: str) -> str:
    return name.split("/")[0]


def _damage_tokenizer(rng: random.Random, model: Path) -> tuple[str, bool]:
    name = rng.choice(_TOKENIZER)
    path = model / name
    content = path.read_bytes()
    if rng.random() < 0.4:
        damaged, what = damaged_text(rng, content)
    else:
        document = json.loads(content)
        where = rng.choice([p for p in paths(document) if len(p) < 4])
        bad = rng.choice(list(VALUES))
        damaged = replaced(document, where, VALUES[bad])
        what = f"{'.'.join(map(str, where))} is {bad}"
    path.write_bytes(damaged)
    return f"{name}: {what}", False  # another vocabulary is another model
