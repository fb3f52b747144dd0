"""SpCL with a labelled source: what is in the memory's rows and in the batches, and what is refused."""

import types

import numpy as np
import pytest

from configs import spcl_uda as experiment_file
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.memory import hybrid, tables
from dmosnet_jax.recipes import spcl_uda
from dmosnet_jax.recipes.datasets import domain_images


@pytest.fixture(scope="module")
def domains(tiny_writer, tmp_path_factory):
    """Two sources, a target of 48 images, and one where nobody is known."""
    folder = tmp_path_factory.mktemp("domains")
    for name, options in {
        "first": {"ids": 5},
        "second": {"ids": 4},
        "target": {},
        "unknown": {"labelled": False},
    }.items():
        tiny_writer(folder, name, splits=("train",), **options)
    return folder


@pytest.fixture
def epochs(domains):
    """The epochs of a run, without a network."""
    config = experiment_file.get_config("first+second+target")
    config.data_dir, config.batch_size = str(domains), 32
    images, source = domain_images(config)
    lengths = types.SimpleNamespace(steps_per_epoch=6)
    about = {"model": types.SimpleNamespace(feature_dim=7), "mesh": tables.default_mesh()}
    experiment = types.SimpleNamespace(config=config, images=images, lengths=lengths, cache=None, **about)
    return spcl_uda.Epochs(experiment, hybrid, {}, source)


def test_classes_of_the_source_come_first(epochs):
    images = epochs.experiment.images
    assert (images.name, epochs.source, epochs.fixed, len(epochs.clustered)) == ("first+second+target", 54, 9, 48)
    np.testing.assert_array_equal(epochs.clustered.pids, images.pids[54:])
    assert epochs.clustered.filenames([0]) == images.filenames([54])


def test_batches_take_turns(epochs):
    found = np.arange(48, dtype=np.int32) // 4
    plan, rows = epochs.plan(found, 3)
    assert plan.shape == (6, 32)
    assert plan[:, 0::2].max() < 54 <= plan[:, 1::2].min()
    np.testing.assert_array_equal(rows[:54], np.unique(epochs.experiment.images.pids[:54], return_inverse=True)[1])
    np.testing.assert_array_equal(rows[54:], 9 + np.arange(48))
    # Four of a class follow each other in each domain, and those of the domains are drawn by streams of their own.
    for half, labels in ((plan[:, 0::2], rows[:54]), (plan[:, 1::2] - 54, found)):
        groups = labels[half].reshape(-1, 4)
        assert (groups == groups[:, :1]).all()
    np.testing.assert_array_equal(plan, epochs.plan(found, 3)[0])
    assert (plan[:, 0::2] != plan[:, 1::2] - 54).any()
    assert (plan != epochs.plan(found, 4)[0]).any()


def test_rows_are_centroids_and_then_features(epochs, rng, monkeypatch):
    asked = []

    def extract(self, state, images, cache):
        asked.append(len(images))
        for start in range(0, len(images), 20):
            yield start, features[-len(images) :][start : start + 20]

    monkeypatch.setattr(spcl_uda.Epochs, "extract", extract)
    features = unit_rows_np(rng.normal(size=(102, 7)).astype(np.float32))
    run = types.SimpleNamespace(state=types.SimpleNamespace(memory=None))
    rows = epochs.rows(run, 0).on_first
    for number, pid in enumerate(np.unique(epochs.experiment.images.pids[:54])):
        mean = features[:54][epochs.experiment.images.pids[:54] == pid].mean(axis=0)
        np.testing.assert_allclose(rows[number], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_array_equal(rows[9:], features[54:])
    # Later the centroids stay, and only the target's features are taken anew.
    labels = np.concatenate([np.arange(9), 9 + np.arange(48) // 4])
    run.state.memory = hybrid.init(unit_rows_np(rows + 0.5), labels, momentum=0.2, temperature=0.05)
    again = epochs.rows(run, 1).on_first
    np.testing.assert_array_equal(again[:9], unit_rows_np(rows + 0.5)[:9])
    np.testing.assert_array_equal(again[9:], features[54:])
    assert asked == [102, 48]


def test_a_source_without_identities_is_refused(domains):
    config = experiment_file.get_config("unknown+target")
    config.data_dir = str(domains)
    with pytest.raises(
        DataError, match="unknown: training images without an identity; they cannot be a labelled source"
    ):
        domain_images(config)
    config = experiment_file.get_config("target+unknown")
    config.data_dir = str(domains)
    assert domain_images(config)[1] == 48
