"""The documents name only files, links, flags and targets that exist; the README stays short."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "models/toyworld/README.md",
    ROOT / "models/toyworld-i2v/README.md",
    ROOT / "splash_attention/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "utils.py")
STAGES = {"stage2": "stage2_transformer.py", "stage3": "stage3_vae_decoder.py"}
# Paths into these must exist; other folders that the documents name are the reader's own.
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {
    "benchmarks",
    "docs",
    "models",
}

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"\bpython3? (-m [\w.]+|[\w./]+\.py)([^\n#'`&|]*)")
_FLAG = re.compile(r"(?<![\w=-])--[a-z][\w-]*")
_MAKE = re.compile(r"^(?:[A-Z_]+=\S+ )*make ([\w-]+)", re.MULTILINE)
_TOKEN = re.compile(r"[\w.*-]+(?:/[\w.*-]*)*")


def code_of(document: Path) -> list[str]:
    """The inline code and the fenced blocks of a document, continued lines joined."""
    text = document.read_text("utf-8")
    blocks = [body.replace("\\\n", " ") for _, body in _FENCE.findall(text)]
    return [*_INLINE.findall(_FENCE.sub("", text)), *blocks]


def commands_of(document: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every Python command of a document: what to ask for its help, and its arguments."""
    for code in code_of(document):
        for program, arguments in _COMMAND.findall(code):
            words = arguments.split()
            if program == "-m pytest":
                continue
            if program == "batch.py" and words[:1] in (["status"], ["rerun"], ["prune"]):
                yield (program, words[0]), arguments
            elif program == "serve.py" and words[:1] == ["worker"]:
                yield (program, words[0]), arguments
            else:
                yield tuple(program.split()), arguments


# Prints the text of --help of each program, in one process: most of the time is imports.
_HELP = """
import contextlib, io, json, runpy, sys
helps = []
for program in json.loads(sys.argv.pop()):
    module = program[0] == "-m"
    sys.argv = [*program[module:], "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        if module:
            runpy.run_module(program[1], run_name="__main__")
        else:
            sys.path.insert(0, program[0].rpartition("/")[0])
            runpy.run_path(program[0], run_name="__main__")
    helps.append(printed.getvalue())
print(json.dumps(helps))
"""


def flags_of(programs: Sequence[tuple[str, ...]]) -> list[frozenset[str]]:
    """The flags that each program's --help lists, with underscores."""
    done = subprocess.run(
        [sys.executable, "-c", _HELP, json.dumps(programs)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout)
    assert all("usage:" in text for text in helps), dict(zip(programs, helps, strict=True))
    return [frozenset(flag.replace("-", "_") for flag in _FLAG.findall(text)) for text in helps]


def heading_links(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = _FENCE.sub("", document.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(document: Path, name: str) -> bool:
    """Whether a path exists from the root or from the document's folder; `*` matches anything."""
    return any(next(folder.glob(name), None) is not None for folder in (ROOT, document.parent))


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def test_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    missing = [name for name in map(name_of, DOCUMENTS[1:]) if f"({name}" not in text]
    assert not missing, "pages that README.md does not link"
    assert not [script for script in SCRIPTS if f"`{script}`" not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_files_exist(document: Path):
    missing = []
    for link in _LINK.findall(document.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in heading_links(target)):
            missing.append(link)
    for code in code_of(document):
        for token in _TOKEN.findall(code):
            in_folder = "/" in token and token.split("/")[0] in FOLDERS
            if (in_folder or token.endswith((".py", ".md"))) and not exists(document, token):
                missing.append(token)
    assert not missing, "links and files that do not exist"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_exist(document: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {name for code in code_of(document) for name in _MAKE.findall(code)}
    assert named <= targets


@pytest.fixture(scope="module")
def flags() -> dict[tuple[str, ...], frozenset[str]]:
    """The flags of every script and of every program that the documents run."""
    programs = {(script,) for script in SCRIPTS}
    programs |= {("batch.py", command) for command in ("status", "rerun", "prune")}
    programs.add(("serve.py", "worker"))
    programs |= {program for document in DOCUMENTS for program, _ in commands_of(document)}
    ordered = sorted(programs)
    return dict(zip(ordered, flags_of(ordered), strict=True))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_flags_exist(document: Path, flags: dict[tuple[str, ...], frozenset[str]]):
    unknown = []
    for program, arguments in commands_of(document):
        known = set(flags[program])
        if program == ("-m", "tests.tpu_path") and arguments.split():
            known |= flags[(STAGES[arguments.split()[0]],)]
        for flag in _FLAG.findall(arguments):
            if flag.replace("-", "_") not in known:
                unknown.append(f"{' '.join(program)} {flag}")
    every_flag = frozenset().union(*flags.values())
    # Flags in the text stand without their script.
    for code in code_of(document):
        if code.startswith("--") and code.split()[0].replace("-", "_") not in every_flag:
            unknown.append(code)
    assert not unknown, "flags that --help does not list"
