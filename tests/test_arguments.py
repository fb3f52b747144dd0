"""Public functions check what they are given: one line of the project's, never a traceback from deep inside."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.core import arguments
from dmosnet_jax.core.errors import ArgumentError, ConfigError, DataError, UserError
from dmosnet_jax.data import rankings, samplers, splits, subset, transforms
from dmosnet_jax.evaluation import forgetting, queries, ranking, search, thresholds
from dmosnet_jax.evaluation.gallery import Gallery
from dmosnet_jax.evaluation.rerank import rerank
from dmosnet_jax.export import onnx_file, stablehlo, torch_export, torch_import
from dmosnet_jax.losses import identity, triplet
from dmosnet_jax.memory import cluster, clustering, hybrid, quality
from dmosnet_jax.memory.clustering import neighbours

pytestmark = pytest.mark.usefixtures("no_array_checks")

RNG = np.random.default_rng(0)
QUERY, GALLERY = RNG.normal(size=(6, 8)).astype(np.float32), RNG.normal(size=(12, 8)).astype(np.float32)
IDS, CAMERAS = np.arange(6) % 3, np.zeros(6, int)
GALLERY_LABELS = {"gallery_ids": np.arange(12) % 3, "gallery_cams": np.ones(12, int)}
LABELS = {"query_ids": IDS, "query_cams": CAMERAS, **GALLERY_LABELS}
SMALL = {"k1": 4, "k2": 2, "min_samples": 2}
MEMORY = {"momentum": 0.2, "temperature": 0.05}
PLAN = {"batch_size": 4, "instances": 2, "seed": 0, "epoch": 0}

BAD_FEATURES = {
    "text": "abc",
    "none": None,
    "number": 5,
    "strings": QUERY.astype(str),
    "objects": np.full((6, 8), None),
    "ragged": [[1.0, 2.0], [3.0]],
    "complex": QUERY.astype(complex),
    "dates": QUERY.astype("datetime64[s]"),
    "vector": QUERY[0],
    "cube": QUERY[None],
    "no values": QUERY[:, :0],
    "nan": np.where(QUERY > 1, np.nan, QUERY),
    "too large": QUERY.astype(np.float64) * 1e300,
}
TAKES_FEATURES = {
    "ranking": lambda x: ranking.evaluate(x, GALLERY, **LABELS),
    "ranking, gallery": lambda x: ranking.evaluate(QUERY, x, **LABELS),
    "distances": lambda x: ranking.evaluate(None, None, distance=x, **LABELS),
    "lists": lambda x: ranking.ranking_lists(x, GALLERY, **LABELS, queries=[0]),
    "rerank": lambda x: rerank(x, GALLERY, k1=3, k2=2),
    "thresholds": lambda x: thresholds.evaluate(x, GALLERY, **LABELS),
    "expansion": lambda x: queries.expand(x, GALLERY, neighbours=2),
    "multi-query": lambda x: queries.multi_query(QUERY, IDS, CAMERAS, x, IDS, CAMERAS),
    "search": lambda x: search.search(x, [GALLERY], 3),
    "clustering": lambda x: clustering.cluster(x, **SMALL),
    "neighbours": lambda x: neighbours.search(x, 3),
    "hybrid memory": lambda x: hybrid.init(x, IDS, **MEMORY),
    "cluster memory": lambda x: cluster.init(x, IDS, **MEMORY),
}
BAD_LABELS = {
    "none": None,
    "text": "abcdef",
    "strings": IDS.astype(str),
    "objects": np.full(6, None),
    "fractions": IDS + 0.5,
    "nan": np.full(6, np.nan),
    "infinite": np.full(6, np.inf),
    "beyond int64": np.full(6, 2**63, np.uint64),
    "booleans": IDS > 0,
    "matrix": IDS[None],
}
TAKES_LABELS = {
    "ranking, ids": lambda x: ranking.evaluate(QUERY, GALLERY, **LABELS | {"query_ids": x}),
    "ranking, cameras": lambda x: ranking.evaluate(QUERY, GALLERY, **LABELS | {"query_cams": x}),
    "lists": lambda x: ranking.ranking_lists(QUERY, GALLERY, **LABELS, queries=x),
    "multi-query": lambda x: queries.multi_query(QUERY, x, CAMERAS, QUERY, IDS, CAMERAS),
    "multi-query, images": lambda x: queries.multi_query(QUERY, IDS, CAMERAS, QUERY, x, CAMERAS),
    "hybrid memory": lambda x: hybrid.init(QUERY, x, **MEMORY),
    "cluster memory": lambda x: cluster.init(QUERY, x, **MEMORY),
    "agreement": lambda x: quality.agreement(x, IDS),
    "agreement, identities": lambda x: quality.agreement(IDS, x),
    "spanning cameras": lambda x: quality.spanning_cameras(x, CAMERAS),
    "identity sampler": lambda x: samplers.identity_epoch(x, **PLAN),
    "class sampler": lambda x: samplers.class_epoch(x, None, **PLAN, steps=2),
    "relabel": splits.relabel,
}
TAKES_COUNTS = {
    "max_rank": lambda x: ranking.evaluate(QUERY, GALLERY, **LABELS, max_rank=x),
    "block": lambda x: ranking.evaluate(QUERY, GALLERY, **LABELS, block=x),
    "threads": lambda x: ranking.evaluate(QUERY, GALLERY, **LABELS, threads=x),
    "top": lambda x: ranking.ranking_lists(QUERY, GALLERY, **LABELS, queries=[0], top=x),
    "k1": lambda x: rerank(QUERY, GALLERY, k1=x, k2=2),
    "k2": lambda x: rerank(QUERY, GALLERY, k1=3, k2=x),
    "neighbours": lambda x: queries.expand(QUERY, GALLERY, neighbours=x),
    "top_k": lambda x: search.search(QUERY, [GALLERY], x),
    "min_samples": lambda x: clustering.cluster(QUERY, **SMALL | {"min_samples": x}),
    "candidates": lambda x: clustering.cluster(QUERY, **SMALL, candidates=x),
    "k": lambda x: neighbours.search(QUERY, x),
    "capacity": lambda x: hybrid.init(QUERY, IDS, **MEMORY, capacity=x),
    "batch_size": lambda x: samplers.identity_epoch(IDS, **PLAN | {"batch_size": x}),
    "instances": lambda x: samplers.class_epoch(IDS, None, **PLAN | {"instances": x}, steps=1),
    "seed": lambda x: samplers.identity_epoch(IDS, **PLAN | {"seed": x}),
    "epoch": lambda x: samplers.identity_epoch(IDS, **PLAN | {"epoch": x}),
    "steps": lambda x: samplers.class_epoch(IDS, None, **PLAN, steps=x),
    "n": lambda x: samplers.evaluation_order(x, 4),
    "num_classes": lambda x: models.build("osnet_x0_25", num_classes=x),
    "bn_group_size": lambda x: models.build("osnet_x0_25", bn_group_size=x),
}
TAKES_NUMBERS = {
    "lambda_value": lambda x: rerank(QUERY, GALLERY, k1=3, k2=2, lambda_value=x),
    "alpha": lambda x: queries.expand(QUERY, GALLERY, neighbours=2, alpha=x),
    "rates": lambda x: thresholds.evaluate(QUERY, GALLERY, **LABELS, rates=[x]),
    "eps": lambda x: clustering.cluster(QUERY, **SMALL, eps=x),
    "min_clustered": lambda x: clustering.cluster(QUERY, **SMALL, min_clustered=x),
    "momentum": lambda x: hybrid.init(QUERY, IDS, **MEMORY | {"momentum": x}),
    "temperature": lambda x: cluster.init(QUERY, IDS, **MEMORY | {"temperature": x}),
    "epsilon": lambda x: identity.cross_entropy(jnp.asarray(QUERY), jnp.asarray(IDS), epsilon=x),
    "margin": lambda x: triplet.batch_hard(jnp.asarray(QUERY), jnp.asarray(IDS), margin=x),
    "share": lambda x: subset.share_count(10, x),
}


def refused(call, kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text
    assert "\n" not in text
    assert len(text) < 400
    return text


@pytest.mark.parametrize("kind", BAD_FEATURES)
@pytest.mark.parametrize("name", TAKES_FEATURES)
def test_features_must_be_finite_matrices(name, kind):
    refused(lambda: TAKES_FEATURES[name](BAD_FEATURES[kind]))


@pytest.mark.parametrize("name", [name for name in TAKES_FEATURES if name != "distances"])
def test_features_may_be_lists_and_arrays_of_any_numbers(name):
    for features in (QUERY.tolist(), (QUERY * 10).astype(int), jnp.asarray(QUERY), QUERY.astype(np.float16)):
        if name == "ranking, gallery":
            ranking.evaluate(QUERY, features, IDS, IDS, CAMERAS, CAMERAS + 1)
        else:
            TAKES_FEATURES[name](features)


@pytest.mark.parametrize("kind", BAD_LABELS)
@pytest.mark.parametrize("name", TAKES_LABELS)
def test_labels_must_be_vectors_of_whole_numbers(name, kind):
    refused(lambda: TAKES_LABELS[name](BAD_LABELS[kind]), DataError)


@pytest.mark.parametrize("name", TAKES_LABELS)
def test_labels_may_be_lists_and_whole_floats(name):
    for labels in (IDS.tolist(), IDS.astype(np.float64), IDS.astype(np.uint8)):
        TAKES_LABELS[name](labels)


@pytest.mark.parametrize("value", [-1, 2.5, "3", True, float("nan"), 10**30])
@pytest.mark.parametrize("name", TAKES_COUNTS)
def test_counts_must_be_whole_numbers(name, value):
    assert f"{name}=" in refused(lambda: TAKES_COUNTS[name](value), ConfigError)


@pytest.mark.parametrize("value", [-1, "3", None, True, float("nan"), float("inf"), 10**400])
@pytest.mark.parametrize("name", TAKES_NUMBERS)
def test_numbers_must_be_finite_and_in_range(name, value):
    if name == "margin" and value is None:
        pytest.skip("it is the soft margin")
    assert f"{name}=" in refused(lambda: TAKES_NUMBERS[name](value), ConfigError)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranking.ranking_lists(QUERY, GALLERY, **LABELS, queries=[0, 99]), "99 in place 1; there are images"),
        (lambda: ranking.ranking_lists(QUERY, GALLERY, **LABELS, queries=[-1]), "-1 in place 0"),
        (lambda: ranking.evaluate(QUERY, GALLERY, **LABELS | {"query_ids": IDS[1:]}), "do not pair up"),
        (lambda: queries.multi_query(QUERY, IDS, CAMERAS, GALLERY, IDS, CAMERAS), "each image needs one"),
        (lambda: queries.multi_query(QUERY, IDS, CAMERAS, QUERY, IDS[1:], CAMERAS), "do not pair up"),
        (lambda: queries.expand(QUERY, GALLERY, neighbours=13), "neighbours=13 must be a whole number of at most 12"),
        (lambda: thresholds.evaluate(QUERY, GALLERY, **LABELS, rates="0.1"), "a list of false-accept rates"),
        (lambda: search.search(QUERY, GALLERY, 3), "must be a list of matrices"),
        (lambda: search.search(QUERY, [GALLERY.astype(str)], 3), "give an array of numbers"),
        (lambda: quality.agreement(IDS, IDS[1:]), "expected 6, one for each image"),
        (lambda: samplers.class_epoch(IDS, CAMERAS[1:], **PLAN, steps=1), "camids have 5 rows"),
        (lambda: clustering.cluster(QUERY, **SMALL, nearest=np.full((6, 4), 6)), "whole numbers from 0 to 5"),
        (lambda: clustering.cluster(QUERY, **SMALL, nearest=np.full((6, 4), -1)), "whole numbers from 0 to 5"),
        (lambda: clustering.cluster(QUERY, **SMALL, nearest=np.zeros((6, 4))), "whole numbers from 0 to 5"),
        (lambda: splits.JointSplit([]), "one split at least"),
        (lambda: splits.load_split(None, "market1501", "train"), "is no path"),
        (lambda: splits.load_split("data", 5, "train"), "dataset=5 is not a name"),
        (lambda: rankings.order("abc"), "give an array of numbers"),
        (lambda: transforms.resize(QUERY, (4, 4)), "image must be uint8"),
        (lambda: models.build("osnet_x0_25", image_size=256), "(height, width)"),
        (lambda: models.build("osnet_x0_25", image_size="256"), "(height, width)"),
        (lambda: models.build("osnet_x0_25", image_size=(256.5, 128)), "(height, width)"),
        (lambda: models.build("osnet_x0_25", attention=1), "three flags"),
        (lambda: models.build("osnet_x0_25", attention="100"), "three flags"),
        (lambda: models.build(["osnet_x0_25"]), "is not known"),
        (lambda: identity.cross_entropy(QUERY.tolist(), IDS), "logits are a list"),
        (lambda: identity.cross_entropy(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32)), "not empty"),
        (lambda: triplet.batch_hard(jnp.zeros((0, 3)), jnp.zeros(0, jnp.int32)), "not empty"),
        (lambda: triplet.batch_hard(jnp.asarray(QUERY), None), "pids are a NoneType"),
        (lambda: forgetting.cosine(None, None), "have no cosine"),
        (lambda: torch_import.plan({"conv1.conv.weight": [1.0]}, models.build("osnet_x0_25")), "not an array of NumPy"),
    ],
)
def test_what_does_not_fit_is_told(call, message):
    assert message in refused(call)


@pytest.mark.parametrize(
    ("inputs", "indices", "message"),
    [
        (None, np.arange(6), "inputs are a NoneType"),
        (QUERY.tolist(), np.arange(6), "inputs are a list"),
        (QUERY[:, 1:], np.arange(6), "do not fit features of 8 values"),
        (QUERY.astype(int), np.arange(6), "give floats and integers"),
        (QUERY, np.zeros(6), "give floats and integers"),
        (QUERY, np.full(6, 6), "there are images 0 to 5"),
        (QUERY, np.full(6, -1), "there are images 0 to 5"),
    ],
)
def test_batches_that_do_not_fit_a_memory(inputs, indices, message):
    for kind in (hybrid, cluster):
        memory = kind.init(QUERY, IDS, **MEMORY)
        for function in (kind.loss, kind.update):
            assert message in refused(lambda f=function, m=memory: f(m, inputs, indices))


@pytest.mark.parametrize("backend", ["host", "device"])
def test_rows_that_are_no_numbers_are_never_found(backend):
    gallery = GALLERY.copy()
    gallery[[2, 7]] = np.nan
    found = search.search(QUERY, [gallery], 12, backend=backend)
    assert sorted(found.indices[0]) == [-1, -1, 0, 1, 3, 4, 5, 6, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ("abcdef", {}, "must be a list of names"),
        (None, {}, "must be a list of names"),
        ([b"a"] * 6, {}, "must be a list of names"),
        ([None] * 6, {}, "must be a list of names"),
        (list("abcdef"), {"root": None}, "root=None"),
        (list("abcdef"), {"cameras": [0.5] * 6}, "expected whole numbers"),
        (list("abcdef"), {"cameras": [2**40] * 6}, "which no int32 holds"),
    ],
)
def test_what_a_gallery_does_not_take(tmp_path, files, options, message):
    gallery = Gallery.create(tmp_path / "gallery", fingerprint="a", feature_dim=8)
    assert message in refused(lambda: gallery.append(QUERY, files, **options))
    assert len(Gallery.open(gallery.path)) == 0


@pytest.mark.parametrize(
    "options", [{"fingerprint": None}, {"feature_dim": 0}, {"feature_dim": "8"}, {"checkpoint": 5}]
)
def test_what_no_gallery_is_made_of(tmp_path, options):
    refused(lambda: Gallery.create(tmp_path / "g", **{"fingerprint": "a", "feature_dim": 8} | options), ConfigError)
    assert not (tmp_path / "g").exists()


def test_exports_of_other_arrays_are_refused(tmp_path):
    model, other = models.build("osnet_x0_25", image_size=(64, 32)), models.build("osnet_x0_5", image_size=(64, 32))
    params, stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), other.shapes())
    inputs = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    for weights in ((params, stats), (None, stats), (stats, params), ({"a": [1.0]}, stats)):
        calls = [
            lambda w=weights: torch_export.to_state_dict(*w, model),
            lambda w=weights: onnx_file.save(tmp_path / "a.onnx", model, *w),
            lambda w=weights: stablehlo.serialise(model, *w, **inputs),
        ]
        for call in calls:
            assert "osnet_x0_25" in refused(call, DataError)
    assert "is bool" in refused(lambda: torch_export.save(tmp_path / "a.pth", {"a": np.zeros(2, bool)}), DataError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "images", [None, QUERY, np.zeros((1, 3, 64, 32), np.float32), np.zeros((1, 64, 32, 3), np.uint8)]
)
def test_networks_take_normalised_images(images):
    model = models.build("osnet_x0_25", image_size=(64, 32))
    params, stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.shapes())
    assert "normalised floats" in refused(lambda: model.apply(params, stats, images, train=False), ArgumentError)


def test_an_argument_error_is_a_value_error_too():
    with pytest.raises(ValueError, match="a: b=0 must be a whole number of at least 1"):
        arguments.count("a: b", 0)
    assert arguments.count("a", np.int64(3)) == 3
    assert arguments.number("a", np.float32(0.5)) == 0.5
    assert "of at least 0 and of at most 1" in refused(lambda: arguments.number("a", 2, low=0, high=1))


def test_scores_that_are_no_numbers_are_not_written(tiny_data, tmp_path):
    split = splits.load_split(pathlib.Path(tiny_data), "tiny", "train")
    with (tmp_path / "scores.npz").open("wb") as file:
        for scores in (np.full(len(split), np.nan), np.zeros(3), None):
            refused(lambda s=scores: rankings.write_scores(file, s, split), DataError)
    for rows in ([len(split)], [-1], [0.5]):
        refused(lambda r=rows: splits.Subset(split, r), DataError)
