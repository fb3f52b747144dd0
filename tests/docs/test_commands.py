"""Commands of README, CONTRIBUTING, ROADMAP and `docs/`: tutorial and notebook run; a test runs each of the others.

It does so on small data, or the list says why none does.

As they are written most need a data set that cannot be given away, or devices that are not here; so every command is
parsed as the program parses it, and `RUN_BY` names the test that runs its config or module.
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from absl import flags
from ml_collections.config_flags import config_flags

import dmosnet_jax
from dmosnet_jax.core.config import validate
from tests.conftest import CACHE, ROOT

ROOT_PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ROADMAP.md")]
PAGES = [*ROOT_PAGES, *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "notebook.ipynb"
# What runs a config or a module, by its name, on rendered data; `launch` on this machine, as far as that goes.
RUN_BY = {
    "activation_maps": "recipes/test_activation_maps.py",
    "cfs_luperson": "recipes/test_cfs.py",
    "compare": "recipes/test_compare.py",
    "evaluate": "recipes/test_scoring.py",
    "export": "recipes/test_export.py",
    "extract": "recipes/test_runs.py",
    "finetune": "recipes/test_runs.py",
    "index": "recipes/test_gallery.py",
    "quickstart": "recipes/test_quickstart.py",
    "search": "recipes/test_gallery.py",
    "spcl_luperson": "recipes/test_luperson.py",
    "spcl_market1501": "recipes/test_runs.py",
    "spcl_uda": "recipes/test_uda.py",
    "data_prep.benchmark": "data_prep/test_benchmark.py",
    "data_prep.convert": "data_prep/test_convert.py",
    "data_prep.lint": "data_prep/test_lint.py",
    "dmosnet_jax.benchmarks.checkpoints": "benchmarks/test_scale.py",
    "dmosnet_jax.benchmarks.clustering": "benchmarks/test_scale.py",
    "dmosnet_jax.benchmarks.complexity": "benchmarks/test_complexity.py",
    "dmosnet_jax.benchmarks.gallery": "benchmarks/test_exports.py",
    "dmosnet_jax.benchmarks.memory": "benchmarks/test_scale.py",
    "dmosnet_jax.benchmarks.onnx_runtime": "benchmarks/test_exports.py",
    "dmosnet_jax.benchmarks.speed": "benchmarks/test_speed.py",
    "dmosnet_jax.demo": "demo/test_page.py",
    "dmosnet_jax.tools.reproduce": "tools/test_reproduce.py",
    "tests.fuzz": "test_fuzz.py",
    "tests/golden/make_configs.py": "test_configs.py",
    "tests/golden/make_programs.py": "test_programs.py",
    "launch": "test_launch.py",
}
BASH = ["bash", "-euo", "pipefail", "-c"]
# Runs the cells of a notebook: those of the shell by bash, and what the last line of another is worth is shown.
AS_IN_A_NOTEBOOK = """
import ast, json, subprocess, sys

names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    text = "".join(cell["source"])
    if cell["cell_type"] != "code" or "install" in cell["metadata"].get("tags", ()):
        continue
    if text.startswith("!"):
        subprocess.run(["bash", "-euo", "pipefail", "-c", text[1:]], check=True)
        continue
    body = ast.parse(text).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if last is not None:
        print("shown:", eval(compile(ast.Expression(last.value), "cell", "eval"), names), flush=True)
"""
NOT_RUN = {
    "tests/golden/make_networks.py": "needs torchreid; models/test_committed_goldens.py reads what it wrote",
    ".ci/run": "runs this in a fresh environment",
    ".ci/versions": "runs this, in fresh environments of two Pythons",
    "git": "fetches a copy; .ci/run makes one",
    "ruff": "looks at the code; .ci/run does",
    "mypy": "looks at the code; .ci/run does",
    "tests.kill": "kills commands for minutes; recipes/test_resume.py has its cases",
    "pytest": "runs this",
    "pip": "installs packages; .ci/run does",
    "venv": "makes an environment; .ci/run runs the README's test command word for word",
    "mkdocs": "shows the site; .ci/run builds it",
    "tensorboard": "is another package's command; evaluation/test_projector.py reads the files as it does",
    "tfds": "is another package's command; data_prep/test_tfds.py builds with it",
}


def _blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def _commands(page: pathlib.Path) -> list[str]:
    """The lines of shell blocks, and the commands in the running text."""
    lines = [line for block in _blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    starts = r"(RUN|launch/\S+|python3? -m|pip install|tfds build|\w+=\S.* python) .|python tests/"
    lines += [span for span in spans if re.match(starts, span)]
    # `&&` joins commands, and `RUN` is short for one; quotes are left alone.
    parts = [part.strip() for line in lines for part in line.split("&&")]
    # Without arguments it is what `RUN` stands for.
    return [
        part for part in parts if part and not part.startswith((". ", "cd ", "#")) and not part.endswith("jax.main")
    ]


def _cells() -> list[str]:
    """The code of the notebook."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _shell(cell: str) -> str:
    """A cell's command as one line, "" where it is Python."""
    return " ".join(cell.removeprefix("!").replace("\\\n", " ").split()) if cell.startswith("!") else ""


COMMANDS = sorted(
    {(page.name, command) for page in PAGES for command in _commands(page)}
    | {(NOTEBOOK.name, _shell(cell)) for cell in _cells() if _shell(cell)}
)


def _plain(command: str) -> str:
    return re.sub(r"^RUN\b|\bdmosnet_jax\.main\b", "python -m dmosnet_jax.main", command, count=1)


def _parsed(command: str) -> tuple[str, list[str]]:
    """What runs it, by its name in `RUN_BY` or `NOT_RUN`, and its arguments."""
    # What a reader has to fill in stands in pointed brackets.
    words = shlex.split(re.sub(r"<[^>]*>", "PLACE", _plain(command)), comments=True)
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] in NOT_RUN:
        return words[0], words[1:]
    if words[0].startswith("launch/"):
        return "launch", [words[0].removeprefix("launch/"), *words[1:]]
    assert words[0].startswith("python"), command
    if words[1].endswith(".py"):
        return words[1], words[2:]
    assert words[1] == "-m", command
    if words[2] == "python":
        words = words[2:]
    return words[2], words[3:]


def test_there_are_as_many_as_there_seem_to_be():
    assert len(COMMANDS) > 60
    assert {page for page, _ in COMMANDS} >= {"README.md", "how-to.md", "tutorial.md", "trackers.md"}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_understood_and_run_by_a_test(page, command, monkeypatch):
    name, arguments = _parsed(command)
    if name == "dmosnet_jax.main":
        name = _check_run(arguments, monkeypatch)
    elif name == "launch":
        script, *rest = arguments
        assert (ROOT / "launch" / script).is_file()
        if rest:
            _check_run(rest, monkeypatch)
    elif name.endswith(".py"):
        assert (ROOT / name).is_file()
    elif name not in NOT_RUN:
        found = importlib.util.find_spec(name)
        assert found is not None, name
        source = pathlib.Path(found.origin)
        # A package's command is beside its `__init__.py`.
        text = "".join(file.read_text() for file in source.parent.glob("*.py"))
        for flag in (word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")):
            assert re.search(rf"[\"'](--)?{flag}[\"']", text) or flag == "help", flag
    if name in NOT_RUN:
        return
    test = (ROOT / "tests" / RUN_BY[name]).read_text(encoding="utf-8")
    assert re.split(r"[./]", name.removesuffix(".py"))[-1] in test, f"{RUN_BY[name]} does not run {name}"


def test_no_other_command_is_named():
    """What stands in the two lists is in a page; else the list says something of nothing."""
    found = {_parsed(command)[0] for _, command in COMMANDS}
    configs = {re.split(r"configs/|\.py", command)[1] for _, command in COMMANDS if "configs/" in command}
    assert set(RUN_BY) | set(NOT_RUN) == (found | configs) - {"dmosnet_jax.main"}


def _mentioned() -> list[tuple[str, str]]:
    """Fields of a config in the running text, `--config.FIELD=VALUE` or `part.field=value` with or without a value."""
    spans = set()
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", text):
            found = re.match(rf"(--config\.|(?={PARTS}\.))([a-z_0-9.]+)(=.*)?$", " ".join(span.split()))
            if found and not span.endswith((".py", ".md")):
                spans.add((found[2], found[3] or ""))
    return sorted(spans)


# Every field of every experiment, as `tests/golden/make_configs.py` writes them.
FIELDS = {
    path.stem: {line.partition(" = ")[0] for line in path.read_text(encoding="utf-8").splitlines()}
    for path in (ROOT / "tests" / "golden" / "configs").glob("*.txt")
}
# What a field means nothing without.
TOGETHER = {"eval.expansion_alpha": ["--config.eval.query_expansion=10"]}
PARTS = "(?:data|model|optim|train|eval|spcl|loss|augment|sampler|latency|onnx|cfs)"


@pytest.mark.parametrize(("field", "value"), _mentioned())
def test_a_field_in_the_text_is_one(field, value, monkeypatch):
    having = [name for name, fields in FIELDS.items() if any(f"{own}.".startswith(f"{field}.") for own in fields)]
    assert having, field
    # Capital letters and bars stand for what a reader fills in.
    if value and not re.search(r"[A-Z]{3}|\|", value):
        files = [name for name in having if (ROOT / "configs" / f"{name}.py").is_file()]
        more = TOGETHER.get(field, [])
        # What is about a ranking, other recipes refuse.
        name = "evaluate" if "evaluate" in files else min(files)
        _check_run([f"--config=configs/{name}.py", *more, *shlex.split(f"--config.{field}{value}")], monkeypatch)


def test_there_are_fields_in_the_text():
    assert len(_mentioned()) > 30


def _check_run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Parses and checks the flags of a run as the program does; returns the config's name."""
    known = (ROOT / "dmosnet_jax" / "main.py").read_text(encoding="utf-8")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    given = [word for word in arguments if word.startswith("--config")]
    for word in set(arguments) - set(given):
        assert f'"{word.partition("=")[0].removeprefix("--")}"' in known, word
    command = ["main", *(word.replace("--config=configs/", f"--config={ROOT}/configs/") for word in given)]
    # Where the library looks for the fields.
    monkeypatch.setattr(sys, "argv", command)
    values(command)
    validate(values["config"].value)
    return pathlib.Path(given[0].partition("=")[2].partition(":")[0]).stem


def _run(program: list[str], folder: pathlib.Path, what: str) -> str:
    """Runs a program of a page as a user would; returns what it prints."""
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    environment = os.environ | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "XLA_FLAGS": "",
    }
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{what}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """The folder in which the tutorial has been run as it is written, but for the installation; its Python too."""
    tmp_path = tmp_path_factory.mktemp("tutorial")
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("could not import tensorflow: the conversion needs the convert extra")
    blocks = [block for block in _blocks(TUTORIAL, "(?:sh|python)") if "venv" not in block]
    python = _blocks(TUTORIAL, "python")
    assert len(blocks) >= 6
    for block in blocks:
        _run([sys.executable, "-c", block] if block in python else [*BASH, block], tmp_path, block)
    return tmp_path


@pytest.mark.slow
def test_the_tutorial_runs(tutorial):
    made = ("runs/tutorial/report.html", "runs/compare/compare.html", "matches.html", "person.onnx", "raw/query")
    assert [name for name in made if not (tutorial / name).exists()] == []


def test_the_notebook_has_no_outputs():
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.slow
def test_the_notebook_runs(tutorial):
    """As it is, but for the installation, where the tutorial has run: the commands that take long are the same."""
    commands = [command for command in map(_shell, _cells()) if command]
    own = {" ".join(command.split()) for command in _commands(TUTORIAL)}
    assert [command in own for command in commands] == [False, True, True, True, False]
    printed = _run([sys.executable, "-c", AS_IN_A_NOTEBOOK, str(NOTEBOOK)], tutorial, NOTEBOOK.name)
    shown = [line.removeprefix("shown: ") for line in printed.splitlines() if line.startswith("shown: ")]
    assert "'mAP'" in shown[0]
    # Six images with their maps, and a query with what was found.
    assert [value.partition(" ")[0] for value in shown[1:]] == ["<PIL.Image.Image", "<PIL.Image.Image"]
    found = re.findall(r"^0\.\d{3}  (\d{4})_c([2-4])s1_\d{6}_\d\d\.jpg$", printed, re.MULTILINE)
    assert len(found) == 10


def test_every_page_is_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(site["nav"]) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_what_is_cited_is_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dmosnet_jax.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
