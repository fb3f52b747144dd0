"""Activation maps against the formula, and what is drawn of them."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmosnet_jax import models
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import augment, transforms
from dmosnet_jax.evaluation.activation import activation_maps, coloured, maps_of, write_panel


def test_sum_of_squares_of_unit_length(rng):
    features = rng.standard_normal((3, 8, 4, 5), np.float32)
    features[2] = 0
    found = np.asarray(activation_maps(features))
    for row in range(2):
        energy = (features[row].astype(np.float64) ** 2).sum(axis=2)
        np.testing.assert_allclose(found[row], energy / np.linalg.norm(energy), rtol=1e-5)
    # An image without any activation has a map of zeros, not of nothing.
    np.testing.assert_array_equal(found[2], 0)


def test_maps_of_more_images_than_a_batch(rng):
    model = models.build("osnet_x0_25", image_size=(64, 32))
    weights = model.init(jax.random.key(0))
    inputs = {"mean": augment.IMAGENET_MEAN, "std": augment.IMAGENET_STD}
    files = []
    for pixels in rng.integers(0, 256, (35, 50, 24, 3), np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append(buffer.getvalue())
    found = maps_of(model, weights, files, interpolation="bilinear", **inputs)
    assert (found.shape, found.dtype) == ((35, 4, 2), np.float32)
    for row in (0, 31, 34):
        image = jnp.asarray(transforms.load(files[row], (64, 32), "bilinear")[None])
        outputs, _ = model.apply(*weights, augment.normalise(image, *inputs.values()), train=False, stages=True)
        energy = (np.asarray(outputs["stages"]["conv5"][0], np.float64) ** 2).sum(axis=2)
        np.testing.assert_allclose(found[row], energy / np.linalg.norm(energy), rtol=1e-3, atol=1e-5)
    with pytest.raises(DataError, match="not an image"):
        maps_of(model, weights, [b"nothing"], interpolation="bilinear", **inputs)


def test_colours_run_from_blue_to_red():
    drawn = coloured(np.array([[0.0, 0.0], [1.0, 1.0]], np.float32), (64, 32))
    assert drawn.shape == (64, 32, 3)
    first, last = drawn[0, 0], drawn[-1, -1]
    assert first[2] > 100 > first[0]
    assert last[0] > 100 > last[2]


def test_panel(rng, tmp_path):
    image = rng.integers(0, 256, (64, 32, 3), np.uint8)
    maps = [rng.random((4, 2), np.float32) for _ in range(2)]
    write_panel(tmp_path / "deep" / "a.png", image, maps)
    drawn = _read(tmp_path / "deep" / "a.png")
    assert drawn.shape == (64, 5 * 32 + 4 * 8, 3)
    np.testing.assert_array_equal(drawn[:, :32], image)
    np.testing.assert_array_equal(drawn[:, 40:72], coloured(maps[0], (64, 32)))
    write_panel(tmp_path / "b.png", image, maps[:1], mark=(0.5, 0.5))
    assert np.any(_read(tmp_path / "b.png")[:, :32] != image)


def _read(path):
    with Image.open(path) as image:
        return np.asarray(image)
