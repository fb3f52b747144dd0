"""Commands of the README and of `docs/`: the tutorial runs; each of the others is one that a test runs on small data.

As they are written most need a data set that cannot be given away, or devices that are not here; so every command is
parsed as the program parses it, and `RUN_BY` names the test that runs its config or module.
"""

import importlib.util
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

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
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
    "launch": "test_launch.py",
}
NOT_RUN = {
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
    lines += [span for span in spans if re.match(r"(RUN|launch/\S+|python3? -m|pip install|tfds build) .", span)]
    # `&&` joins commands, and `RUN` is short for one; quotes are left alone.
    parts = [part.strip() for line in lines for part in line.split("&&")]
    # Without arguments it is what `RUN` stands for.
    return [part for part in parts if part and not part.startswith((". ", "#")) and not part.endswith("jax.main")]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in _commands(page)})


def _parsed(command: str) -> tuple[str, list[str]]:
    """What runs it, by its name in `RUN_BY` or `NOT_RUN`, and its arguments."""
    words = shlex.split(re.sub(r"^RUN\b|\bdmosnet_jax\.main\b", "python -m dmosnet_jax.main", command, count=1))
    words = [word for word in words if not re.match(r"[A-Z]+=", word)]
    if words[0] in ("pip", "tfds", "mkdocs", "tensorboard"):
        return words[0], words[1:]
    if words[0].startswith("launch/"):
        return "launch", [words[0].removeprefix("launch/"), *words[1:]]
    assert words[0].startswith("python"), command
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
    assert name.rpartition(".")[2] in test, f"{RUN_BY[name]} does not run {name}"


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


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    """As it is written, but for the installation; its Python too."""
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("could not import tensorflow: the conversion needs the convert extra")
    blocks = [block for block in _blocks(TUTORIAL, "(?:sh|python)") if "venv" not in block]
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    environment = os.environ | {
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "XLA_FLAGS": "",
    }
    python = _blocks(TUTORIAL, "python")
    assert len(blocks) >= 6
    for block in blocks:
        program = [sys.executable, "-c", block] if block in python else ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr[-2000:]}"
    made = ("runs/tutorial/report.html", "runs/compare/compare.html", "matches.html", "person.onnx", "raw/query")
    assert [name for name in made if not (tmp_path / name).exists()] == []


def test_every_page_is_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(site["nav"]) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_what_is_cited_is_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dmosnet_jax.__version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
