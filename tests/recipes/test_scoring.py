"""One network on several data sets: evaluation side by side, and training on their union."""

import functools
import importlib
import json
import re

import jax
import numpy as np
import optax
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.evaluation import queries, ranking
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
        parts = ("Worst queries", "Typical queries", "Receiver operating", "Pairs of cameras", "Map of the embeddings")
        for part in (
            *parts,
            "multiply-adds of convolutions",
            "images a second",
            "first true match at rank",
            "show where the network looks",
            f"--config.dataset={name} ",
        ):
            assert part in page
        assert "python -m dmosnet_jax.main --config=" in page
    workdir = tmp_path / "both"
    command = flags("evaluate", dataset='("tiny", "other")', **fields, **{"eval.projector": True})
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
    projected = (workdir / "projector_config.pbtxt").read_text()
    assert re.findall('tensor_name: "(.*)"', projected) == ["tiny", "other"]
    for path in re.findall('_path: "(.*)"', projected):
        assert (workdir / path).stat().st_size
    assert not (tmp_path / "tiny" / "projector_config.pbtxt").exists(), "only where it is asked for"
    lines = finished.out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["mAP", "rank-1"])
    table = {line.split()[0]: line.split()[1:] for line in lines[start + 1 : start + 4]}
    assert list(table) == ["tiny", "other", "mean"]
    assert table["other"][0] == f"{100 * alone['other']['mAP']:.2f}"
    assert table["other"][5:] == ["30", "30"]
    assert len({len(line) for line in lines[start : start + 3]}) == 1


@pytest.mark.parametrize("checkpoint", ["run", "run/checkpoints", "run/checkpoints/best", "run/checkpoints/30"])
def test_curves_are_those_of_the_run_that_a_checkpoint_is_of(tmp_path, checkpoint):
    workdir = tmp_path / "evaluation"
    assert scoring._training_rows(workdir, None) == scoring._training_rows(workdir, str(tmp_path / checkpoint)) == []
    for folder, loss in (("run", 1.0), ("evaluation", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        found = scoring._training_rows(workdir, str(tmp_path / checkpoint))
        assert found == [{"step": 1, "loss": loss}], "its own come first"


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


@pytest.fixture(scope="module")
def many_boxes(tmp_path_factory, tiny_writer):
    """A data set with further images of its queries, and one whose queries have one image of a person and camera."""
    folder = tmp_path_factory.mktemp("boxes")
    tiny_writer(folder, "tiny", splits=("train", "query", "gallery", "multi_query"))
    tiny_writer(folder, "single", splits=("train", "query", "gallery"), cameras=3, images=1)
    return folder


class _Eval:
    """Features that a test gives, in place of a network's."""

    def __init__(self, *features):
        self._features = list(features)

    def __call__(self, *args, **options):
        return self._features.pop(0)


def evaluated(cli, flags, checkpoint, workdir, **fields):
    finished = cli.forked(*flags("evaluate", checkpoint=checkpoint, **fields), f"--workdir={workdir}")
    assert finished.status == 0, finished.err
    assert finished.errors == []
    return results_in(workdir), finished.out


def test_choices_at_test_time_are_named(cli, flags, many_boxes, data_dir, checkpoint, tmp_path):
    plain, out = evaluated(cli, flags, checkpoint, tmp_path / "plain")
    assert plain["test_time"] == {}
    assert "[" not in out
    found, words = {}, {}
    for name, fields in {
        "flip": {"eval.flip": True},
        "multi_query": {"eval.multi_query": True},
        "boxes": {"eval.multi_query": True, "data_dir": many_boxes},
        "average": {"eval.query_expansion": 5},
        "alpha": {"eval.query_expansion": 5, "eval.expansion_alpha": 3.0, "eval.flip": True},
    }.items():
        results, out = evaluated(cli, flags, checkpoint, tmp_path / name, **fields)
        found[name], words[name] = results, out
        assert results["num_query"] == plain["num_query"] == 48
    assert {name: results["test_time"] for name, results in found.items()} == {
        "flip": {"flip": True},
        "multi_query": {"multi_query": {"images_of": "query", "pooled_queries": 48}},
        "boxes": {"multi_query": {"images_of": "multi_query", "pooled_queries": 48}},
        "average": {"query_expansion": {"neighbours": 5, "alpha": 0.0}},
        "alpha": {"flip": True, "query_expansion": {"neighbours": 5, "alpha": 3.0}},
    }
    assert "gallery images)  [mirror images]\n" in words["flip"]
    assert "gallery images)  [mirror images, alpha-QE (alpha 3) of 5]\n" in words["alpha"]
    assert "[average QE of 5]" in words["average"]
    assert "[multi-query (48 by images of multi_query)]" in words["boxes"]
    assert words["multi_query"].count("tiny has no images for multiple queries (gt_bbox): a query's feature is") == 1
    assert "gt_bbox" not in words["boxes"]


def test_ranked_features_are_the_chosen_ones(many_boxes, rng):
    """The scorer against `multi_query` and `expand` one after the other."""
    config = importlib.import_module("configs.evaluate").get_config()
    config.update({"data_dir": str(many_boxes), "eval": {"multi_query": True, "query_expansion": 4}})
    first, second, more = (rng.normal(size=(48, 8)).astype(np.float32) for _ in range(3))
    scorer = scoring.Scorer(config, None, make_mesh(), ["tiny"], extractor=_Eval(first, second, more))
    scores = scorer(None, None)["tiny"]
    query, gallery = scores.query, scores.gallery
    boxes = load_split(many_boxes, "tiny", "multi_query")
    pooled = queries.multi_query(first, query.pids, query.camids, more, boxes.pids, boxes.camids)
    expected = queries.expand(pooled, second, neighbours=4)
    np.testing.assert_array_equal(scores.query_features, expected)
    np.testing.assert_array_equal(scores.gallery_features, second)
    assert scores.ranking.mAP == ranking.evaluate(expected, second, *scores.labels).mAP
    assert len(gallery) == len(boxes) == 48
    assert scoring.summary({"tiny": scores}).endswith("[multi-query (48 by images of multi_query), average QE of 4]")


@pytest.mark.parametrize("flip", [False, True])
def test_mirror_images_are_for_scores_alone(data_dir, monkeypatch, flip):
    """Training's own extractor, whose features SpCL clusters, is not used for them."""
    config = importlib.import_module("configs.evaluate").get_config()
    config.update({"data_dir": str(data_dir), "eval": {"flip": flip}})
    made = []
    monkeypatch.setattr(scoring, "Extractor", lambda *args, **options: made.append(options["flip"]) or _Eval())
    own = _Eval()
    scorer = scoring.Scorer(config, None, make_mesh(), ["tiny"], extractor=own)
    assert made == ([True] if flip else [])
    assert (scorer._extract is own) is not flip
    assert scoring.make_extractor(config, None, make_mesh())
    assert made[-1] is False


@pytest.mark.parametrize(
    ("recipe", "fields", "status", "part"),
    [
        ("evaluate", {"eval.multi_query": True, "dataset": "single"}, 1, "single in .* would be single query: convert"),
        ("evaluate", {"eval.query_expansion": 49}, 2, "eval.query_expansion=49: tiny has 48 gallery images: use fewer"),
        ("evaluate", {"eval.query_expansion": -1}, 2, "eval.query_expansion=-1 must not be negative"),
        ("evaluate", {"eval.expansion_alpha": 3.0}, 2, "eval.expansion_alpha=3.0 weights the images of eval.query"),
        ("extract", {"eval.flip": True}, 2, "eval.flip=True is for a ranking, which the extract recipe has not"),
        ("extract", {"eval.projector": True}, 2, "eval.projector=True is for a ranking, which the extract recipe has"),
        ("extract", {"eval.rerank": True}, 2, "eval.rerank=True is for a ranking, which the extract recipe has not"),
    ],
)
def test_choices_that_make_no_sense(cli, flags, many_boxes, checkpoint, tmp_path, recipe, fields, status, part):
    command = flags(recipe, **{"checkpoint": checkpoint, "data_dir": many_boxes} | fields)
    finished = cli.forked(*command, f"--workdir={tmp_path / 'run'}")
    assert (finished.status, len(finished.errors)) == (status, 1), finished.err
    assert re.search(part, finished.errors[0])


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
