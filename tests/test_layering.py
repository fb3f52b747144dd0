"""Rooms import downward only, only conversion imports TensorFlow, and what is public says what it does."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = {
    "core": 0,
    "data": 1,
    "models": 1,
    "losses": 2,
    "memory": 2,
    "train": 3,
    "evaluation": 4,
    "export": 5,
    "recipes": 6,
    "demo": 6,
}
MAIN, ANYTHING = 7, 8
CONVERSION = {"tensorflow", "apache_beam"}
FILES = sorted([*ROOT.glob("dmosnet_jax/**/*.py"), *ROOT.glob("data_prep/**/*.py"), *ROOT.glob("configs/**/*.py")])


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names of what a file imports, wherever in the file; type-checking imports count too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level(name: str) -> int | None:
    """Level of a dotted name inside the package, None for names from elsewhere."""
    parts = name.split(".")
    if parts[0] != "dmosnet_jax":
        return None
    room = parts[1] if len(parts) > 1 else ""
    return {"main": MAIN, "benchmarks": ANYTHING, "tools": ANYTHING}.get(room, ROOMS.get(room, -1))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_below(path):
    parts = path.relative_to(ROOT).parts
    names = imported(path)
    tops = {name.split(".")[0] for name in names}
    if parts[0] == "data_prep":
        rooms = {name.split(".")[1] for name in names if name.startswith("dmosnet_jax.")}
        assert rooms <= {"core", "data"}
        assert "configs" not in tops
        return
    assert not tops & {*CONVERSION, "data_prep"}
    if parts[0] == "configs":
        assert {name.split(".")[1] for name in names if name.startswith("dmosnet_jax.")} <= {"core"}
        return
    assert "configs" not in tops
    if parts[1] in ("benchmarks", "tools", "__init__.py"):
        return
    assert "torch" not in tops
    own = MAIN if parts[1] == "main.py" else ROOMS[parts[1]]
    for name in names:
        other = level(name)
        if other is None:
            continue
        same_room = name.split(".")[1] == parts[1]
        assert same_room or other < own, f"{path.relative_to(ROOT)} [{own}] imports {name} [{other}]"


def test_every_room_is_known_and_described():
    rooms = {p.name for p in (ROOT / "dmosnet_jax").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == {*ROOMS, "benchmarks", "tools"}
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.relative_to(ROOT)}: no docstring"


def test_no_file_is_a_drawer():
    names = {path.name for path in FILES}
    assert not names & {"utils.py", "helpers.py", "misc.py"}


def public(node, prefix=""):
    """Names and nodes of what a module offers: functions, classes and methods without an underscore."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_are_documented(path):
    if path.parent.name == "configs":
        return
    silent = [name for name, node in public(ast.parse(path.read_text(encoding="utf-8"))) if not ast.get_docstring(node)]
    if "models" in path.parts:
        # A module of a network is described where it is defined.
        silent = [name for name in silent if "." not in name]
    silent = [name for name in silent if not name.endswith(".forward")]
    assert silent == []
