import jax
import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data.splits import load_split
from dmosnet_jax.evaluation import forgetting


@pytest.mark.usefixtures("no_array_checks")
def test_cosine_is_numpys(rng):
    first, second = rng.normal(size=(2, 9, 64)).astype(np.float32)
    second[3], second[4], first[5] = 7 * first[3], -first[4], 0
    found = np.asarray(forgetting.cosine(first, second))
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    assert (found[5], abs(found).max() <= 1) == (0, True)
    np.testing.assert_allclose(forgetting.cosine(1e-3 * first, 1e3 * second), found, atol=1e-6)
    with pytest.raises(ValueError, match="have no cosine"):
        forgetting.cosine(first, second[:, :5])


class Colours:
    """A network whose embedding is a linear map of the mean colour; the parameters are the map."""

    image_size = (8, 4)

    def apply(self, params, stats, images, *, train):
        assert not train
        return {"feature": images.mean((1, 2)) @ params["map"] + stats["shift"]}, stats


@pytest.fixture(scope="module")
def proxies():
    rng = np.random.default_rng(5)
    return [
        forgetting.Proxy(
            Colours(),
            {"map": rng.normal(size=(3, 6)).astype(np.float32)},
            {"shift": np.float32(shift)},
            mean=(0.1 * shift, 0.4, 0.5),
            std=(0.2, 0.3, 0.4),
        )
        for shift in (1, 2)
    ]


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 7), (8, 16), (8, 5)])
def test_scores_are_those_of_a_direct_computation(tiny_data, proxies, devices, batch_size):
    split = load_split(tiny_data, "tiny", "train")
    score = forgetting.ForgettingScorer(*proxies, make_mesh(jax.devices()[:devices]), batch_size=batch_size, threads=1)
    found = np.concatenate(list(score(split)))
    assert (found.shape, found.dtype) == ((48,), np.float32)
    from dmosnet_jax.data import transforms

    images = np.stack([transforms.load(split.record(row).image, (8, 4)) for row in range(48)]).astype(np.float64) / 255
    features = [
        ((images - np.array(p.mean)) / np.array(p.std)).mean((1, 2)) @ p.params["map"] + p.stats["shift"]
        for p in proxies
    ]
    a, b = features
    expected = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert np.ptp(found) > 0.01


def test_embeddings_that_are_not_finite_are_told_with_the_image(tiny_data, proxies):
    broken = forgetting.Proxy(Colours(), {"map": np.full((3, 6), np.inf, np.float32)}, proxies[0].stats)
    score = forgetting.ForgettingScorer(proxies[0], broken, make_mesh(), batch_size=8, threads=0)
    with pytest.raises(DataError, match=r"tiny image 0 \(train/0001_c1_0\.jpg\) has no score: .* check both"):
        list(score(load_split(tiny_data, "tiny", "train")))
