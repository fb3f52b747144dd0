"""One network on several data sets: evaluation side by side, and training on their union."""

import functools
import json

import jax
import optax
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.recipes import scoring
from dmosnet_jax.train import state as train_state
from dmosnet_jax.train.checkpoints import Checkpoints
from tests.recipes import small

CONTRACT = ("mAP", "rank1", "rank5", "rank10", "mINP", "num_query", "num_valid_query", "num_gallery")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tiny_writer):
    """Two data sets whose identities and cameras have the same numbers, and one without queries."""
    folder = tmp_path_factory.mktemp("several")
    tiny_writer(folder, "tiny")
    tiny_writer(folder, "other", ids=5, cameras=3, images=2)
    tiny_writer(folder, "crowd", splits=("train",), ids=4)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    small.register()
    model = models.build(small.NAME, image_size=(64, 32))
    mesh = make_mesh(jax.devices()[:1])
    state = train_state.create(*model.init(jax.random.key(0)), optax.identity(), seed=0, mesh=mesh)
    store = Checkpoints(workdir)
    store.save(state, {"model": {"name": model.name, "neck": model.neck}, "config": {}, "loop": {}})
    store.close()
    return workdir


@pytest.fixture
def flags(tiny_flags, data_dir):
    """`tiny_flags` of the small network on these data sets."""
    return functools.partial(tiny_flags, data_dir=data_dir, **{"model.name": small.NAME})


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def assert_decides(results):
    """The curve and the thresholds are in the results, in the form that other programs read."""
    curve, found = results["cmc"], results["thresholds"]
    assert len(curve) == 50
    assert (curve[0], curve[9]) == (results["rank1"], results["rank10"])
    assert set(found) == {"eer", "eer_threshold", "tar_at_far"}
    assert 0 <= found["eer"] <= 1
    assert [row["far"] for row in found["tar_at_far"]] == [1e-2, 1e-3, 1e-4]
    assert all(set(row) == {"far", "tar", "threshold"} for row in found["tar_at_far"])
    rates, places = ([row[key] for row in found["tar_at_far"]] for key in ("tar", "threshold"))
    assert rates == sorted(rates, reverse=True)
    assert places == sorted(places)


def test_several_data_sets_are_scored_as_each_alone(cli, flags, data_dir, checkpoint, tmp_path):
    fields = {"checkpoint": checkpoint, "eval.report": True, "eval.rank_lists": 1}
    alone = {}
    for name in ("tiny", "other"):
        finished = cli.forked(*flags("evaluate", dataset=name, **fields), f"--workdir={tmp_path / name}")
        assert finished.status == 0, finished.err
        alone[name] = results_in(tmp_path / name)
        assert set(CONTRACT) <= alone[name].keys()
        assert alone[name]["dataset"] == name
        assert_decides(alone[name])
        assert "equal error rate" in finished.out
        page = (tmp_path / name / "report.html").read_text()
        assert "Similarity of pairs" in page
        assert "true accepts at 0.01 % false accepts" in page
    workdir = tmp_path / "both"
    command = flags("evaluate", dataset='("tiny", "other")', **fields)
    finished = cli.forked(*command, f"--workdir={workdir}")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    results = results_in(workdir)
    assert results["datasets"] == alone
    assert results["dataset"] == "tiny+other"
    for name in ("mAP", "rank1", "mINP"):
        assert results["mean"][name] == pytest.approx((alone["tiny"][name] + alone["other"][name]) / 2)
    for name in alone:
        assert results_in(workdir / name) == alone[name]
        assert f"{small.NAME} on {name}" in (workdir / name / "report.html").read_text()
    lines = finished.out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["mAP", "rank-1"])
    table = {line.split()[0]: line.split()[1:] for line in lines[start + 1 : start + 4]}
    assert list(table) == ["tiny", "other", "mean"]
    assert table["other"][0] == f"{100 * alone['other']['mAP']:.2f}"
    assert table["other"][5:] == ["30", "30"]
    assert len({len(line) for line in lines[start : start + 3]}) == 1


def test_the_table_has_a_row_for_each_and_columns_that_align():
    values = dict(zip(scoring.METRICS, (0.5, 1.0, 1.0, 1.0, 0.25), strict=True))
    counts = {"num_query": 3_368, "num_valid_query": 3_367, "num_gallery": 15_913}
    each = {"market1501": values | counts, "msmt17_with_a_long_name": values | counts}
    lines = scoring.table(each, values).splitlines()
    assert [line.split()[0] for line in lines] == ["mAP", "market1501", "msmt17_with_a_long_name", "mean"]
    assert lines[1].split()[1:] == ["50.00", "100.00", "100.00", "100.00", "25.00", "3,367", "15,913"]
    again = {f"reranked_{name}": value / 2 for name, value in values.items()}
    wide = scoring.table({name: found | again for name, found in each.items()}, values | again).splitlines()
    assert wide[1].split()[1:] == ["50.00", "100.00", "100.00", "100.00", "25.00", "25.00", "50.00", "3,367", "15,913"]
    for table in (lines, wide):
        assert len({len(line) for line in table[:-1]}) == 1
        ends = {line.index(text) + len(text) for line, text in ((table[0], "mAP"), (table[1], "50.00"))}
        assert len(ends) == 1


@pytest.mark.slow
def test_training_on_the_union(cli, flags, data_dir, tmp_path):
    fields = {"train.epochs": 1, "train.steps_per_epoch": 3, "data.threads": 1}
    workdir = tmp_path / "run"
    finished = cli.forked(*flags("finetune", dataset="tiny+other+crowd", **fields), f"--workdir={workdir}")
    # The crowd has no queries, the others are scored by themselves.
    assert finished.status == 0, finished.err
    assert finished.errors == []
    assert "tiny+other+crowd: 48 + 30 + 24 = 102 training images" in finished.out
    row = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
    results = results_in(workdir)
    assert list(results["datasets"]) == ["tiny", "other"]
    assert row["mAP"] == results["mean"]["mAP"]
    for name, found in results["datasets"].items():
        assert set(CONTRACT) <= found.keys()
        assert row[f"{name}/mAP"] == found["mAP"] == results_in(workdir / name)["mAP"]
    # 8, 5 and 4 identities, although their numbers overlap.
    meta = json.loads((workdir / "checkpoints" / "3" / "meta" / "metadata").read_text())
    assert meta["model"]["num_classes"] == 17
    # The tuple means the same; another order gives other labels.
    command = flags("finetune", dataset='("tiny", "other", "crowd")', **fields)
    finished = cli.forked(*command, f"--workdir={workdir}")
    assert finished.status == 0, finished.err
    assert "goes on from step 3 of 3" in finished.out
    assert results_in(workdir) == results
    finished = cli.forked(*flags("finetune", dataset="other+tiny+crowd", **fields), f"--workdir={workdir}")
    assert finished.status == 1
    assert "dataset='other+tiny+crowd' (was 'tiny+other+crowd')" in finished.err


@pytest.mark.parametrize(
    ("recipe", "dataset", "status", "part"),
    [
        ("finetune", "tiny+nowhere", 1, "python -m data_prep.convert --dataset=nowhere --source=PATH"),
        ("evaluate", "tiny+nowhere", 1, "no data set nowhere"),
        ("evaluate", "tiny+crowd", 1, "there is no split 'query', there are train"),
        ("evaluate", "tiny+tiny", 2, "dataset='tiny+tiny' must name each data set once, e.g. market1501+msmt17"),
        ("finetune", "tiny+", 2, "dataset='tiny+' is not a name: give one, or several as market1501+msmt17"),
        ("finetune", "tiny+../x", 2, "dataset='../x' is not a name"),
    ],
)
def test_bad_names(cli, flags, data_dir, checkpoint, tmp_path, recipe, dataset, status, part):
    fields = {"checkpoint": checkpoint} if recipe == "evaluate" else {}
    command = flags(recipe, dataset=dataset, **fields)
    finished = cli.forked(*command, f"--workdir={tmp_path / 'run'}")
    assert (finished.status, len(finished.errors)) == (status, 1), finished.err
    assert part in finished.errors[0]
    assert not (tmp_path / "run").exists()
