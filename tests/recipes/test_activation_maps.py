"""The activation map command: numbers by a direct computation, pictures, and PyTorch's maps."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmosnet_jax import models
from dmosnet_jax.data import augment, transforms
from dmosnet_jax.export import folder
from dmosnet_jax.models.attention import watching, weights_at

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZE = (64, 32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    (root / "deep").mkdir()
    for name in ("a.png", "deep/a.png", "deep/b.jpg"):
        Image.fromarray(rng.integers(0, 256, (50, 24, 3), np.uint8)).save(root / name)
    return root


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Exported folders of DM-OSNet and OSNet."""
    root, found = tmp_path_factory.mktemp("networks"), {}
    for name in ("dmosnet_x0_25", "osnet_x0_25"):
        model = models.build(name, image_size=SIZE)
        params, stats = model.init(jax.random.key(len(name)))
        folder.save(root / name, params, stats, folder.Card(model, augment.IMAGENET_MEAN, augment.IMAGENET_STD))
        found[name] = (root / name, model, params, stats)
    return found


def _flags(photos, output, **fields):
    fields = {"images": photos, "output": output, "eval.batch_size": 2, "data.threads": 1} | fields
    return [
        f"--config={ROOT}/configs/activation_maps.py",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def test_maps_and_pictures(cli, photos, networks, tmp_path):
    path, model, params, stats = networks["dmosnet_x0_25"]
    fields = {"checkpoint": path, "compare": networks["osnet_x0_25"][0], "attention_at": "(0.9, 0.1)"}
    finished = cli.forked(*_flags(photos, tmp_path / "out", **fields))
    assert finished.status == 0, finished.err
    assert "activation maps of 3 images written" in finished.out
    files = ["a.png", "deep/a.png", "deep/b.jpg"]
    for file in files:
        with Image.open(tmp_path / "out" / f"{file}.png") as panel:
            assert panel.size == (5 * SIZE[1] + 4 * 8, SIZE[0])
        with Image.open(tmp_path / "out" / f"{file}.attention.png") as panel:
            assert panel.height == SIZE[0]
    with np.load(tmp_path / "out" / "maps.npz", allow_pickle=False) as arrays:
        assert arrays["files"].tolist() == files
        found = arrays["maps"]
    assert (found.shape, found.dtype) == ((3, 4, 2), np.float32)
    for file, seen in zip(files, found, strict=True):
        image = transforms.load((photos / file).read_bytes(), SIZE, "bicubic")
        pixels = augment.normalise(jnp.asarray(image[None]), augment.IMAGENET_MEAN, augment.IMAGENET_STD)
        last = model.apply(params, stats, pixels, train=False, stages=True)[0]["stages"]["conv5"][0]
        energy = (np.asarray(last, np.float64) ** 2).sum(axis=2)
        np.testing.assert_allclose(seen, energy / np.linalg.norm(energy), rtol=1e-3, atol=1e-5)
    with np.load(tmp_path / "out" / "compared.npz", allow_pickle=False) as arrays:
        assert np.abs(arrays["maps"] - found).max() > 1e-3


def test_attention_is_a_share_of_windows(networks, rng):
    _, model, params, stats = networks["dmosnet_x0_25"]
    images = rng.standard_normal((2, *SIZE, 3), np.float32)
    with watching() as watched:
        model.apply(params, stats, images, train=False)
    model.apply(params, stats, images, train=False)
    assert len(watched) == 2, "one for each block of conv2, and none from outside"
    weights = np.asarray(weights_at(watched[0], (0.0, 0.99)))
    heads, dim = watched[0].q.shape[2:]
    assert weights.shape == (2, heads, 2, 1)
    q, k = np.asarray(watched[0].q)[:, 7], np.asarray(watched[0].k)
    scores = np.einsum("bhd,bmhd->bhm", q, k) / np.sqrt(dim)
    expected = np.exp(scores) / np.exp(scores).sum(axis=2, keepdims=True)
    np.testing.assert_allclose(weights.reshape(2, heads, -1), expected, rtol=1e-4)


def test_refusals(cli, photos, networks, tmp_path):
    path = networks["osnet_x0_25"][0]
    output = tmp_path / "out"
    cases = (
        (_flags(photos, output), 2, "checkpoint is not set: give --config.checkpoint=PATH"),
        (_flags(photos, output, checkpoint=path, attention_at="(0.5, 1.0)"), 2, "attention_at=(0.5, 1.0)"),
        (_flags(tmp_path / "nowhere", output, checkpoint=path), 1, "no such folder or image"),
    )
    for flags, status, message in cases:
        finished = cli.forked(*flags)
        assert (finished.status, len(finished.errors)) == (status, 1), finished.err
        assert message in finished.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_maps_of_published_weights_are_pytorchs(cli, shared, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra `peers`)")
    from tests.models import torch_peers

    weights = shared("weights/osnet_x0_25_market1501.pth")
    network = torch_peers.torchreid("osnet").osnet_x0_25(num_classes=751, pretrained=False)
    network.load_state_dict(torch.load(weights, weights_only=True))
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (2, 256, 128, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for row, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "in" / f"{row}.png")
    finished = cli.forked(*_flags(tmp_path / "in", tmp_path / "out", checkpoint=weights))
    assert finished.status == 0, finished.err
    inputs = (pixels / 255.0 - augment.IMAGENET_MEAN) / augment.IMAGENET_STD
    with torch.inference_mode():
        last = network.eval()(torch.from_numpy(inputs.transpose(0, 3, 1, 2)).float(), return_featuremaps=True)
        energy = (last**2).sum(1).flatten(1)
        expected = torch.nn.functional.normalize(energy).reshape(2, 16, 8).numpy()
    with np.load(tmp_path / "out" / "maps.npz", allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["maps"], expected, atol=1e-4)
