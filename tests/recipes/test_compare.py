"""Several checkpoints in one table: as each evaluated alone, as text, CSV and page."""

import csv
import functools
import json

import jax
import optax
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.config import checkpoint_paths
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.models import counting
from dmosnet_jax.recipes.compare import short_names
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints
from tests.recipes import small


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_writer):
    folder = tmp_path_factory.mktemp("several")
    tiny_writer(folder, "tiny")
    tiny_writer(folder, "other", ids=5, cameras=3, images=2)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of the small network, at other image sizes."""
    small.register()
    folder = tmp_path_factory.mktemp("runs")
    for name, size in (("first", (64, 32)), ("second", (32, 16))):
        model = models.build(small.NAME, image_size=size)
        mesh = make_mesh(jax.devices()[:1])
        state = train_state.create(*model.init(jax.random.key(len(name))), optax.identity(), seed=0, mesh=mesh)
        store = Checkpoints(folder / name)
        described = {"name": model.name, "neck": model.neck, "image_size": list(size)}
        store.save(state, {"model": described, "config": {}, "loop": {}})
        store.close()
    return folder


@pytest.fixture
def flags(tiny_flags, data_dir):
    """Flags without the fields that the checkpoints bring."""

    def made(recipe, **fields):
        options = functools.partial(tiny_flags, data_dir=data_dir, **{"model.name": small.NAME})
        return [flag for flag in options(recipe, **fields) if not flag.startswith("--config.image_size")]

    return made


def test_the_table_has_what_each_evaluation_finds(cli, flags, runs, tmp_path):
    paths = [runs / "first", runs / "second"]
    alone = {}
    for path in paths:
        workdir = tmp_path / path.name
        finished = cli.forked(*flags("evaluate", checkpoint=path, dataset="tiny+other"), f"--workdir={workdir}")
        assert finished.status == 0, finished.err
        alone[path.name] = json.loads((workdir / "results.json").read_text())
    workdir = tmp_path / "compare"
    fields = {"checkpoints": ",".join(map(str, paths)), "dataset": "tiny+other", "latency.repeats": 2}
    finished = cli.forked(*flags("compare", **fields), f"--workdir={workdir}")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    with open(workdir / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    places = [(label, name) for label in ("first", "second") for name in ("tiny", "other", "mean")]
    assert [(row["checkpoint"], row["data set"]) for row in rows] == places
    page = (workdir / "compare.html").read_text()
    for row, (label, name) in zip(rows, places, strict=True):
        found = alone[label]["mean"] if name == "mean" else alone[label]["datasets"][name]
        for column, metric in (("mAP", "mAP"), ("rank-1", "rank1"), ("mINP", "mINP")):
            assert float(row[column]) == pytest.approx(100 * found[metric])
            assert f"<td>{100 * found[metric]:.2f}</td>" in page
        model = models.build(small.NAME, image_size=(64, 32) if label == "first" else (32, 16))
        assert row["size"] == ("64x32" if label == "first" else "32x16")
        assert int(row["parameters"]) == counting.parameters(model)
        assert int(row["multiply-adds"]) == counting.operations(model).total
        assert float(row["ms an image"]) > 0
        words = next(line.split() for line in finished.out.splitlines() if line.startswith((f"{label} ",)))
        assert words[1:3] == [small.NAME, "tiny"]
    assert rows[0]["multiply-adds"] != rows[3]["multiply-adds"]
    for name in ("tiny", "other"):
        assert f"Cumulative matching characteristic on {name}" in page
        results = json.loads((workdir / "second" / name / "results.json").read_text())
        assert results == alone["second"]["datasets"][name]


@pytest.mark.parametrize(
    ("checkpoints", "status", "part"),
    [
        ("", 2, "checkpoints='' names no checkpoints: give --config.checkpoints=PATH,PATH"),
        ("{runs}/first,{runs}/nowhere", 1, "nowhere"),
        ("{runs}/first,{runs}/./first", 2, "must name each checkpoint once"),
    ],
)
def test_refusals(cli, flags, runs, tmp_path, checkpoints, status, part):
    workdir = tmp_path / "run"
    command = flags("compare", checkpoints=checkpoints.format(runs=runs))
    finished = cli.forked(*command, f"--workdir={workdir}")
    assert (finished.status, len(finished.errors)) == (status, 1), finished.err
    assert part in finished.errors[0]
    assert not workdir.exists()


def test_results_are_not_written_into_a_checkpoint(cli, flags, runs):
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    command = flags("compare", checkpoints=f"{runs}/first,{runs}/second")
    finished = cli.forked(*command, f"--workdir={runs}")
    assert (finished.status, len(finished.errors)) == (2, 1), finished.err
    assert "the results of first would be written into the checkpoint" in finished.errors[0]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


def test_paths_in_every_form():
    for value in ("a,b", " a , b", ("a", "b"), ["a", "b"], '("a", "b")'):
        assert checkpoint_paths(value) == ("a", "b")
    assert checkpoint_paths("a") == checkpoint_paths('("a")') == ("a",)
    for value in ("", ",", (), ("a", ""), ("a", 1), 3, "('a'", None):
        with pytest.raises(ConfigError, match="names no checkpoints"):
            checkpoint_paths(value)


def test_names_are_what_the_paths_do_not_share():
    assert short_names(["runs/osnet", "runs/dmosnet/checkpoints/best"]) == ["osnet", "dmosnet/checkpoints/best"]
    assert short_names(["runs/a", "runs/a/checkpoints/30"]) == ["a", "a/checkpoints/30"]
    assert short_names(["/far/away/x.pth"]) == ["x.pth"]
    assert short_names(["a/run", "b/run"]) == ["a/run", "b/run"]
