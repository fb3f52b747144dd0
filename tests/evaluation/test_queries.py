"""Multiple queries and query expansion against sums written out, one query at a time."""

import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.evaluation import queries


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_query_of_several_images_is_their_mean(rng):
    query, images = (rng.normal(size=(n, 6)).astype(np.float32) for n in (5, 40))
    query_ids, query_cams = np.array([3, 3, 7, -1, 9]), np.array([0, 1, 1, 0, 0])
    ids, cams = rng.choice([-1, 3, 7, 8], 40), rng.integers(0, 2, 40)
    # The third has no image from its camera, the fourth no identity, the fifth no image at all.
    cams[ids == 7] = 0
    found = queries.multi_query(query, query_ids, query_cams, images, ids, cams)
    assert found.dtype == np.float32
    for row in range(5):
        mine = (ids == query_ids[row]) & (cams == query_cams[row])
        expected = unit(images[mine].astype(np.float64)).mean(axis=0) if row < 2 else query[row]
        np.testing.assert_allclose(found[row], unit(expected), rtol=1e-5, atol=1e-6)
    groups, own = queries.same_person_and_camera(query_ids, query_cams, ids, cams)
    assert [int((groups == group).sum()) for group in own] == [
        *(int(((ids == 3) & (cams == camera)).sum()) for camera in (0, 1)),
        0,
        int((ids == -1).sum()),
        0,
    ]
    assert own[3] == -1


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("block", [3, 100])
def test_expansion_adds_the_nearest_of_the_gallery(rng, alpha, block):
    query, gallery = (rng.normal(size=(n, 4)).astype(np.float32) for n in (11, 30))
    found = queries.expand(query, gallery, neighbours=20, alpha=alpha, block=block)
    units, negative = unit(gallery.astype(np.float64)), 0
    for row, own in enumerate(unit(query.astype(np.float64))):
        similarity = units @ own
        near = np.argsort(-similarity, kind="stable")[:20]
        negative += (similarity[near] < 0).sum()
        weights = np.ones(20) if alpha == 0 else np.maximum(similarity[near], 0) ** alpha
        expected = own + sum(weight * image for weight, image in zip(weights, units[near], strict=True))
        np.testing.assert_allclose(found[row], unit(expected), rtol=2e-5, atol=2e-6)
    assert negative


def test_equal_neighbours_are_taken_by_index():
    gallery = np.array([[0, 1, 0], [1, 0, 1], [1, 0, -1], [1, 0, 1]], np.float32)
    found = queries.expand(np.array([[1, 0, 0]], np.float32), gallery, neighbours=2)
    np.testing.assert_allclose(found, [[1, 0, 0]], atol=1e-6)
    found = queries.expand(np.array([[1, 0, 0]], np.float32), gallery, neighbours=4)
    assert found[0, 1] > 0.1


@pytest.mark.parametrize("options", [{"neighbours": 0}, {"neighbours": 5}, {"neighbours": 2, "alpha": -1.0}])
def test_expansion_that_makes_no_sense(options):
    gallery = np.eye(4, dtype=np.float32)
    with pytest.raises(ConfigError, match=r"(neighbours|alpha)=.* must be a (whole )?number of at (least|most) [014]$"):
        queries.expand(gallery[:2], gallery, **options)


def test_features_that_are_not_finite():
    gallery = np.eye(4, dtype=np.float32)
    with pytest.raises(DataError, match="1 query features are not finite"):
        queries.expand(np.full((1, 4), np.nan, np.float32), gallery, neighbours=1)
