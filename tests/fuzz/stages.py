"""Damaged stage files and damaged generation_config.json, read by the stage that takes them."""

from __future__ import annotations

import json
import random
import re
import subprocess
import tempfile
from pathlib import Path

from tests.fuzz.damage import damaged_json, damaged_safetensors, not_a_file, paths, replaced
from tests.fuzz.harness import DENOISE, PROMPT, Case, Ended, World, copy_tree, snapshot

CONFIG = "generation_config.json"
EMBEDDINGS = "stage1_embeddings.safetensors"
LATENTS = "stage2_latents.safetensors"
VIDEO = "output_video.mp4"
SHEET = "output_video_contact_sheet.png"

# What each stage may write, and the command that makes it in the folder `run`.
STAGE1 = ["stage1_text_encoder.py", f"--prompt={PROMPT}", "--dtype=float32", "--output_dir=run"]
STAGE2 = ["stage2_transformer.py", "--input_dir=run", "--seed=42", *DENOISE]
STAGE3 = ["stage3_vae_decoder.py", "--input_dir=run", "--dtype=float32"]
OUTPUTS = {
    STAGE1[0]: (EMBEDDINGS, CONFIG),
    STAGE2[0]: (LATENTS, CONFIG),
    STAGE3[0]: (VIDEO, SHEET, CONFIG),
}
TENSORS = {STAGE1[0]: EMBEDDINGS, STAGE2[0]: LATENTS}


class Stages:
    """Folders in which a stage would replace the outputs of another seed, and what it would make.

    A run with exit code 0 must leave the very bytes that the undamaged run made.
    """

    def __init__(self, world: World):
        self.stage1 = [*STAGE1, f"--model_id={world.model}"]
        base = Path(tempfile.mkdtemp(prefix="stages_", dir=world.root))
        work = base / "work"
        work.mkdir()
        run = work / "run"
        for command in (self.stage1, [*STAGE2, "--seed=7"], STAGE3):
            world.run(*command, cwd=work)
        (run / "notes.txt").write_text("not of this project")
        (run / "sub").mkdir()
        (run / "sub/notes.txt").write_text("not of this project")
        self.before: dict[str, Path] = {}
        self.after: dict[str, Path] = {}
        for command in (self.stage1, STAGE2, STAGE3):
            name = command[0]
            self.before[name] = copy_tree(run, base / f"before_{name}")
            world.run(*command, cwd=work)
            self.after[name] = copy_tree(run, base / f"after_{name}")
        assert (self.before[STAGE3[0]] / VIDEO).read_bytes() != (run / VIDEO).read_bytes()

    def case(self, folder: Path, argv: list[str], what: str) -> Case:
        """Makes a case in `folder`; the caller damages its sub-folder `run`."""
        folder.mkdir()
        copy_tree(self.before[argv[0]], folder / "run")
        return Case(what, folder, argv, lambda ended, changed: self._right(folder, argv, changed))

    def _right(self, folder: Path, argv: list[str], changed: list[str]) -> list[str]:
        outputs = OUTPUTS[argv[0]]
        good = self.after[argv[0]]
        problems = []
        for name in outputs:
            path = folder / "run" / name
            if name == CONFIG:
                problems += section_problems(path, good / CONFIG)
            elif not path.is_file():
                problems.append(f"exit 0 without {name}")
            elif path.read_bytes() != (good / name).read_bytes():
                problems += content_problems(path, good / name)
        others = {f"run/{name}" for name in outputs}
        problems += [f"exit 0, and changed {name}" for name in changed if name not in others]
        return problems


def content_problems(path: Path, good: Path) -> list[str]:
    """Returns the problems of a stage's file that differs from the good one."""
    if path.suffix == ".mp4":
        if packets(path) != packets(good):
            return [f"exit 0 with other frames in {path.name}"]
        return _tag_problems(path, good)
    return [f"exit 0 with another {path.name}"]


def section_problems(path: Path, good: Path) -> list[str]:
    """Returns the false settings in a generation_config.json."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"exit 0 and {path.name} is {type(error).__name__}"]
    return _compare_sections(document, json.loads(good.read_text("utf-8")), path.name)


def _tag_problems(path: Path, good: Path) -> list[str]:
    theirs, ours = tag(path), tag(good)
    if theirs is None or ours is None:
        return [f"exit 0 and the tag of {path.name} is gone"]
    try:
        return _compare_sections(json.loads(theirs), json.loads(ours), "the tag")
    except (ValueError, RecursionError) as error:
        return [f"exit 0 and the tag of {path.name} is {type(error).__name__}"]


def _compare_sections(document: object, good: dict, where: str) -> list[str]:
    """Returns the false settings; facts that decide nothing (versions, mesh) may differ."""
    if not isinstance(document, dict):
        return [f"exit 0 and {where} is no object"]
    for stage, section in good.items():
        if not isinstance(section, dict) or stage not in document:
            continue
        theirs = document[stage]
        if not isinstance(theirs, dict):
            return [f"exit 0 and {stage} in {where} is no object"]
        for key in sorted((section.keys() | theirs.keys()) - {"made_with"}):
            if repr(section.get(key)) != repr(theirs.get(key)) or (key in section) != (
                key in theirs
            ):
                return [f"exit 0 and a false {stage}.{key} in {where}"]
    return []


def packets(video: Path) -> str:
    """Hashes the encoded frames without the tags."""
    return _ffmpeg("-i", f"file:{video}", "-map", "0:v", "-c", "copy", "-f", "md5", "-")


def tag(video: Path) -> str | None:
    """Returns the comment of a video."""
    text = _ffmpeg("-i", f"file:{video}", "-f", "ffmetadata", "-")
    found = re.search(r"^comment=((?:[^\\\n]|\\.)*)$", text, re.DOTALL | re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", found[1], flags=re.DOTALL) if found else None


def _ffmpeg(*arguments: str) -> str:
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return done.stdout.decode(errors="replace")


class StageFiles:
    """Damages one stage file, and runs the next stage on it."""

    def __init__(self, world: World):
        self._stages = Stages(world)

    def make(self, rng: random.Random, folder: Path) -> Case:
        argv, name = rng.choice([(STAGE2, EMBEDDINGS), (STAGE3, LATENTS)])
        case = self._stages.case(folder, argv, "")
        path = folder / "run" / name
        if rng.random() < 0.12:
            what = not_a_file(rng, path)
        else:
            content, what = damaged_safetensors(rng, path.read_bytes())
            path.write_bytes(content)
        case.what = f"{name}: {what}"
        case.before = snapshot(folder)
        return case


class Configs:
    """Damages generation_config.json, and runs a stage that reads it or adds to it."""

    def __init__(self, world: World):
        self._stages = Stages(world)

    def make(self, rng: random.Random, folder: Path) -> Case:
        argv = rng.choice([self._stages.stage1, STAGE2, STAGE2, STAGE3, STAGE3, STAGE3])
        case = self._stages.case(folder, argv, "")
        path = folder / "run" / CONFIG
        how = rng.random()
        if how < 0.08:
            what = not_a_file(rng, path)
        elif how < 0.2:
            content, what = _edited(rng, path.read_bytes())
            path.write_bytes(content)
        else:
            content, what = damaged_json(rng, path.read_bytes())
            path.write_bytes(content)
        case.what = f"{argv[0]}: {what}"
        case.before = snapshot(folder)
        return case


def _edited(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """Changes a setting to another value of its kind, and keeps the fingerprint."""
    document = json.loads(content)
    stage = rng.choice([key for key, value in document.items() if isinstance(value, dict)])
    section = document[stage]
    settings = [p for p in paths(section) if p and p[0] not in ("made_with", "fingerprint")]
    path = rng.choice(settings)
    value = section
    for key in path:
        value = value[key]
    if isinstance(value, bool):
        new: object = not value
    elif isinstance(value, int | float):
        new = value + rng.choice([1, 4, 16])
    elif isinstance(value, str):
        new = rng.choice(["A blue dog", "bfloat16", value + "x", "/tmp/other"])
    else:
        new = 5
    text = json.dumps(new)
    return replaced(document, (stage, *path), text), f"{stage}.{path} edited to {text}"


def ended_well(_: Ended, __: list[str]) -> list[str]:
    """Accepts any result of a run that ended in the expected way."""
    return []
