import itertools

import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError
from dmosnet_jax.data import samplers


def long_tailed(rng, n, classes, noise=0):
    """Labels with very uneven class sizes, six cameras, and `noise` images without a class."""
    labels = np.floor(classes * rng.random(n) ** 2).astype(np.int32)
    labels[rng.permutation(n)[:noise]] = -1
    return labels, rng.integers(0, 6, n).astype(np.int32)


@pytest.mark.parametrize("instances", [1, 4, 16])
def test_identity_batches_are_p_by_k(rng, instances):
    pids, _ = long_tailed(rng, 3000, 90, noise=200)
    plan = samplers.identity_epoch(pids, batch_size=64, instances=instances, seed=1, epoch=0)
    assert plan.dtype == np.int32
    per_batch = 64 // instances
    assert plan.shape[1] == 64
    groups = pids[plan].reshape(-1, per_batch, instances)
    assert np.all(groups == groups[:, :, :1])
    assert np.all(groups >= 0)
    assert all(len(set(batch)) == per_batch for batch in groups[:, :, 0])
    sizes = np.bincount(pids[pids >= 0], minlength=90)
    large = sizes[pids[plan]] >= instances
    # Drawn without replacement over the pass; only too small identities repeat images.
    assert np.bincount(plan[large]).max() == 1
    used = np.bincount(groups[:, :, 0].ravel(), minlength=90)
    chunks = np.where(sizes > 0, np.maximum(sizes // instances, 1), 0)
    assert np.all(used <= chunks)
    # The pass only ends when too few identities have chunks left for another batch.
    assert np.sum(chunks - used > 0) < per_batch


def test_identity_small_identities_repeat_only_their_own(rng):
    pids = np.repeat(np.arange(8), [1, 2, 3, 1, 2, 3, 2, 1])
    plan = samplers.identity_epoch(pids, batch_size=32, instances=4, seed=0, epoch=0)
    assert plan.shape == (1, 32)
    assert sorted(set(pids[plan[0]])) == list(range(8))


def test_identity_steps_repeat_passes(rng):
    pids, _ = long_tailed(rng, 400, 20)
    options = {"batch_size": 16, "instances": 4, "seed": 3, "epoch": 2}
    one_pass = samplers.identity_epoch(pids, **options)
    plan = samplers.identity_epoch(pids, steps=3 * len(one_pass), **options)
    assert plan.shape == (3 * len(one_pass), 16)
    np.testing.assert_array_equal(plan[: len(one_pass)], one_pass)
    assert np.any(plan[len(one_pass) : 2 * len(one_pass)] != one_pass)


def walk(plan, labels, camids, instances):
    """Yields (class, group) for each class visited, checking the group against SpCL's rules."""
    members = {label: np.flatnonzero(labels == label) for label in set(labels.tolist())}
    flat = plan.ravel()
    start = 0
    while start < flat.size:
        label = int(labels[flat[start]])
        size = instances if len(members[label]) > 1 else 1
        group = flat[start : start + size]
        start += size
        assert label >= 0
        assert np.all(labels[group] == label)
        anchor, rest = group[0], group[1:]
        elsewhere = [i for i in members[label] if camids is not None and camids[i] != camids[anchor]]
        candidates = elsewhere or [i for i in members[label] if i != anchor]
        assert set(rest) <= set(candidates)
        if len(candidates) >= instances:
            assert len(set(rest)) == len(rest)
        yield label, group


@pytest.mark.parametrize("instances", [1, 2, 4, 16])
@pytest.mark.parametrize("with_cameras", [True, False])
def test_class_groups_follow_the_reference(rng, instances, with_cameras):
    labels, camids = long_tailed(rng, 800, 300, noise=100)
    # A class seen by one camera only falls back on its own images.
    camids[labels < 10] = 3
    cameras = camids if with_cameras else None
    options = {"batch_size": 64, "instances": instances, "seed": 5, "epoch": 1}
    plan = samplers.class_epoch(labels, cameras, steps=60, **options)
    assert plan.shape == (60, 64)
    assert plan.dtype == np.int32
    visited = [label for label, _ in walk(plan, labels, cameras, instances)]
    classes = set(labels[labels >= 0].tolist())
    passes = [visited[i : i + len(classes)] for i in range(0, len(visited), len(classes))]
    assert len(passes) > 1
    for one in passes[:-1]:
        assert set(one) == classes
    assert len(set(passes[-1])) == len(passes[-1])
    assert passes[0] != passes[1]


def test_class_draws_are_uniform():
    # One class: two images on camera 0, five on camera 1. Camera 0's anchors draw 3 of 5 without replacement.
    labels = np.zeros(7, np.int32)
    camids = np.array([1, 0, 1, 1, 0, 1, 1])
    plan = samplers.class_epoch(labels, camids, batch_size=4, instances=4, seed=0, epoch=0, steps=7000)
    anchors = np.bincount(plan[:, 0], minlength=7)
    # 22.5 and 27.9 are the 0.999 quantiles of chi-square with 6 and 9 degrees of freedom.
    assert ((anchors - 1000) ** 2 / 1000).sum() < 22.5
    other = plan[camids[plan[:, 0]] == 0][:, 1:]
    subsets = dict.fromkeys(itertools.combinations([0, 2, 3, 5, 6], 3), 0)
    for row in other:
        subsets[tuple(sorted(row))] += 1
    expected = len(other) / 10
    assert sum((count - expected) ** 2 / expected for count in subsets.values()) < 27.9
    # Camera 1's anchors have two candidates for three places: with replacement, both alike.
    few = plan[camids[plan[:, 0]] == 1][:, 1:]
    assert set(few.ravel()) == {1, 4}
    assert abs((few == 1).mean() - 0.5) < 4 * np.sqrt(0.25 / few.size)


def test_class_plan_of_fewer_images_than_a_batch_fills_up():
    plan = samplers.class_epoch(np.array([0, 0, 1]), None, batch_size=8, instances=2, seed=0, epoch=0, steps=3)
    assert plan.shape == (3, 8)
    assert set(plan.ravel()) == {0, 1, 2}


def test_class_labels_need_not_be_contiguous(rng):
    labels = np.array([7, 7, 2_000_000_000, 40, 40, 40, -5])
    plan = samplers.class_epoch(labels, None, batch_size=4, instances=2, seed=0, epoch=0, steps=5)
    assert set(plan.ravel()) == {0, 1, 2, 3, 4, 5}


PLANS = {
    "identity": lambda seed, epoch: samplers.identity_epoch(
        np.arange(200) // 5, batch_size=16, instances=4, seed=seed, epoch=epoch, steps=9
    ),
    "class": lambda seed, epoch: samplers.class_epoch(
        np.arange(200) // 5, np.arange(200) % 3, batch_size=16, instances=4, seed=seed, epoch=epoch, steps=9
    ),
    "few identities": lambda seed, epoch: samplers.identity_epoch(
        np.arange(200) // 25, batch_size=16, instances=1, seed=seed, epoch=epoch, steps=20
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_depend_on_seed_and_epoch_alone(name):
    make = PLANS[name]
    np.random.seed(1)
    first = make(0, 0)
    np.random.seed(2)
    np.testing.assert_array_equal(first, make(0, 0))
    others = [make(0, 1), make(1, 0), make(1, 1)]
    for a, b in itertools.combinations([first, *others], 2):
        assert np.any(a != b)


def test_one_image_of_an_identity_with_few_identities_is_a_shuffled_pass():
    pids = np.arange(104) // 13
    pids[50] = -1
    plan = samplers.identity_epoch(pids, batch_size=10, instances=1, seed=0, epoch=4)
    assert plan.shape == (10, 10)
    assert plan.dtype == np.int32
    counts = np.bincount(plan.ravel(), minlength=104)
    assert counts.max() == 1
    assert counts[50] == 0
    assert np.any(np.diff(plan.ravel()) != 1)
    repeated = samplers.identity_epoch(pids, batch_size=10, instances=1, seed=0, epoch=4, steps=25)
    assert repeated.shape == (25, 10)
    np.testing.assert_array_equal(repeated[:10], plan)
    assert np.any(repeated[10:20] != plan)


@pytest.mark.parametrize(("cameras", "share"), [(False, 1 / 21), (True, None)])
def test_a_wrong_image_of_another_video_is_drawn_like_any_other_where_cameras_do_not_count(cameras, share):
    """LUPerson: a person is in one video, which the records call a camera; an image of another is an error."""
    videos = np.where(np.arange(21 * 300) % 21 == 20, 1, 0)
    labels = np.arange(21 * 300) // 21
    plan = samplers.class_epoch(
        labels, videos if cameras else None, batch_size=64, instances=4, seed=0, epoch=0, steps=300
    )
    wrong = videos[plan].mean()
    if share is None:
        assert wrong > 0.7
    else:
        # Five standard deviations of a binomial share of 19,200 draws.
        assert abs(wrong - share) < 5 * np.sqrt(share * (1 - share) / plan.size)


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (1, 4), (4, 4), (9, 4), (12, 4), (7, 1)])
def test_evaluation_order_never_drops_an_image(n, batch_size):
    rows, mask = samplers.evaluation_order(n, batch_size)
    assert rows.dtype == np.int32
    assert mask.dtype == np.bool_
    assert rows.shape == mask.shape == (-(-n // batch_size), batch_size)
    np.testing.assert_array_equal(rows[mask], np.arange(n))
    assert np.all((rows >= 0) & (rows < max(n, 1)))


def test_two_million_images_are_planned_without_losing_any():
    n = 2_090_122
    rng = np.random.default_rng(3)
    labels = np.where(rng.random(n) < 0.4, np.arange(n) + n, rng.integers(0, 200_000, n))
    camids = rng.integers(0, 8, n)
    plan = samplers.class_epoch(labels, camids, batch_size=64, instances=4, seed=0, epoch=0, steps=400)
    assert plan.shape == (400, 64)
    list(walk_sizes(plan, labels))


def walk_sizes(plan, labels):
    """Each group holds one class; classes are not repeated within the pass."""
    sizes = np.unique(labels, return_counts=True)
    count_of = dict(zip(sizes[0].tolist(), sizes[1].tolist(), strict=True))
    flat, start, seen = plan.ravel(), 0, set()
    while start < flat.size:
        label = int(labels[flat[start]])
        assert label not in seen
        seen.add(label)
        size = 4 if count_of[label] > 1 else 1
        assert np.all(labels[flat[start : start + size]] == label)
        start += size
        yield label


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samplers.identity_epoch(np.arange(90), batch_size=30, instances=4, seed=0, epoch=0), "use 28"),
        (
            lambda: samplers.identity_epoch(np.arange(90) // 15, batch_size=64, instances=4, seed=0, epoch=0),
            "needs 16 identities per batch, the data has 6",
        ),
        (
            lambda: samplers.class_epoch(np.zeros(9, int), None, batch_size=6, instances=4, seed=0, epoch=0, steps=1),
            "batch_size=6 is not a multiple of instances=4",
        ),
        (
            lambda: samplers.class_epoch(np.full(9, -1), None, batch_size=8, instances=4, seed=0, epoch=0, steps=1),
            "no image has a class",
        ),
        (
            lambda: samplers.class_epoch(np.zeros(9, int), None, batch_size=8, instances=0, seed=0, epoch=0, steps=1),
            "instances=0",
        ),
        (
            lambda: samplers.identity_epoch(np.arange(9) % 2, batch_size=10, instances=1, seed=0, epoch=0),
            "batch_size=10 is more than the 9 images with an identity",
        ),
        (lambda: samplers.identity_epoch(np.arange(9), batch_size=3, instances=1, seed=-1, epoch=0), "seed=-1"),
        (lambda: samplers.evaluation_order(9, 0), "batch_size=0"),
    ],
)
def test_impossible_requests_name_the_fix(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
