import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dmosnet_jax.data import augment as augmentation

ONE = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@functools.partial(jax.jit, static_argnames=("flip", "pad", "erase", "erasing", "mean", "std"))
def run(seed, images, **options):
    return augmentation.augment(jax.random.key(seed), images, **options)


def pixels(floats):
    """Back to levels, for results made with mean 0 and standard deviation 1."""
    return np.rint(np.asarray(floats) * 255).astype(np.int64)


def coordinates(batch, height, width):
    """Images whose pixel at (y, x) is (y + 1, x + 1, 255): where it came from can be read off the result."""
    y, x = np.mgrid[1 : height + 1, 1 : width + 1]
    image = np.stack([y, x, np.full_like(y, 255)], axis=-1).astype(np.uint8)
    return jnp.asarray(np.broadcast_to(image, (batch, *image.shape)))


def test_normalise_equals_the_definition(rng):
    images = rng.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    got = augmentation.normalise(jnp.asarray(images))
    expected = (images / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    half = augmentation.normalise(jnp.asarray(images), dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, got.astype(jnp.bfloat16))


def test_everything_off_is_normalise(rng):
    images = jnp.asarray(rng.integers(0, 256, (4, 16, 8, 3), dtype=np.uint8))
    got = run(0, images, flip=0.0, pad=0, erase=0.0)
    np.testing.assert_array_equal(got, jax.jit(augmentation.normalise)(images))


def test_same_key_same_result_other_key_other_result(rng):
    images = jnp.asarray(rng.integers(0, 256, (8, 32, 16, 3), dtype=np.uint8))
    first, again, other = run(1, images), run(1, images), run(2, images)
    np.testing.assert_array_equal(first, again)
    assert all(np.any(first[i] != other[i]) for i in range(8))


def test_flip_mirrors_and_has_its_rate(rng):
    images = rng.integers(0, 256, (2000, 4, 3, 3), dtype=np.uint8)
    for rate in (0.0, 0.5, 0.9, 1.0):
        got = pixels(run(3, jnp.asarray(images), flip=rate, pad=0, erase=0.0, **ONE))
        mirrored = np.all(got == images[:, :, ::-1], axis=(1, 2, 3))
        kept = np.all(got == images, axis=(1, 2, 3))
        assert np.all(mirrored ^ kept)
        # Four standard deviations of a binomial share; exact at 0 and 1.
        assert abs(mirrored.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 2000)


def test_crop_offsets_are_uniform_and_the_border_is_black():
    count, pad, height, width = 6000, 2, 8, 6
    got = pixels(run(4, coordinates(count, height, width), flip=0.0, pad=pad, erase=0.0, **ONE))
    # The centre pixel is never padding, and says the shift.
    rows = got[:, 4, 3, 0] - 5 + pad
    columns = got[:, 4, 3, 1] - 4 + pad
    cells = np.bincount(rows * 5 + columns, minlength=25)
    assert cells.size == 25
    expected = count / 25
    # Chi-square with 24 degrees of freedom: 51.2 is its 0.999 quantile.
    assert ((cells - expected) ** 2 / expected).sum() < 51.2
    for image, row, column in zip(got[:50], rows, columns, strict=False):
        y, x = np.mgrid[0:height, 0:width] + np.array([row - pad, column - pad])[:, None, None]
        visible = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        np.testing.assert_array_equal(image[..., 0], np.where(visible, y + 1, 0))
        np.testing.assert_array_equal(image[..., 1], np.where(visible, x + 1, 0))
        np.testing.assert_array_equal(image[..., 2], np.where(visible, 255, 0))


def test_padding_is_black_before_normalisation():
    images = jnp.full((32, 8, 8, 3), 255, jnp.uint8)
    got = np.asarray(run(5, images, flip=0.0, pad=4, erase=0.0))
    black = -np.array(augmentation.IMAGENET_MEAN) / np.array(augmentation.IMAGENET_STD)
    padding = got[..., 0] < 0
    assert 0.1 < padding.mean() < 0.9
    np.testing.assert_allclose(got[padding], np.broadcast_to(black, got[padding].shape), rtol=1e-5)


@pytest.mark.parametrize("erasing", ["fastreid", "spcl"])
def test_erased_rectangles_follow_the_reference_distribution(rng, erasing):
    count, height, width = 2000, 64, 32
    images = jnp.full((count, height, width, 3), 200, jnp.uint8)
    got = np.asarray(run(6, images, flip=0.0, pad=0, erase=0.5, erasing=erasing))
    fill = (0.0, 0.0, 0.0) if erasing == "fastreid" else augmentation.IMAGENET_MEAN
    erased = np.all(got == np.float32(fill), axis=-1)
    hit = erased.any(axis=(1, 2))
    assert abs(hit.mean() - 0.5) < 4 * np.sqrt(0.25 / count)
    h = erased[hit].any(axis=2).sum(axis=1)
    w = erased[hit].any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(erased[hit].sum(axis=(1, 2)), h * w)
    assert h.max() < height
    assert w.max() < width
    share = h * w / (height * width)
    # The reference draws one rectangle at a time and rejects those that do not fit: torchvision's RandomErasing, of
    # which fast-reid takes the defaults, and SpCL's own. Rounding the sides to pixels moves the share a little.
    if erasing == "fastreid":
        area, aspect = rng.uniform(0.02, 0.33, 200_000), np.exp(rng.uniform(np.log(0.3), np.log(3.3), 200_000))
        assert 0.012 < share.min() < share.max() < 0.35
    else:
        area, aspect = rng.uniform(0.02, 0.4, 200_000), rng.uniform(0.3, 1 / 0.3, 200_000)
        assert 0.012 < share.min() < share.max() < 0.42
        assert share.max() > 0.35
    area *= height * width
    sides = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (sides[0] < height) & (sides[1] < width)
    ratio = np.log(sides[0] / sides[1])[fits]
    for ours, theirs in (
        (h, sides[0][fits]),
        (w, sides[1][fits]),
        (share, sides[0][fits] * sides[1][fits] / 2048),
        (np.log(h / w), ratio),
    ):
        assert abs(ours.mean() - theirs.mean()) < 4 * theirs.std() / np.sqrt(hit.sum())
        assert abs(ours.std() / theirs.std() - 1) < 0.1
    # Uniform placement: the slack above the rectangle is half of all slack, on average.
    top = erased[hit].any(axis=2).argmax(axis=1)
    left = erased[hit].any(axis=1).argmax(axis=1)
    assert abs((top / (height - h)).mean() - 0.5) < 0.05
    assert abs((left / (width - w)).mean() - 0.5) < 0.05
    assert top.min() == 0
    assert (top + h).max() == height


def test_erase_probability_zero_and_one():
    images = jnp.full((300, 32, 16, 3), 200, jnp.uint8)
    never = np.asarray(run(7, images, flip=0.0, pad=0, erase=0.0))
    always = np.asarray(run(7, images, flip=0.0, pad=0, erase=1.0))
    assert not np.any(never == 0)
    assert np.all((always == 0).any(axis=(1, 2, 3)))


def test_an_image_too_small_to_erase_is_left_alone():
    images = jnp.full((50, 1, 1, 3), 200, jnp.uint8)
    assert not np.any(np.asarray(run(8, images, flip=0.0, pad=0, erase=1.0)) == 0)


def test_an_image_does_not_depend_on_its_batch(rng):
    images = jnp.asarray(rng.integers(0, 256, (16, 32, 16, 3), dtype=np.uint8))
    whole = run(9, images)
    np.testing.assert_array_equal(run(9, images[:5]), whole[:5])
    replaced = images.at[:3].set(jnp.uint8(7))
    np.testing.assert_array_equal(run(9, replaced)[3:], whole[3:])


def test_identical_images_are_treated_independently():
    images = jnp.asarray(np.broadcast_to(np.arange(32 * 16 * 3, dtype=np.uint8).reshape(32, 16, 3), (16, 32, 16, 3)))
    results = {np.asarray(image).tobytes() for image in run(10, images)}
    assert len(results) == 16


def test_sharded_equals_unsharded_bit_for_bit_without_communication(rng):
    images = jnp.asarray(rng.integers(0, 256, (16, 32, 16, 3), dtype=np.uint8))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(augmentation.augment, out_shardings=sharding)
    key = jax.device_put(jax.random.key(11), NamedSharding(mesh, PartitionSpec()))
    sharded_images = jax.device_put(images, sharding)
    program = step.lower(key, sharded_images).compile().as_text()
    assert not any(name in program for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute"))
    np.testing.assert_array_equal(step(key, sharded_images), run(11, images))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), {}, "must be uint8"),
        (np.zeros((4, 4, 3), np.uint8), {}, "must be uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), {}, "must be uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"flip": 1.5}, "flip=1.5"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"erase": -0.1}, "erase=-0.1"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"pad": -1}, "pad=-1"),
        (np.zeros((2, 4, 4, 3), np.uint8), {"std": (1.0, 0.0, 1.0)}, "std="),
    ],
)
@pytest.mark.usefixtures("no_array_checks")
def test_misuse_raises_while_tracing(images, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: augmentation.augment(jax.random.key(0), x, **options), images)
