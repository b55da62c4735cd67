"""The rules of the file tree, checked on the syntax trees of all modules; nothing is imported.

A room imports itself and the rooms below it. Imports inside functions count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms by floor, the highest first. Rooms of one floor do not import each other.
FLOORS = (
    ("scripts", "benchmarks", "tests"),
    ("web",),
    ("jobs",),
    ("toyworld", "stages"),
    ("cogvideox.denoising", "cogvideox.lora"),
    ("cogvideox.transformer", "cogvideox.vae", "cogvideox.video", "cogvideox.text"),
    ("cogvideox.model",),
    ("runtime", "splash_attention"),
)
FLOOR_OF = {room: -i for i, floor in enumerate(FLOORS) for room in floor}
# What a room may import beside itself, where that is less than all floors below it.
NARROW = {"utils": {"command_line", "runtime"}, "command_line": {"runtime"}}
WITH_COMMAND_LINES = ("scripts", "utils", "command_line", "benchmarks", "toyworld", "tests")

FILE_LINES, FUNCTION_LINES, ANYS = 400, 80, 20


def modules(root: Path) -> dict[str, Path]:
    """Every Python module of the project by its dotted name."""
    found = {}
    for path in sorted(root.glob("**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not any(part.startswith(".") or part in ("build", "shared") for part in parts):
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1 and parts[0] not in FLOOR_OF:
        # `cogvideox` itself holds only a docstring: it lies on no floor.
        return parts[0] if parts[0] in ("utils", "cogvideox") else "scripts"
    return ".".join(parts[:2]) if parts[0] == "cogvideox" else parts[0]


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the project that a module imports, also inside its functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            inner = {f"{base}.{name.name}" for name in node.names}
            found.update(inner & known.keys())
            if inner - known.keys():
                found.add(base)
    # Benchmarks import each other by bare names, from their own folder.
    beside = {name for name in found if f"benchmarks.{name}" in known and module in known}
    if room_of(module) == "benchmarks":
        found |= {f"benchmarks.{name}" for name in beside}
    return {name for name in found if name in known} - {module}


def upward_imports(root: Path) -> list[str]:
    known, found = modules(root), []
    for module, path in known.items():
        room = room_of(module)
        for imported in sorted(imports(module, path, known)):
            target = room_of(imported)
            if target in (room, "cogvideox") or room == "tests":
                continue
            if room in NARROW:
                allowed = target in NARROW[room]
            elif target in NARROW or (room == "benchmarks" and target == "scripts"):
                allowed = room in ("scripts", "benchmarks")
            else:
                allowed = FLOOR_OF[target] < FLOOR_OF[room]
            if not allowed:
                found.append(f"{module} imports {imported}")
    return found


def circles(root: Path) -> list[str]:
    """Circles of imports, each once, as "a -> b -> a"."""
    known = modules(root)
    graph = {module: sorted(imports(module, path, known)) for module, path in known.items()}
    found, done = [], set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for imported in graph[module]:
                visit(imported, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def long_files(root: Path) -> list[str]:
    found = []
    for module, path in modules(root).items():
        lines = len(path.read_text("utf-8").splitlines())
        if lines > FILE_LINES and room_of(module) not in ("benchmarks", "tests"):
            found.append(f"{path.relative_to(root)}: {lines} lines")
    return found


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(root: Path) -> list[str]:
    found = []
    for path in modules(root).values():
        for function in functions(path):
            first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            lines = (function.end_lineno or first) - first + 1
            if lines > FUNCTION_LINES:
                found.append(f"{path.relative_to(root)}: {function.name}: {lines} lines")
    return found


def anys(root: Path) -> list[str]:
    """Every `Any` in an annotation or expression of cogvideox/."""
    found = []
    for module, path in modules(root).items():
        if module.startswith("cogvideox"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                named = isinstance(node, ast.Name) and node.id == "Any"
                if named or (isinstance(node, ast.Attribute) and node.attr == "Any"):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    return found


def command_lines(root: Path) -> list[str]:
    """Imports of argparse outside the rooms that have command lines."""
    found = []
    for module, path in modules(root).items():
        if room_of(module) in WITH_COMMAND_LINES:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if "argparse" in names:
                found.append(f"{module} imports argparse")
    return found


def imports_by_string(root: Path) -> list[str]:
    """Calls of import_module and __import__, which this test could not follow."""
    found = []
    for module, path in modules(root).items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and room_of(module) not in ("benchmarks", "tests"):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else ""
                name = called.id if isinstance(called, ast.Name) else name
                if name in ("import_module", "__import__"):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    return found


RULES = (upward_imports, circles, long_files, long_functions, command_lines, imports_by_string)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule):
    assert "\n".join(rule(ROOT)) == ""


def test_cogvideox_is_typed():
    found = anys(ROOT)
    assert len(found) <= ANYS, found


VIOLATIONS = {
    upward_imports: [
        ("stages/a.py", "def f():\n    import jobs.b\n", {"jobs/b.py": ""}),
        ("cogvideox/vae/a.py", "from cogvideox.transformer import b\n",
         {"cogvideox/transformer/b.py": ""}),
        ("cogvideox/model/a.py", "from ..denoising.b import c\n",
         {"cogvideox/denoising/b.py": "c = 1"}),
        ("runtime/a.py", "import splash_attention\n", {"splash_attention/__init__.py": ""}),
        ("jobs/a.py", "import generate\n", {"generate.py": ""}),
        ("stages/a.py", "import utils\n", {"utils.py": ""}),
        ("utils.py", "import stages.a\n", {"stages/a.py": ""}),
    ],
    circles: [
        ("runtime/a.py", "from runtime import b\n", {"runtime/b.py": "import runtime.a\n"}),
    ],
    long_files: [("runtime/a.py", "a = 1\n" * (FILE_LINES + 1), {})],
    long_functions: [("tests/a.py", "def f():\n" + "    a = 1\n" * FUNCTION_LINES, {})],
    command_lines: [("stages/a.py", "def f():\n    from argparse import Namespace\n", {})],
    imports_by_string: [("cogvideox/vae/a.py", "__import__('b')\n", {})],
    anys: [("cogvideox/vae/a.py", "def f(a: list[Any]): ...\n", {})],
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "name", "text", "others"),
    [(rule, *case) for rule, cases in VIOLATIONS.items() for case in cases],
)
def test_a_planted_violation_is_found(rule, name, text, others, tmp_path):
    for file, content in {name: text, **others}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    assert len(rule(tmp_path)) == 1


def test_imports_downward_are_no_violation(tmp_path):
    for file, content in {
        "stage.py": "import utils, stages.a",
        "utils.py": "from runtime import c",
        "stages/a.py": "from cogvideox.vae import b",
        "cogvideox/vae/b.py": "from runtime.c import d",
        "runtime/c.py": "d = 1",
        "benchmarks/e.py": "import stage, utils, f",
        "benchmarks/f.py": "",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content)
    for rule in RULES:
        assert rule(tmp_path) == []
