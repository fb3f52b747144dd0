"""Training, evaluation and extraction on a machine without TensorFlow, torch and Beam."""

import pytest

# Runs the command line where the packages can't be imported, or (argv[1] "present") where they may be but need not.
PROGRAM = """
import runpy, sys

BLOCKED = ("tensorflow", "torch", "apache_beam")
if sys.argv.pop(1) == "absent":
    sys.modules.update(dict.fromkeys(BLOCKED))
try:
    runpy.run_module("dmosnet_jax.main", run_name="__main__", alter_sys=True)
finally:
    print("imported:", [name for name in BLOCKED if sys.modules.get(name)])
"""


@pytest.fixture(scope="module")
def trained(cli, tiny_flags, tmp_path_factory):
    """Workdir and outcome of a short training by each recipe, without the packages."""

    def run(recipe):
        workdir = tmp_path_factory.mktemp(recipe) / "run"
        fields = {"train.epochs": 1, "train.steps_per_epoch": 2}
        return workdir, cli("absent", *tiny_flags(recipe, **fields), f"--workdir={workdir}", script=PROGRAM)

    return {recipe: run(recipe) for recipe in ("finetune", "spcl_market1501")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune", "spcl_market1501"])
def test_training_needs_none_of_them(trained, recipe):
    workdir, finished = trained[recipe]
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert (workdir / "results.json").exists()
    assert "imported: []" in finished.out


@pytest.mark.slow
@pytest.mark.parametrize("presence", ["absent", "present"])
def test_evaluation_and_extraction_import_none_of_them(trained, cli, tiny_flags, tmp_path, rng, presence):
    from PIL import Image

    workdir, _ = trained["finetune"]
    flags = tiny_flags("evaluate", checkpoint=workdir)
    finished = cli(presence, *flags, f"--workdir={tmp_path}", script=PROGRAM)
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert "imported: []" in finished.out
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (64, 32, 3), dtype="uint8")).save(tmp_path / f"{name}.png")
    fields = {"images": tmp_path, "checkpoint": workdir, "output": tmp_path / "features.npz"}
    finished = cli(presence, *tiny_flags("extract", **fields), script=PROGRAM)
    assert finished.status == 0, finished.err
    assert "2 features of 128 values" in finished.out
    assert "imported: []" in finished.out
