"""The embedding map's axes against a singular value decomposition, and its choice of images."""

import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.evaluation.principal import project, some_identities


def test_axes_are_those_of_a_decomposition(rng):
    features = (rng.normal(size=(300, 12)) * np.linspace(3, 0.1, 12) + 5).astype(np.float32)
    found = project(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.shares, (values**2 / (values**2).sum())[:2], rtol=1e-5)
    expected = left[:, :2] * values[:2]
    for axis in range(2):
        direction = right[axis]
        sign = np.sign(direction[np.abs(direction).argmax()])
        np.testing.assert_allclose(found.points[:, axis], sign * expected[:, axis], atol=1e-4)


def test_features_that_do_not_differ():
    found = project(np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(found.points, np.zeros((4, 2)))
    np.testing.assert_array_equal(found.shares, [0, 0])
    with pytest.raises(DataError, match="no 2 axes"):
        project(np.ones((4, 1), np.float32))


def test_some_identities_within_the_bound(rng):
    ids = np.concatenate([np.repeat(np.arange(1, 31), rng.integers(2, 40, 30)), [0, 0, -1, -1, 99]])
    for most in (60, 100, 1000):
        rows = some_identities(ids, most)
        assert len(set(rows)) == len(rows) <= most
        taken, counts = np.unique(ids[rows], return_counts=True)
        assert set(taken) <= set(range(1, 31)), "no distractor, unknown or single one"
        assert {1, 30} <= set(taken) or most == 60
        own = [(ids == identity).sum() for identity in taken]
        np.testing.assert_array_equal(counts, np.minimum(own, 12))
    assert len(taken) == 30
    assert some_identities(np.array([1, 2, 3, 0, 0, -1]), 10).size == 0
