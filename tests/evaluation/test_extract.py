import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data import augment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.data.transforms import load
from dmosnet_jax.evaluation.extract import Extractor

SIZE = (16, 8)


class Linear:
    """A network whose feature is a matrix times the pixels, and whose training mode is refused."""

    image_size = SIZE

    def apply(self, params, stats, images, *, train):
        assert not train
        rows = images.reshape(images.shape[0], -1)
        return {"feature": jnp.matmul(rows, params["kernel"], precision="highest") + stats["shift"]}, stats


@pytest.fixture(scope="module")
def split(tiny_data):
    return load_split(tiny_data, "tiny", "query")


@pytest.fixture
def weights(rng):
    return {"kernel": rng.standard_normal((SIZE[0] * SIZE[1] * 3, 6), np.float32)}, {"shift": np.float32(0.5)}


@pytest.fixture
def expected(split, weights):
    """Features of every image in order, one by one."""
    images = np.stack([load(split.record(row).image, SIZE) for row in range(len(split))])
    pixels = augment.normalise(jnp.asarray(images), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    features, _ = Linear().apply(*weights, pixels, train=False)
    return np.asarray(features["feature"])


def extractor(devices=1, **options):
    options = {"batch_size": 10, "threads": 1, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)} | options
    return Extractor(Linear(), make_mesh(jax.devices()[:devices]), **options)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 10), (1, 48), (1, 100), (8, 16), (8, 9), (8, 1)])
def test_every_image_once_and_in_order(split, weights, expected, devices, batch_size):
    found = extractor(devices, batch_size=batch_size)(*weights, split)
    assert (type(found), found.dtype) == (np.ndarray, np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_flipped_feature_is_the_mean_of_both_sides(split, weights, expected, devices):
    images = np.stack([load(split.record(row).image, SIZE)[:, ::-1] for row in range(len(split))])
    pixels = augment.normalise(jnp.asarray(images), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    mirrored = np.asarray(Linear().apply(*weights, pixels, train=False)[0]["feature"])
    assert np.abs(mirrored - expected).max() > 1
    found = extractor(devices, flip=True)(*weights, split)
    np.testing.assert_allclose(found, (expected + mirrored) / 2, rtol=1e-4, atol=1e-4)


def test_weights_may_be_anywhere_and_change(split, weights, expected):
    extract = extractor(8)
    placed = jax.device_put(weights, jax.devices()[3])
    np.testing.assert_allclose(extract(*placed, split), expected, rtol=1e-4, atol=1e-4)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, weights)
    np.testing.assert_allclose(extract(*doubled, split), 2 * expected, rtol=1e-4, atol=1e-4)


def test_a_cache_changes_nothing_and_replaces_reading(split, weights, expected, tmp_path, tiny_data):
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    copy = load_split(tmp_path, "tiny", "query")
    cache = ImageCache.within(copy, SIZE, 2**20)
    extract = extractor()
    for _ in range(2):
        np.testing.assert_allclose(extract(*weights, copy, cache=cache), expected, rtol=1e-4, atol=1e-4)
        # The second time there is nothing left to read.
        copy.source.close()
        for path in copy.source.paths:
            os.truncate(path, 0)
    assert cache.filled.all()


def test_a_damaged_record_is_named(weights, tmp_path, tiny_data):
    shutil.copytree(tiny_data, tmp_path, dirs_exist_ok=True)
    copy = load_split(tmp_path, "tiny", "query")
    os.truncate(copy.source.paths[1], os.path.getsize(copy.source.paths[1]) - 10)
    with pytest.raises(DataError, match=r"tiny-query\.tfrecord-00001-of-00002: record 23 at byte"):
        extractor()(*weights, copy)


def test_the_bar_counts_images(split, weights, capsys):
    extractor(batch_size=20)(*weights, split, label="gallery")
    assert "gallery: 100%" in capsys.readouterr().err
