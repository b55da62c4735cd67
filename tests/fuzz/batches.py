"""Damaged folders and job files of batch.py, and damaged videos for `batch.py rerun`."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

from stages import sections
from tests.fuzz.damage import (
    VALUES,
    at,
    damaged_json,
    damaged_safetensors,
    damaged_text,
    not_a_file,
    paths,
)  # fmt: skip
from tests.fuzz.harness import (
    Case,
    Ended,
    World,
    batch_arguments,
    copy_tree,
    file_digest,
    job_line,
    snapshot,
)  # fmt: skip
from tests.fuzz.stages import (
    CONFIG,
    EMBEDDINGS,
    LATENTS,
    SHEET,
    STAGE1,
    STAGE2,
    STAGE3,
    VIDEO,
    content_problems,
    ended_well,
    packets,
    section_problems,
    tag,
)  # fmt: skip

_MADE = (EMBEDDINGS, LATENTS, VIDEO, SHEET, CONFIG)
_JOBS = 3


def made_files(batch: Path) -> dict[str, str]:
    """Returns digests of all that the stages made in a batch's folder."""
    found = {}
    for folder in sorted(batch.glob("job*")):
        for name in _MADE:
            path = folder / name
            found[f"{folder.name}/{name}"] = file_digest(path) if path.is_file() else "missing"
    return found


class Jobs:
    """Damages a batch's folder or its job file, and runs the same command again.

    A run with exit code 0 must leave the files of an undisturbed batch, byte for byte but for what
    a damaged record says of versions and machines. One with exit code 3 may lack those of the
    damaged job, which it must name.
    """

    def __init__(self, world: World):
        self._command = ["batch.py", *batch_arguments(world)]
        base = world.root / "batches"
        base.mkdir()
        (base / "jobs.jsonl").write_text("".join(map(job_line, range(_JOBS))))
        world.run(*self._command, "--stages=1,2", cwd=base)
        self._halves = copy_tree(base, world.root / "halves")
        world.run(*self._command, cwd=base)
        self._done = base
        self._good = made_files(base / "batch")

    def make(self, rng: random.Random, folder: Path) -> Case:
        copy_tree(self._done if rng.random() < 0.7 else self._halves, folder)
        if rng.random() < 0.2:
            return self._damaged_job_file(rng, folder)
        job = rng.choice(sorted((folder / "batch").glob("job*")))
        what = _damage_job(rng, job)
        argv = self._command if rng.random() < 0.75 else ["batch.py", "status", "batch"]
        case = Case(f"{argv[1]} {job.name[:4]}: {what}", folder, argv, ended_well)
        case.codes = (0, 2, 3)
        if argv is self._command:
            case.right = lambda ended, changed: self._right(folder)
            case.may_change = lambda name: name.startswith("batch/")
            self._watch_others(case, job.name)
        case.before = snapshot(folder)
        return case

    def _right(self, folder: Path) -> list[str]:
        made = made_files(folder / "batch")
        problems = []
        for name in [name for name in self._good if made.get(name) != self._good[name]]:
            path, good = folder / "batch" / name, self._done / "batch" / name
            if not path.is_file():
                problems.append(f"exit 0 without {path.name}")
            elif path.name == CONFIG:
                problems += section_problems(path, good)
            else:
                problems += content_problems(path, good)
        return problems

    def _watch_others(self, case: Case, damaged: str) -> None:
        """With exit code 3, all other jobs must be made."""
        right = case.right

        def check(ended: Ended, changed: list[str]) -> list[str]:
            if ended.code == 0:
                return right(ended, changed)
            made = made_files(case.folder / "batch")
            lost = [
                name for name, digest in self._good.items()
                if not name.startswith(damaged) and made.get(name) != digest
            ]  # fmt: skip
            problems = [f"exit 3, and another job lacks {lost[0].split('/')[1]}"] if lost else []
            if damaged not in ended.out + ended.err:
                problems.append("exit 3 without the job's name")
            return problems

        case.right = check

    def _damaged_job_file(self, rng: random.Random, folder: Path) -> Case:
        path = folder / "jobs.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        number = rng.randrange(len(lines))
        how = rng.random()
        if how < 0.15:
            what = not_a_file(rng, path)
        elif how < 0.75:
            content, what = damaged_json(rng, lines[number])
            lines[number] = content.replace(b"\n", b" ") + b"\n"
            path.write_bytes(b"".join(lines))
        else:
            content, what = damaged_text(rng, path.read_bytes())
            path.write_bytes(content)
        case = Case(f"jobs.jsonl: {what}", folder, [*self._command, "--dry_run"], ended_well)
        case.listed = re.compile(r"jobs\.jsonl:\d+: ")
        case.before = snapshot(folder)
        return case


def _damage_job(rng: random.Random, job: Path) -> str:
    records = sorted(path.name for path in job.glob("stage*_record.json"))
    claims = sorted(path for path in (job / "claims").iterdir() if path.name.isdecimal())
    how = rng.random()
    if how < 0.35:
        path = job / rng.choice(["job.json", *records])
        content, what = damaged_json(rng, path.read_bytes())
        path.write_bytes(content)
        return f"{path.name}: {what}"
    if how < 0.65:
        return _damage_claim(rng, claims[-1])
    if how < 0.75:
        path = job / rng.choice(["job.json", *records, CONFIG, f"claims/{claims[-1].name}"])
        return f"{path.name}: {not_a_file(rng, path)}"
    if how < 0.8:
        path = job / CONFIG
        content, what = damaged_json(rng, path.read_bytes())
        path.write_bytes(content)
        return f"{path.name}: {what}"
    if how < 0.85:
        name = rng.choice(["job.json", CONFIG, *records])
        (job / name).unlink()
        return f"{name} is missing"
    present = [name for name in (EMBEDDINGS, LATENTS, VIDEO, SHEET) if (job / name).exists()]
    path = job / rng.choice(present)
    if rng.random() < 0.3:
        return f"{path.name}: {not_a_file(rng, path)}"
    if path.suffix == ".safetensors":
        content, what = damaged_safetensors(rng, path.read_bytes())
    else:
        content = path.read_bytes()
        content, what = rng.choice([
            (content[: rng.randrange(len(content))], "truncated"),
            (b"", "empty"),
            (rng.randbytes(1000), "random bytes"),
        ])  # fmt: skip
    path.write_bytes(content)
    return f"{path.name}: {what}"


def _damage_claim(rng: random.Random, claim: Path) -> str:
    """Damages the last claim, or adds a worse one after it."""
    owner = json.loads(claim.read_bytes())
    now = time.time()
    touched, what = now, ""
    how = rng.randrange(8)
    if how == 0:
        content, what = damaged_json(rng, claim.read_bytes())
    elif how == 1:
        content, what = b"", "empty"
    elif how == 2:  # on another machine, whose clock is an hour ahead
        owner |= {"machine": "another", "expiry": 5}
        content, touched, what = json.dumps(owner).encode(), now + 3600, "of a clock an hour ahead"
    elif how == 3:
        owner |= {"machine": "another", "expiry": rng.choice([1e300, 1e9, "5", None, [], -1])}
        content, what = json.dumps(owner).encode(), f"expires in {owner['expiry']}"
    elif how == 4:
        owner["pid"] = rng.choice([0, -1, 10**30, "1", None, 1.5, [], "../self"])
        content, what = json.dumps(owner).encode(), f"of process {owner['pid']}"
    elif how == 5:
        document = json.loads(claim.read_bytes())
        key = rng.choice(list(document))
        del document[key]
        content, what = json.dumps(document).encode(), f"without {key}"
    elif how == 6:  # a number that no counter reaches
        name = rng.choice(["9" * 40, "٣", "99999999999999999999", "07", "²"])
        claim = claim.with_name(name)
        content, what = json.dumps(owner).encode(), f"number {name}"
    else:
        content, what = rng.choice([b"null", b"[]", b"{", b"\xff", b"[" * 200_000]), "no claim"
    claim.write_bytes(content)
    if rng.random() < 0.7 or how == 2:
        os.utime(claim, (touched, touched))
        what += ", just touched"
    else:
        os.utime(claim, (0, 0))
        what += ", released"
    return f"claim: {what}"


class Tags:
    """Damages a video's tag or its frames, and runs `batch.py rerun` on it.

    A run with exit code 0 must make the video of the undamaged tag, unless the tag is valid and
    asks for another one.
    """

    def __init__(self, world: World):
        base = world.root / "tags"
        base.mkdir()
        for command in ([*STAGE1, f"--model_id={world.model}"], STAGE2, STAGE3):
            world.run(*command, cwd=base)
        self._video = base / "tagged.mp4"
        shutil.copyfile(base / "run" / VIDEO, self._video)
        text = tag(self._video)
        assert text
        self._document = json.loads(text)
        self._packets = packets(self._video)
        # Next to the untagged video lie the settings of a later run.
        world.run(*STAGE2, "--seed=7", cwd=base)
        world.run(*STAGE3, cwd=base)
        self._other_config = (base / "run" / CONFIG).read_bytes()
        self._untagged = base / "untagged.mp4"
        _set_tag(self._video, None, base / "untagged.mp4")

    def make(self, rng: random.Random, folder: Path) -> Case:
        run = folder / "run"
        run.mkdir(parents=True)
        video = run / VIDEO
        argv = ["batch.py", "rerun", f"run/{VIDEO}", "--output_dir=again"]
        case = Case("", folder, argv, lambda ended, changed: self._right(folder))
        how = rng.random()
        if how < 0.1:
            content = bytearray(self._video.read_bytes())
            if rng.random() < 0.5:
                position = rng.randrange(len(content))
                video.write_bytes(content[:position])
                case.what = f"video truncated at {position}"
            else:
                position = content.index(b"moov") + rng.randrange(3000)
                content[position % len(content)] ^= 1 << rng.randrange(8)
                video.write_bytes(content)
                case.what = f"bit flipped at {position}"
        elif how < 0.17:
            video.write_bytes(self._untagged.read_bytes())
            if rng.random() < 0.7:
                (run / CONFIG).write_bytes(self._other_config)
                case.what = "no tag, and the settings beside it are of the run that came after"
            else:
                case.what = "no tag, and no settings beside it"
        elif how < 0.25:
            video.write_bytes(self._video.read_bytes())
            case.what = not_a_file(rng, video)
        elif how < 0.55:
            text, case.what = damaged_json(rng, json.dumps(self._document).encode())
            _set_tag(self._video, text.decode("utf-8", "replace"), video)
        else:
            document, case.what = _hostile(rng, self._document)
            _set_tag(self._video, document, video)
            case.right = lambda ended, changed: _only_in_again(changed)
        # A refusal comes before anything is written; a run that began and failed left its files.
        case.before = snapshot(folder)
        return case

    def _right(self, folder: Path) -> list[str]:
        made = folder / "again" / VIDEO
        if not made.is_file():
            return ["exit 0 without a video"]
        if packets(made) != self._packets:
            return ["exit 0 with other frames"]
        return []


def _only_in_again(changed: list[str]) -> list[str]:
    outside = [name for name in changed if name.split("/")[0] != "again"]
    return [f"exit 0, and wrote {outside[0]}"] if outside else []


def _hostile(rng: random.Random, document: dict) -> tuple[str, str]:
    """Changes one setting of a tag, and seals its sections again with valid fingerprints."""
    document = json.loads(json.dumps(document))
    stage = rng.choice([key for key, value in document.items() if isinstance(value, dict)])
    places = [p for p in paths(document[stage]) if p and p[0] != "fingerprint"]
    where = rng.choice(places)
    name = rng.choice(list(VALUES))
    specials = {
        ("output_video", 0): ["../outside.mp4", "/dev/null", "x.avi", "--help", "a/\0b.mp4"],
        ("prompt",): ["--help", "\x1b]0;title\x07", "-" * 9, " ", "\u202e", "x" * 60_000],
        ("model_id",): ["../..", "/dev", "no/such", "http://x/y", "\x1b[2J"],
        ("height",): [10**9, -16, 31, 1 << 64],
        ("num_inference_steps",): [10**12, 0, 1001],
        ("made_with", "decoder"): ["vae_os", "flax;", "../x", "\x1b[31m"],
        ("made_with", "versions", "jax"): ["\x1b[31m9", 9, None],
    }
    owner = at(document, (stage, *where[:-1]))
    if rng.random() < 0.5:
        where = rng.choice([w for w in specials if _has(document[stage], w)])
        value: object = rng.choice(specials[where])
        owner = at(document, (stage, *where[:-1]))
        shown = repr(value)[:30]
    else:
        try:
            value, shown = json.loads(VALUES[name]), name
        except (ValueError, RecursionError):
            value, shown = "\x1b[31m", "a terminal escape"
    owner[where[-1]] = value  # type: ignore[index, call-overload]
    if rng.random() < 0.2:
        document[stage].setdefault("made_with", {})
        document[stage]["made_with"] = {"versions": {"no_such_library": "1"}, "decoder": "torchax"}
        shown += ", and an unknown library"
    section = document[stage]
    try:
        settings = {k: v for k, v in section.items() if k not in ("fingerprint", "checksum")}
        section["fingerprint"] = sections.fingerprint(settings)
        section["checksum"] = sections.checksum(section)
        whole = json.dumps(document)
    except (ValueError, TypeError, RecursionError):
        whole = "[" * 1000
    return whole, f"whole tag, {stage}.{'.'.join(map(str, where))} is {shown}"


def _has(section: dict, where: tuple) -> bool:
    try:
        at(section, where)  # type: ignore[arg-type]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _set_tag(source: Path, text: str | None, target: Path) -> None:
    """Copies a video with another comment."""
    from imageio_ffmpeg import get_ffmpeg_exe

    command = [get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(source)]
    notes = target.with_name("tag.txt")
    if text is None:
        command += ["-map_metadata", "-1"]
    else:
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", text.replace("\0", ""))
        notes.write_text(f";FFMETADATA1\ncomment={escaped}\n", "utf-8")
        command += ["-i", str(notes), "-map_metadata", "1"]
    subprocess.run([*command, "-c", "copy", str(target)], check=True, stdin=subprocess.DEVNULL)
    notes.unlink(missing_ok=True)
