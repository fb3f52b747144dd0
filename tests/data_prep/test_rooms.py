"""Inside of `data_prep` rooms import downward too, and what worker processes import is small."""

import ast
import pathlib
import subprocess
import sys

import pytest

import data_prep

FOLDER = pathlib.Path(data_prep.__file__).parent
# A room may import those to its left; the commands may import all.
ROOMS = ("sources", "check", "write", "builders")


def imported(path):
    """Dotted names of what a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downward(room):
    below = {*ROOMS[: ROOMS.index(room) + 1]}
    paths = list((FOLDER / room).glob("*.py"))
    assert len(paths) > 1
    for path in paths:
        used = {name.split(".")[1] for name in imported(path) if name.startswith("data_prep.")}
        assert used <= below, path


def test_the_renderer_needs_nothing_of_the_conversion():
    for path in (FOLDER / "synthetic").glob("*.py"):
        used = {".".join(name.split(".")[:2]) for name in imported(path) if name.startswith("data_prep.")}
        assert used <= {"data_prep.synthetic"}, path


def test_worker_processes_import_neither_tensorflow_nor_beam():
    code = "import sys, data_prep.write.pool; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert "data_prep.write.shards" in names
    assert not names & {"tensorflow", "tensorflow_datasets", "apache_beam", "jax", "torch", "h5py", "lmdb"}
