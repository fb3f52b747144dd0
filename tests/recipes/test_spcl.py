"""SpCL's epochs: one compilation, its options, what it says before and after clustering, and when it refuses."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import spcl_market1501
from dmosnet_jax.core.errors import ConfigError, DataError, UserError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.memory import cluster, hybrid, tables
from dmosnet_jax.memory.clustering import TooFewClusteredError, host_memory
from dmosnet_jax.models import Model
from dmosnet_jax.recipes import feature_pass, pseudo_labels, spcl, training
from dmosnet_jax.recipes.network import build_model
from dmosnet_jax.train.checkpoints import Checkpoints
from dmosnet_jax.train.state import TrainState


class Small(Model):
    """A linear map of the colours of eight bands."""

    feature_dim = 16

    def init(self, key):
        return {"kernel": jax.random.normal(key, (24, 16), jnp.float32)}, {"seen": jnp.zeros((), jnp.float32)}

    def shapes(self):
        return jax.eval_shape(self.init, jax.random.key(0))

    def apply(self, params, stats, images, *, train):
        bands = images.reshape(len(images), 8, -1, 3).mean(axis=2).reshape(len(images), 24)
        seen = {"seen": stats["seen"] + 1.0} if train else stats
        return {"feature": bands @ params["kernel"]}, seen


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Whole runs with a network that compiles at once; they hold code of others, which promotes types."""

    def build_small(*args, **options):
        model = build_model(*args, **options)
        return Small(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})

    monkeypatch.setattr(training, "build_model", build_small)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def data_dir(tiny_writer, tmp_path_factory):
    """48 images of 8 identities, no queries: nothing is scored."""
    folder = tmp_path_factory.mktemp("train_only")
    tiny_writer(folder, splits=("train",))
    return folder


@pytest.fixture
def settings(data_dir):
    """The function `settings(**fields)`: a short run's config; `a__b` stands for `a.b`."""

    def give(**fields):
        config = spcl_market1501.get_config()
        given = {
            "dataset": "tiny",
            "data_dir": str(data_dir),
            "image_size": (64, 32),
            "batch_size": 16,
            "model__name": "osnet_x0_25",
            "model__neck": "bnneck",
            "model__bn_group_size": 8,
            # Most of what compiling takes, and not the point here.
            "augment__erase": 0.0,
            "augment__pad": 0,
            "data__threads": 1,
            "train__epochs": 2,
            "train__steps_per_epoch": 2,
            "train__log_every_steps": 1,
            "train__keep": 1,
            "eval__report": False,
            "spcl__k1": 8,
            "spcl__k2": 3,
        }
        for field, value in (given | fields).items():
            *path, last = field.split("__")
            node = config
            for part in path:
                node = node[part]
            node[last] = value
        return config

    return give


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("memory", ["image", "cluster"])
def test_a_run_without_labels_ends_with_a_report(settings, tmp_path, monkeypatch, memory):
    config = settings(spcl__memory=memory, spcl__eps=0.5, eval__report=True)
    written, keep = [], pseudo_labels.keep_clusters
    monkeypatch.setattr(pseudo_labels, "keep_clusters", lambda *args, **to: written.append(args) or keep(*args, **to))
    assert spcl.run(config, tmp_path) == {}
    # Of the last epoch alone, and of the labels that it trained on.
    (_, features, labels, images), found = *written, json.loads((tmp_path / "clusters.json").read_text())
    assert (found["epoch"], found["images"]) == (2, len(features) == len(labels) == len(images) and 48)
    last = [row for row in rows(tmp_path) if "clusters" in row][-1]
    assert last["unclustered"] == found["unclustered"]
    assert last["clusters"] == sum(count for _, count in found["sizes"]) > 0
    page = (tmp_path / "report.html").read_text()
    for part in ("osnet_x0_25 on tiny", "Clusters", "Largest clusters", "Of epoch 2: ", "NMI"):
        assert part.lower() in page.lower()
    assert page.count('alt="The person of most images') >= 2
    # Run again, it is finished, and its report is made of what was kept.
    (tmp_path / "report.html").unlink()
    spcl.run(config, tmp_path)
    assert (tmp_path / "report.html").read_text() == page
    (tmp_path / "clusters.json").unlink()
    spcl.run(config, tmp_path)
    assert "Largest clusters" not in (tmp_path / "report.html").read_text()
    (tmp_path / "clusters.json").write_text('{"epoch": 2}')
    with pytest.raises(DataError, match=r"clusters\.json: is damaged, or of another kind: remove it"):
        spcl.run(config, tmp_path)


# Images that vary: the clusters of plain ones are always the eight identities.
AUGMENTED = {"augment__erase": 0.5, "augment__pad": 10}


class Compilations(logging.Handler):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def emit(self, record):
        text = record.getMessage()
        if text.startswith("Compiling "):
            self.names.append(text.split()[1])


def test_twenty_epochs_with_changing_class_counts_compile_once(settings, tmp_path, capsys, monkeypatch):
    fields = {"train__epochs": 20, "train__steps_per_epoch": 1, "optim__learning_rate": 3e-3} | AUGMENTED
    config = settings(spcl__eps=0.2, spcl__eps_end=0.7, spcl__refresh_every_steps=3, **fields)
    compiled, marks, begin = [], [], spcl.Epochs.begin
    # How many programs had been compiled when each epoch began.
    monkeypatch.setattr(spcl.Epochs, "begin", lambda *args: marks.append(len(compiled)) or begin(*args))
    handler, logger = Compilations(compiled), logging.getLogger("jax")
    logger.addHandler(handler)
    # Each of these lines is pages long.
    logger.propagate = False
    try:
        with jax.log_compiles():
            spcl.run(config, tmp_path)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    notes = [row for row in rows(tmp_path) if "clusters" in row]
    assert len(notes) == len(marks) == 20
    assert len({(row["clusters"], row["unclustered"]) for row in notes}) >= 5
    assert sum("step" in name for name in compiled) == 1, compiled
    assert compiled[: marks[1]], "the handler sees compilations"
    assert compiled[marks[2] :] == []
    np.testing.assert_allclose([row["eps"] for row in notes], np.linspace(0.2, 0.7, 20))
    drifts = [row["class_sum_drift"] for row in rows(tmp_path) if "class_sum_drift" in row]
    assert len(drifts) == 20
    assert all(0 <= drift < 1e-5 for drift in drifts)
    for name in ("pseudo_nmi", "pseudo_adjusted_rand", "pseudo_pair_precision", "pseudo_pair_recall"):
        assert all(-1 <= row[name] <= 1 for row in notes)
    printed = capsys.readouterr().out
    assert "clustering 48 images of 16 values takes up to" in printed
    assert printed.count(" un-clustered images, largest") == 20


@pytest.mark.parametrize("memory", ["image", "cluster", "cluster_hardest"])
def test_options_that_are_off_by_default(settings, tmp_path, memory, monkeypatch):
    passes, original = [], feature_pass.extract

    def keeping(*args, **rest):
        passes.append([])
        for start, features in original(*args, **rest):
            passes[-1].append(features)
            yield start, features

    monkeypatch.setattr(feature_pass, "extract", keeping)
    config = settings(
        spcl__memory=memory,
        spcl__eps=0.12,
        optim__learning_rate=0.02,
        spcl__reextract=True,
        spcl__refresh_every_steps=1,
        spcl__max_classes=48,
        train__steps_per_epoch=3,
    )
    states = []
    compile_step = training.compile_step

    def watching(*args):
        step = compile_step(*args)

        def call(state, batch):
            state, metrics = step(state, batch)
            states.append(jax.device_get(state.memory))
            return state, metrics

        return call

    monkeypatch.setattr(training, "compile_step", watching)
    spcl.run(config, tmp_path)
    assert len(passes) == 2, "once at the start, once before the second clustering"
    assert np.abs(np.concatenate(passes[1]) - np.concatenate(passes[0])).max() > 1e-3
    last, before = states[-1], states[-2]
    if memory == "image":
        assert last.labels[:48].min() == 0
        return
    assert last.labels[:48].min() == -1, "images outside of clusters are left out"
    assert last.hardest == (memory == "cluster_hardest")
    np.testing.assert_allclose(np.linalg.norm(last.centroids[last.present], axis=1), 1, atol=1e-5)
    moved = np.abs(last.centroids - before.centroids).max(axis=1) > 1e-6
    assert moved.any()
    assert not moved[~last.present].any()


def test_class_sums_are_rebuilt_by_the_number_of_the_step(rng):
    features = rng.normal(size=(40, 6)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    exact = hybrid.init(features, np.arange(40) % 7, momentum=0.2, temperature=0.05, mesh=make_mesh())

    def state(number):
        return TrainState(
            jnp.int32(number), {}, {}, (), jax.random.key(0), exact.replace(class_sums=exact.class_sums + 0.5)
        )

    def epochs(every):
        config = types.SimpleNamespace(spcl=types.SimpleNamespace(refresh_every_steps=every))
        lengths = types.SimpleNamespace(steps_per_epoch=6)
        return spcl.Epochs(types.SimpleNamespace(config=config, lengths=lengths), hybrid, {})

    rebuilt = []
    for number in range(13):
        memory = epochs(3).refresh(state(number), number).memory
        rebuilt.append(bool((memory.class_sums == exact.class_sums).all()))
        assert rebuilt[-1] or (memory.class_sums == state(number).memory.class_sums).all()
        # What is rebuilt before the next step need not be saved; before an epoch all is.
        compacted = epochs(3).compact(state(number)).memory.class_sums is None
        assert compacted == (rebuilt[-1] or number % 6 == 0)
        assert (epochs(3).refresh(state(number), number).memory.labels == exact.labels).all()
    # An epoch of six steps starts with new sums anyway.
    assert [number for number in range(13) if rebuilt[number]] == [3, 9]
    kept = state(3)
    assert epochs(0).refresh(kept, 3) is kept
    assert cluster.refresh(kept.memory) is kept.memory


def test_a_radius_without_clusters_is_refused_with_a_picture(settings, tmp_path):
    with pytest.raises(TooFewClusteredError, match=r"eps=0\.05.*--config\.spcl\.eps.*k_distances\.svg") as caught:
        spcl.run(settings(spcl__eps=0.05, spcl__min_clustered=0.9), tmp_path)
    assert "\n" not in str(caught.value)
    picture = (tmp_path / pseudo_labels.PICTURE).read_text()
    assert picture.startswith("<svg ")
    assert "xmlns=" in picture[: picture.index(">")]
    assert "eps = 0.05" in picture


def test_too_few_classes_name_the_field(settings, tmp_path):
    config = settings(spcl__max_classes=8, **AUGMENTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PADDING", 8)
        with pytest.raises(ConfigError, match=r"capacity of 8 classes.*spcl\.max_classes=8 is too low"):
            spcl.run(config, tmp_path)


def test_a_run_goes_on_with_more_classes_when_these_were_too_few(settings, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "PADDING", 8)
        spcl.run(settings(spcl__max_classes=48, train__epochs=1), tmp_path)
        sizes, set_labels = [], hybrid.set_labels

        def watched(memory, *args, **options):
            assert isinstance(memory.class_sums, jax.Array), "restored"
            after = set_labels(memory, *args, **options)
            sizes.extend((memory.class_sums.shape[0], after.class_sums.shape[0]))
            return after

        patch.setattr(hybrid, "set_labels", watched)
        spcl.run(settings(spcl__max_classes=96), tmp_path)
    assert sizes == [48, 96]
    assert [row["epoch"] for row in rows(tmp_path) if "clusters" in row] == [0, 1]


def test_a_resumed_run_restores_into_shapes(settings, tmp_path, monkeypatch):
    spcl.run(settings(train__epochs=1), tmp_path)
    targets, restore = [], Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda self, like, *rest: targets.append(like.memory) or restore(self, like, *rest)
    )
    spcl.run(settings(), tmp_path)
    assert len(targets) == 1
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(targets))


def test_another_kind_of_memory_does_not_continue_a_run(settings, tmp_path):
    spcl.run(settings(train__epochs=1), tmp_path)
    with pytest.raises(DataError, match=r"spcl\.memory='cluster' \(was 'image'\)"):
        spcl.run(settings(spcl__memory="cluster"), tmp_path)


def test_checkpoints_of_earlier_versions_kept_the_kind_of_memory_too():
    values = spcl.HostValues.saved({"memory": "image", "capacity": 48, "indep_threshold": 0.7})
    assert values == spcl.HostValues(capacity=48, indep_threshold=0.7)


def test_too_little_memory_is_told_before_anything_is_extracted(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 1000)
    monkeypatch.setattr(feature_pass, "extract", lambda *_, **__: pytest.fail("extracted"))
    with pytest.raises(UserError, match=r"48 images of 16 values need about .* GiB of memory"):
        spcl.run(settings(), tmp_path)


def test_memory_is_told_for_the_neighbours_that_there_are(settings, capsys):
    images, told = 1000, []
    for k1 in (images, 1_000_000):
        pseudo_labels.check_memory(images, 16, settings(spcl__k1=k1).spcl)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "clustering 1,000 images of 16 values takes up to 0." in told[0]


def test_what_is_logged_are_the_labels_that_are_trained_on(capsys):
    labels = np.array([0, 0, 0, 1, 1, -1, -1, 2], np.int32)
    found = types.SimpleNamespace(indep_threshold=0.5, recall=None, seconds={})
    notes = pseudo_labels.report(found, labels, np.full(8, -1), np.full(8, 1), epoch=0, eps=0.6, since=0.0)
    assert (notes["clusters"], notes["unclustered"], notes["largest_cluster"]) == (2, 3, 3)
    assert "epoch 1: 2 clusters, 3 un-clustered images, largest cluster 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epoch", "epochs", "end", "expected"),
    [(0, 5, None, 0.6), (4, 5, None, 0.6), (0, 5, 0.4, 0.6), (1, 5, 0.4, 0.55), (4, 5, 0.4, 0.4), (0, 1, 0.4, 0.6)],
)
def test_radius_of_an_epoch(settings, epoch, epochs, end, expected):
    config = settings(spcl__eps_end=end) if end else settings()
    assert pseudo_labels.radius(config.spcl, epoch, epochs) == pytest.approx(expected)


def test_groups_one_after_the_other_are_the_same_run(settings, tmp_path):
    losses = {}
    for at_once in (None, 1):
        # Eight devices, of which each has two groups.
        config = settings(spcl__groups_at_once=at_once, batch_size=32, model__bn_group_size=2, **AUGMENTED)
        spcl.run(config, tmp_path / str(at_once))
        losses[at_once] = [row["loss"] for row in rows(tmp_path / str(at_once)) if "loss" in row]
    assert len(losses[1]) == 4
    np.testing.assert_allclose(losses[1], losses[None], rtol=1e-4)
    with pytest.raises(ConfigError, match=r"spcl\.groups_at_once=1: each of 8 devices has 4 images"):
        spcl.run(settings(spcl__groups_at_once=1, batch_size=32, model__bn_group_size=8), tmp_path / "refused")
