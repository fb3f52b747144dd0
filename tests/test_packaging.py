"""The wheel: what it holds, what it asks for, and that it works away from the checkout."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
import safetensors.numpy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dmosnet_jax import models
from dmosnet_jax.export import torch_export

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("dmosnet_jax", "data_prep", "configs")
OF_CONVERSION_OR_PEERS = {"tensorflow", "tensorflow-cpu", "apache-beam", "pyarrow", "torch"}
pytestmark = pytest.mark.slow


def pip(*args):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, args)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from a copy of the sources and installed without its requirements into a folder of its own."""
    # In the checkout, setuptools would pack what earlier builds left behind.
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", f"--wheel-dir={wheels}", source)
    pip("install", "--no-index", "--no-deps", f"--target={target}", *wheels.iterdir())
    return target


def run(installed, folder, *command):
    """Runs a Python command in a folder, where the packages are those of the wheel."""
    environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights of osnet_x0_25 in torchreid's layout."""
    model = models.build("osnet_x0_25", neck="fc", image_size=(64, 32))
    path = tmp_path_factory.mktemp("weights") / "osnet_x0_25.safetensors"
    safetensors.numpy.save_file(torch_export.to_state_dict(*model.init(jax.random.key(0)), model), path)
    return path


# What a program runs at its end: prints whether it used our packages, and files of theirs that are not the wheel's.
WHERE_FROM = f"""
import os, runpy, sys
def stray():
    own = [module for name, module in sys.modules.items() if name.partition(".")[0] in {PACKAGES}]
    files = [file for file in (getattr(module, "__file__", None) for module in own) if file]
    print(len(files) > 5, [file for file in files if not file.startswith(os.environ["PYTHONPATH"])])
"""
EVALUATE = f"""{WHERE_FROM}
try:
    runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
finally:
    stray()
"""
LOAD = f"""{WHERE_FROM}
import dmosnet_jax, numpy
extractor = dmosnet_jax.load(sys.argv[1], image_size=(64, 32))
print(extractor(numpy.zeros((2, 80, 40, 3), numpy.uint8)).shape)
stray()
"""


def test_every_module_is_inside_and_configs_is_no_package_of_its_own(installed):
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    sources = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert files == {f"dmosnet_jax/{name}" if name.startswith("configs/") else name for name in sources}
    for name in ("py.typed", "evaluation/report.html", "export/model_card.md", "demo/page.html"):
        assert (installed / "dmosnet_jax" / name).exists()


def required(asked):
    """Names of all distributions that come with `asked`, as what is installed here asks for more of them."""
    names, seen, waiting = set(), set(), [Requirement(text) for text in asked]
    while waiting:
        one = waiting.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        names.add(name)
        for text in importlib.metadata.requires(name) or ():
            more = Requirement(text)
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                waiting.append(more)
    return names


def test_nothing_of_conversion_is_required(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    asked = [text for text in distribution.requires if "extra ==" not in text]
    names = required(asked)
    assert {"jax", "jaxlib", "flax", "grain"} <= names
    assert not names & OF_CONVERSION_OR_PEERS
    # The same walk finds them where they are asked for.
    assert {"apache-beam", "pyarrow"} <= required([*asked, "apache-beam", "tensorflow-datasets"])


def test_evaluation_elsewhere(installed, weights, tiny_data, tmp_path):
    fields = {"dataset": "tiny", "data_dir": tiny_data, "checkpoint": weights, "model.name": "osnet_x0_25"}
    fields |= {"image_size": "(64, 32)", "eval.batch_size": 16}
    flags = ["--config=configs/evaluate.py", *(f"--config.{name}={value}" for name, value in fields.items())]
    finished = run(installed, tmp_path, "-c", EVALUATE, *flags)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "True []"
    results = json.loads((tmp_path / "runs" / "evaluate" / "results.json").read_text())
    assert results["num_valid_query"] == 48


def test_features_elsewhere(installed, weights, tmp_path):
    finished = run(installed, tmp_path, "-c", LOAD, weights)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == ["(2, 512)", "True []"]


def test_console_scripts(installed, tmp_path):
    scripts = installed / "bin"
    finished = run(installed, tmp_path, scripts / "dmosnet", "--config=configs/nowhere.py")
    assert finished.returncode == 2
    packaged = installed / "dmosnet_jax" / "configs" / "nowhere.py"
    assert finished.stderr == (
        f"error: --config=configs/nowhere.py: no such file, and no {packaged}: give configs/<file>.py[:arguments]\n"
    )
    for name in ("dmosnet-convert", "dmosnet-lint"):
        finished = run(installed, tmp_path, scripts / name, "--help")
        assert (finished.returncode, "--dataset" in finished.stdout) == (0, True), finished.stderr


def test_a_config_of_ones_own_imports_what_the_package_has(installed, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("CHECKPOINT = 'nowhere.pth'")
    (tmp_path / "configs" / "own.py").write_text(
        "from configs import base, evaluate\n"
        "def get_config():\n"
        "    return evaluate.get_config(f'tiny,checkpoint={base.CHECKPOINT}')"
    )
    for command in ([installed / "bin" / "dmosnet"], ["-m", "dmosnet_jax.main"]):
        finished = run(installed, tmp_path, *command, "--config=configs/own.py")
        assert (finished.returncode, finished.stderr.count("\n")) == (1, 1)
        assert "nowhere.pth" in finished.stderr
