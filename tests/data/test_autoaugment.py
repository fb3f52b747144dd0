"""AutoAugment: who is changed, by what, and that nothing but seed, epoch, step and place decides it."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.data import transforms
from dmosnet_jax.data.autoaugment import OPERATIONS, POLICY, AutoAugment
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.pipeline import train_batches
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows


@pytest.fixture
def photo(rng):
    smooth = np.cumsum(np.cumsum(rng.integers(-3, 4, (64, 32, 3)), 0), 1)
    return Image.fromarray(np.clip(128 + smooth, 0, 255).astype(np.uint8))


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int32)


def apply(name, image, level, seed=0):
    return pixels(OPERATIONS[name](image, level, np.random.default_rng(seed)))


def test_operations_are_what_their_names_say(photo):
    x = pixels(photo)
    np.testing.assert_array_equal(apply("invert", photo, 4), 255 - x)
    np.testing.assert_array_equal(apply("posterize", photo, 6), x & 0b11111100)
    np.testing.assert_array_equal(apply("posterize", photo, 0), x & 0b11110000)
    np.testing.assert_array_equal(apply("solarize", photo, 5), np.where(x < 128, x, 255 - x))
    # A tenth of the colour and nine tenths of grey, by ITU-R 601.
    grey = (x @ np.array([299, 587, 114]))[..., None] / 1000
    assert np.abs(apply("color", photo, 0) - (0.1 * x + 0.9 * grey)).max() <= 2
    for name in ("contrast", "sharpness", "color"):
        np.testing.assert_array_equal(apply(name, photo, 5), x)
    assert len({apply("shear_x", photo, 10, seed).tobytes() for seed in range(20)}) == 4
    assert len({apply("rotate", photo, 9, seed).tobytes() for seed in range(20)}) == 4
    for channel in range(3):
        flat = apply("equalize", photo, 0)[..., channel].ravel()
        assert np.abs(np.sort(flat) - np.linspace(0, 255, flat.size)).mean() < 24
        stretched = apply("autocontrast", photo, 0)[..., channel]
        assert stretched.min() <= 1
        assert stretched.max() >= 254


def test_shear_and_rotation_fill_with_grey(photo):
    corners = apply("rotate", photo, 10)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal(corners, np.full((4, 3), 128))
    sheared = apply("shear_x", photo, 10)
    # 0.3 of 64 rows: 19 columns at the far end, none at the top.
    assert (sheared[-1] == 128).all(axis=1).sum() in (18, 19, 20)
    np.testing.assert_allclose(sheared[0], pixels(photo)[0], atol=24)


def test_the_policy_is_complete():
    assert len(POLICY) == 25
    assert {name for pair in POLICY for name, _, _ in pair} == OPERATIONS.keys()
    assert all(0 <= p <= 1 and 0 <= level <= 10 for pair in POLICY for _, p, level in pair)


def test_the_share_of_changed_images():
    policy = AutoAugment(0.1, seed=3, epoch=5)
    chosen = np.stack([policy.chosen(step, 64) for step in range(400)])
    # 25,600 draws: four standard deviations are 0.0075.
    assert abs(chosen.mean() - 0.1) < 0.0075
    for other in (AutoAugment(0.1, 4, 5), AutoAugment(0.1, 3, 6)):
        assert (other.chosen(0, 1000) != policy.chosen(0, 1000)).any()
    assert not AutoAugment(0.0, 3, 5).chosen(0, 1000).any()
    assert AutoAugment(1.0, 3, 5).chosen(0, 1000).all()


def test_an_image_depends_on_its_place_alone(photo):
    policy = AutoAugment(1.0, seed=1, epoch=2)
    results = {}
    for step, place in itertools.product(range(8), range(8)):
        changed = policy(photo, step, place)
        assert (changed.size, changed.mode) == (photo.size, "RGB")
        np.testing.assert_array_equal(pixels(changed), pixels(policy(photo, step, place)))
        results[step, place] = changed.tobytes()
    assert len(set(results.values())) > 15


class Photos:
    """A split whose images are all the same photo."""

    name, location, read_many = "photos", "", Rows.read_many

    def __init__(self, data, count):
        self.data = data
        self.pids = self.camids = np.zeros(count, np.int32)

    def __len__(self):
        return len(self.pids)

    def record(self, index):
        del index
        return Record(self.data, 0, 0, "photo.png")


@pytest.mark.parametrize("cached", [False, True])
def test_the_stream_changes_what_is_chosen_before_it_resizes(photo, cached):
    stream = io.BytesIO()
    photo.save(stream, "PNG")
    data, size = stream.getvalue(), (32, 16)
    split = Photos(data, 40)
    policy = AutoAugment(0.4, seed=7, epoch=1)
    plan = np.random.default_rng(0).integers(0, 40, (6, 8)).astype(np.int32)
    cache = ImageCache(40, size) if cached else None
    whole = list(train_batches(split, plan, image_size=size, threads=3, policy=policy, cache=cache))
    plain = transforms.load(data, size)
    for step, batch in enumerate(whole):
        chosen = policy.chosen(step, 8)
        for place in range(8):
            changed = policy(photo, step, place) if chosen[place] else photo
            expected = transforms.resize(np.asarray(changed), size)
            np.testing.assert_array_equal(batch["image"][place], expected)
    if cache is not None:
        assert (cache.images[cache.filled] == plain).all()
    # Two processes, resumed in the middle, see their halves of the same.
    for process in range(2):
        part = train_batches(
            split, plan, image_size=size, threads=0, start=2, process_index=process, process_count=2, policy=policy
        )
        for step, batch in enumerate(part, start=2):
            np.testing.assert_array_equal(batch["image"], whole[step]["image"][4 * process : 4 * process + 4])
