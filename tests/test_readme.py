"""The modules and names in README's routes through the code exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
_TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
ROUTES = _TEXT.partition("## Two ways through the code")[2].partition("\n## ")[0]


def named():
    """Pairs of a file and a name in it, or None; a bare file is in the folder of the one before it on its line."""
    for line in ROUTES.splitlines():
        folder = ""
        for path, name in re.findall(r"([\w/]+\.py)(?:: (\w+(?:\.\w+)?))?", line):
            if "/" in path:
                folder = path.rpartition("/")[0] + "/"
            yield (path if "/" in path else folder + path), name or None


def test_the_routes_name_enough():
    assert len(set(named())) > 30


@pytest.mark.parametrize(("path", "name"), sorted(set(named()), key=str))
def test_module_and_name_exist(path, name):
    found = [root / path for root in (ROOT / "dmosnet_jax", ROOT) if (root / path).is_file()]
    assert len(found) == 1, path
    if name is None:
        return
    names = set()
    for node in ast.parse(found[0].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    assert name in names, f"{path}: {name}"
