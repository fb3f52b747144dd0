"""The resize against Pillow's."""

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.data import resampling


@pytest.mark.parametrize("interpolation", sorted(resampling.FILTERS))
def test_equals_pillow(rng, interpolation):
    kind = Image.Resampling[interpolation.upper()]
    for _ in range(150):
        height, width, *size = map(int, rng.integers(1, 200, 4))
        # Extremes lie beside each other, so that a bicubic filter leaves the levels and is cut.
        image = rng.integers(0, 256, (height, width, 3), np.uint8) // 128 * 255
        expected = np.asarray(Image.fromarray(image).resize((size[1], size[0]), kind))
        found = resampling.resize(image, (size[0], size[1]), interpolation)
        np.testing.assert_array_equal(found, expected, f"{height}x{width} to {size}")


@pytest.mark.parametrize(("before", "after"), [(64, 128), (300, 7), (1, 5), (5, 1), (2, 3)])
@pytest.mark.parametrize("interpolation", sorted(resampling.FILTERS))
def test_windows_stay_inside(before, after, interpolation):
    first, table = resampling.weights(before, after, interpolation)
    assert first.shape == (after,)
    assert np.all(first + table.shape[1] <= before)
    np.testing.assert_allclose(table.sum(axis=1), 1 << 22, atol=table.shape[1])


def test_views_and_equal_sizes(rng):
    image = rng.integers(0, 256, (40, 30, 3), np.uint8)
    turned = image[::-1, ::2].transpose(1, 0, 2)
    expected = np.asarray(Image.fromarray(np.ascontiguousarray(turned)).resize((40, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resampling.resize(turned, (20, 40), "bicubic"), expected)
    np.testing.assert_array_equal(resampling.resize(image, (40, 30), "bicubic"), image)
