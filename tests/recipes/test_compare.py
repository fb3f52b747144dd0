"""Several checkpoints in one table: as each evaluated alone, as text, CSV and page."""

import csv
import functools
import importlib
import json
import types

import jax
import optax
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.config import checkpoint_paths
from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.models import counting
from dmosnet_jax.recipes import compare, paper
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
    assert "paper" not in f"{list(rows[0])} {finished.out}"
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


def test_the_papers_figures_are_beside_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "milliseconds", lambda network, **options: 1.0)
    config = importlib.import_module("configs.compare").get_config()
    score = types.SimpleNamespace(ranking=dict.fromkeys(("mAP", "rank1", "rank5", "rank10", "mINP"), 0.5))
    scores = {"market1501": score, "cuhk03_labeled": score}
    rows = []
    for name in ("osnet_x1_0", "dmosnet_x1_0", "dmosnet_x0_25"):
        network = types.SimpleNamespace(model=models.build(name))
        rows += compare._rows(name, network, scores, config.latency)
    compare._write(tmp_path, rows, {}, config)
    with open(tmp_path / "compare.csv", newline="") as file:
        written = [[row[name] for name in ("checkpoint", "data set", *paper.NAMES)] for row in csv.DictReader(file)]
    assert written == [
        ["osnet_x1_0", "market1501", "84.9", "94.8", "86.16", ""],
        ["osnet_x1_0", "cuhk03_labeled", "", "", "", ""],
        ["osnet_x1_0", "mean", "", "", "", ""],
        ["dmosnet_x1_0", "market1501", "86.76", "95.26", "87.36", "95.61"],
        ["dmosnet_x1_0", "cuhk03_labeled", "71.56", "74.0", "72.96", "74.57"],
        ["dmosnet_x1_0", "mean", "", "", "", ""],
        *(["dmosnet_x0_25", name, "", "", "", ""] for name in ("market1501", "cuhk03_labeled", "mean")),
    ]
    page, text = (tmp_path / "compare.html").read_text(), capsys.readouterr().out
    assert "<td>95.26</td><td>87.36</td>" in page
    assert "paper&#39;s mAP, LUPerson</th>" in page
    line = next(line.split() for line in text.splitlines() if line.startswith("dmosnet_x1_0"))
    assert line[2:10] == ["market1501", "50.00", "50.00", "50.00", "86.76", "95.26", "87.36", "95.61"]
    for shown in (page, text):
        assert "width 1.0, 256x128, fine-tuned from scratch" in shown


def test_figures_are_of_the_network_that_the_paper_describes():
    assert paper.figures("resnet50") == (81.95, None)
    assert paper.figures("resnet50", pretrained=True) == (83.23, None)
    assert paper.figures("dmosnet_x1_0", (0, 0, 0)) == paper.figures("osnet_x1_0") == (84.9, 94.8)
    assert paper.figures("osnet_x1_0", (0, 0, 1), "msmt17") == (54.03, 79.26)
    for name, mask in (("dmosnet_ibn_x1_0", (1, 0, 0)), ("dmosnet_x1_0", (1, 1, 0)), ("resnet50_ibn_a", (0, 0, 0))):
        assert paper.figures(name, mask) == (None, None)
    assert paper.figures("resnet50", dataset="msmt17") == (None, None)
