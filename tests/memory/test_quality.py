import numpy as np
import pytest
from sklearn import metrics

from dmosnet_jax.memory.quality import agreement


@pytest.mark.parametrize("seed", range(20))
def test_equals_scikit_learn_and_counted_pairs(seed):
    rng = np.random.default_rng(seed)
    images = int(rng.integers(2, 120))
    identities = rng.integers(-1, int(rng.integers(1, 12)), images)
    identities[0] = 3
    labels = np.where(rng.random(images) < 0.7, identities, rng.integers(0, 30, images))
    labels = np.where(labels < 0, 99, labels)
    found = agreement(labels, identities)
    known = identities >= 0
    a, b = labels[known], identities[known]
    assert found.images == known.sum()
    assert found.nmi == pytest.approx(metrics.normalized_mutual_info_score(b, a), abs=1e-9)
    assert found.adjusted_rand == pytest.approx(metrics.adjusted_rand_score(b, a), abs=1e-9)
    upper = np.triu(np.ones((len(a), len(a)), bool), 1)
    same_label, same_identity = (a[:, None] == a) & upper, (b[:, None] == b) & upper
    both = (same_label & same_identity).sum()
    assert found.pair_precision == pytest.approx(both / same_label.sum() if same_label.any() else 1.0)
    assert found.pair_recall == pytest.approx(both / same_identity.sum() if same_identity.any() else 1.0)


def test_images_left_out_of_clusters_are_alone():
    identities = np.array([1, 1, 1, 2])
    outside, alone = agreement(np.array([0, 0, -1, -1]), identities), agreement(np.array([0, 0, 1, 2]), identities)
    assert outside == alone
    assert (outside.pair_precision, outside.pair_recall) == (1.0, pytest.approx(1 / 3))


def test_without_identities_there_is_nothing_to_say():
    assert agreement(np.array([0, 1]), np.array([-1, -1])) is None


def test_perfect_labels_and_large_numbers(rng):
    identities = rng.integers(0, 50_000, 300_000)
    found = agreement(rng.permutation(50_000)[identities], identities)
    assert found[:4] == pytest.approx((1.0, 1.0, 1.0, 1.0))
