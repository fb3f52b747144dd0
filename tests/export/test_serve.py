"""The extractor: any kind of image and any kind of weights, and the figures of real ones."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import make_mesh
from dmosnet_jax.data import augment, transforms
from dmosnet_jax.evaluation import ranking
from dmosnet_jax.export import folder, torch_export
from dmosnet_jax.export.weights import MODEL_OPTIONS, open_weights
from dmosnet_jax.recipes.export import convert
from dmosnet_jax.train import checkpoints
from dmosnet_jax.train import state as train_state
from tests.models.drawn import draw_tree

SIZE = (64, 32)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def _drawn(name="osnet_x0_25", **options):
    model = models.build(name, image_size=SIZE, **options)
    rng = np.random.default_rng(3)
    return model, *(draw_tree(tree, rng) for tree in model.shapes())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and its model and weights."""
    model, params, stats = _drawn()
    path = tmp_path_factory.mktemp("export") / "model"
    folder.save(path, params, stats, folder.Card(model, mean=MEAN, std=STD))
    return path, model, params, stats


@pytest.fixture(scope="module")
def extractor(saved):
    return dmosnet_jax.load(saved[0], batch_size=4)


@pytest.fixture
def arrays(rng):
    return [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in ((90, 40), (64, 32), (31, 57))]


def test_features_are_the_models(saved, extractor, arrays):
    _, model, params, stats = saved
    images = np.stack([transforms.resize(image, SIZE) for image in arrays])
    pixels = augment.normalise(jax.numpy.asarray(images), MEAN, STD)
    wanted = jax.jit(lambda *a: model.apply(*a, train=False)[0]["feature"])(params, stats, pixels)
    got = extractor(arrays)
    assert (got.dtype, got.shape, extractor.feature_dim) == (np.float32, (3, 128), 128)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_paths_pil_images_and_arrays_give_the_same(extractor, arrays, tmp_path):
    paths = []
    for number, image in enumerate(arrays):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(image).save(paths[-1])
    wanted = extractor(arrays)
    pictures = [Image.fromarray(image) for image in arrays]
    for images in (paths, [str(path) for path in paths], pictures, [arrays[0], pictures[1], paths[2]], iter(arrays)):
        np.testing.assert_array_equal(extractor(images), wanted)


def test_one_image_none_and_a_stack(extractor, arrays):
    wanted = extractor(arrays)
    np.testing.assert_allclose(extractor(arrays[1]), wanted[1:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(extractor(Image.fromarray(arrays[1])), wanted[1:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(extractor(np.stack([arrays[1]] * 2)), wanted[[1, 1]], rtol=1e-4, atol=1e-4)
    assert extractor([]).shape == (0, 128)


def test_batches_do_not_change_features(extractor, rng):
    images = rng.integers(0, 256, size=(11, 40, 20, 3), dtype=np.uint8)
    together = extractor(images)
    alone = np.concatenate([extractor(image) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3)


def test_normalised_features_are_unit(extractor, arrays):
    features = extractor(arrays, normalised=True)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), np.ones(3), rtol=1e-5)
    plain = extractor(arrays)
    np.testing.assert_allclose(features, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


def test_modes_of_pil_images(extractor, arrays):
    image = Image.fromarray(arrays[0])
    grey = image.convert("L")
    np.testing.assert_array_equal(extractor(grey), extractor(np.repeat(np.asarray(grey)[..., None], 3, axis=2)))
    palette = image.convert("P")
    palette.info["transparency"] = 0
    assert extractor(palette).shape == (1, 128)
    assert palette.info["transparency"] == 0


def test_pictures_that_are_none_are_named(extractor, arrays, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    cases = {
        "gone.jpg": [arrays[0], tmp_path / "gone.jpg"],
        "broken.jpg": [arrays[0], tmp_path / "broken.jpg"],
        "float32[4, 4, 3]": [arrays[0], np.zeros((4, 4, 3), np.float32)],
        "uint8[4]": [arrays[0], np.zeros(4, np.uint8)],
        "uint8[4, 4, 4]": [arrays[0], np.zeros((4, 4, 4), np.uint8)],
        "empty image": [arrays[0], np.zeros((0, 4, 3), np.uint8)],
        "NoneType": [arrays[0], None],
        "mode I;16": [arrays[0], Image.fromarray(np.zeros((4, 4), np.uint16))],
    }
    for part, images in cases.items():
        with pytest.raises(DataError, match=r"images\[1\]: ") as caught:
            extractor(images)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="images of type int: give paths"):
        extractor(5)


def test_few_programs_serve_any_number_of_images(saved, rng):
    extractor = dmosnet_jax.load(saved[0], batch_size=4)
    images = rng.integers(0, 256, size=(9, *SIZE, 3), dtype=np.uint8)
    for count in (9, 1, 2, 3, 4, 5, 8):
        assert len(extractor(images[:count])) == count
    assert extractor._forward._cache_size() == 3


def test_pytorch_files_tell_their_network(tmp_path, arrays):
    model, params, stats = _drawn("dmosnet_x0_25", pool="gem", num_classes=3)
    path = tmp_path / "weights.safetensors"
    torch_export.save(path, torch_export.to_state_dict(params, stats, model, layout="fastreid"))
    loaded = dmosnet_jax.load(path, image_size=SIZE)
    assert (loaded.model.name, loaded.model.attention, loaded.model.pool) == ("dmosnet_x0_25", (1, 0, 0), "gem")
    assert loaded.model.num_classes == 0
    assert (loaded.mean, loaded.std) == (augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    assert open_weights(path).options["neck"] == "bnneck"


def test_a_run_tells_its_network_size_and_pixels(tmp_path):
    model, params, stats = _drawn("osnet_ibn_x0_25", neck="fc", num_classes=3)
    state = train_state.create(params, stats, optax.sgd(0.1), seed=0, mesh=make_mesh(jax.devices()[:1]))
    store = checkpoints.Checkpoints(tmp_path / "run")
    described = {name: getattr(model, name) for name in (*MODEL_OPTIONS, "image_size")}
    meta = {"model": described, "config": {"pixel_mean": MEAN, "pixel_std": STD}, "loop": {}}
    store.save(state, meta)
    store.close()
    loaded = dmosnet_jax.load(tmp_path / "run")
    assert (loaded.model.name, loaded.model.neck, loaded.model.image_size) == ("osnet_ibn_x0_25", "fc", SIZE)
    assert (loaded.mean, loaded.std) == (MEAN, STD)
    jax.tree.map(np.testing.assert_array_equal, loaded._weights[1], stats)


def test_the_filter_is_that_of_the_weights(tmp_path, rng):
    """torchreid resizes bilinearly, fast-reid bicubically; a folder and the caller may say otherwise."""
    model, params, stats = _drawn("osnet_x0_25", neck="bnneck", num_classes=0)
    picture = rng.integers(0, 256, (90, 40, 3), dtype=np.uint8)
    found = {}
    for layout in ("torchreid", "fastreid"):
        torch_export.save(tmp_path / f"{layout}.pth", torch_export.to_state_dict(params, stats, model, layout=layout))
        found[layout] = dmosnet_jax.load(tmp_path / f"{layout}.pth", image_size=SIZE)
    told = {layout: extractor.interpolation for layout, extractor in found.items()}
    assert told == {"torchreid": "bilinear", "fastreid": "bicubic"}
    assert np.abs(found["fastreid"](picture) - found["torchreid"](picture)).max() > 1e-3
    chosen = dmosnet_jax.load(tmp_path / "torchreid.pth", image_size=SIZE, interpolation="bicubic")
    np.testing.assert_array_equal(chosen(picture), found["fastreid"](picture))
    convert(tmp_path / "torchreid.pth", tmp_path / "folder", image_size=SIZE)
    card = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert card["interpolation"] == dmosnet_jax.load(tmp_path / "folder").interpolation == "bilinear"
    with pytest.raises(ConfigError, match="interpolation='nearest' is not known: use one of bilinear, bicubic"):
        dmosnet_jax.load(tmp_path / "folder", interpolation="nearest")


def test_a_phones_photo_is_turned_upright(saved, tmp_path, rng):
    extractor = dmosnet_jax.load(saved[0])
    upright = Image.fromarray(rng.integers(0, 256, (90, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    with Image.open(tmp_path / "phone.png") as opened:
        features = extractor([tmp_path / "upright.png", tmp_path / "phone.png", opened, upright])
    for row in features[1:]:
        np.testing.assert_array_equal(row, features[0])


def test_wrong_options_and_weights(saved, tmp_path):
    path, *_ = saved
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        dmosnet_jax.load(path, batch_size=0)
    with pytest.raises(ConfigError, match=r"model\.dtype='int8' is not known"):
        dmosnet_jax.load(path, dtype="int8")
    with pytest.raises(DataError, match=r"does not fit model osnet_x0_5: .*conv1\.conv\.kernel has shape"):
        dmosnet_jax.load(path, name="osnet_x0_5")
    with pytest.raises(DataError, match="no checkpoint here"):
        dmosnet_jax.load(tmp_path)
    unknown = {"conv1.conv.weight": np.zeros((5, 3, 7, 7), np.float32)}
    torch_export.save(tmp_path / "x.pth", unknown)
    with pytest.raises(ConfigError, match=r"x\.pth: does not tell its network: give name=NAME"):
        dmosnet_jax.load(tmp_path / "x.pth")


def test_importing_the_package_imports_no_jax():
    command = "import sys, dmosnet_jax; sys.exit('jax' in sys.modules or not callable(dmosnet_jax.load))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        _ = dmosnet_jax.lood


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ("market1501", {"mAP": 82.76, "rank1": 91.85, "rank5": 98.05, "rank10": 98.95, "mINP": 67.40}),
        ("msmt17", {"mAP": 32.79, "rank1": 47.55}),
    ],
)
def test_real_weights_score_what_they_scored_in_pytorch(shared, weights, wanted):
    # The figures are from before torchreid's own filter was taken for its weights.
    extractor = dmosnet_jax.load(shared(f"weights/osnet_x0_25_{weights}.pth"), interpolation="bicubic")
    with zipfile.ZipFile(shared("data/Market-1501-qq.zip")) as archive:
        files = [name for name in archive.namelist() if "/query/" in name and name.endswith(".jpg")]
        features = extractor([Image.open(io.BytesIO(archive.read(name))) for name in files])
    assert len(files) == 2467
    names = [name.rsplit("/", 1)[1] for name in files]
    ids = np.array([int(name.split("_")[0]) for name in names], np.int32)
    cameras = np.array([int(name.split("_c")[1][0]) for name in names], np.int32)
    scores = ranking.evaluate(features, features, ids, ids, cameras, cameras)
    for field, value in wanted.items():
        assert 100 * scores[field] == pytest.approx(value, abs=0.2), field


def test_grey_encoded_and_jax_images_are_the_same_image(extractor, arrays, tmp_path):
    expected = extractor(arrays[0])
    out = io.BytesIO()
    Image.fromarray(arrays[0]).save(out, "png")
    jax_array = jax.numpy.asarray(arrays[0])
    for image in (out.getvalue(), bytearray(out.getvalue()), memoryview(out.getvalue()), jax_array, [jax_array]):
        np.testing.assert_array_equal(extractor(image), expected)
    grey = np.array(arrays[0][..., 0])
    np.testing.assert_array_equal(extractor(grey), extractor(np.stack([grey] * 3, axis=2)))
    np.testing.assert_allclose(extractor([grey, grey])[1:], extractor(Image.fromarray(grey)), rtol=1e-3, atol=1e-3)


def test_bgr_is_turned_and_rgb_files_are_not(extractor, arrays, tmp_path):
    expected = extractor(arrays[0])
    np.testing.assert_array_equal(extractor(arrays[0][..., ::-1], order="bgr"), expected)
    Image.fromarray(arrays[0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(extractor([tmp_path / "a.png"], order="bgr"), expected)
    with pytest.raises(ConfigError, match="order='brg' is not known: use one of rgb, bgr"):
        extractor(arrays[0], order="brg")


def test_people_in_boxes_of_a_frame(extractor, rng):
    frame = rng.integers(0, 256, size=(120, 100, 3), dtype=np.uint8)
    boxes = [(10, 20, 50, 110), (60.2, 5.7, 99.5, 88.1), (-20, -5, 30, 300)]
    expected = extractor([frame[20:110, 10:50], frame[5:89, 60:100], frame[:, :30]])
    np.testing.assert_array_equal(extractor(frame, boxes=boxes), expected)
    np.testing.assert_array_equal(extractor([frame[..., ::-1]], boxes=np.array(boxes), order="bgr"), expected)
    np.testing.assert_allclose(extractor(frame, boxes=boxes[0]), expected[:1], rtol=1e-3, atol=1e-3)
    assert extractor(frame, boxes=[]).shape == (0, extractor.feature_dim)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([(50, 20, 10, 110)], r"boxes\[0\]: \[50\.0, 20\.0, 10\.0, 110\.0\] .* is no part of an image of 40 x 90"),
        ([(0, 0, 10, 10), (200, 0, 210, 10)], r"boxes\[1\]: "),
        ([(0, 0, float("nan"), 10)], "are not finite numbers"),
        ([(0, 0, 10)], r"boxes \[1, 3\]: give numbers \[N, 4\]: left, top, right, bottom"),
        ("all", "boxes of type str: give numbers"),
    ],
)
def test_boxes_that_are_none(extractor, arrays, boxes, message):
    with pytest.raises(DataError, match=message):
        extractor(arrays[0], boxes=boxes)
    with pytest.raises(ConfigError, match="boxes are of one image, and 3 are given"):
        extractor(arrays, boxes=boxes)


def test_an_extractor_pickles_for_spawned_workers(extractor, arrays):
    again = pickle.loads(pickle.dumps(extractor))
    np.testing.assert_array_equal(again(arrays), extractor(arrays))
    assert (again.model, again.feature_dim, again.mean) == (extractor.model, extractor.feature_dim, extractor.mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nothing": 1}, "nothing: no such option: use some of name"),
        ({"image_size": 64}, r"image_size=64 must be \(height, width\)"),
        ({"image_size": (64, 32, 3)}, "image_size="),
        ({"image_size": (64.5, 32)}, "image_size="),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
        ({"batch_size": None}, "batch_size=None must be a whole number"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"dtype": 8}, "dtype"),
        ({"attention": 7}, "option is of another type|attention"),
        ({"interpolation": "nearest"}, "interpolation='nearest' is not known"),
    ],
)
def test_wrong_arguments_are_config_errors(saved, options, message):
    with pytest.raises(ConfigError, match=message):
        dmosnet_jax.load(saved[0], **options)


@pytest.mark.parametrize("path", [None, 3, b"weights.pth"])
def test_a_path_that_is_none(path):
    with pytest.raises(ConfigError, match="give the path of weights"):
        dmosnet_jax.load(path)


def test_odd_paths_of_images_are_one_line(extractor, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in ("a\0b.jpg", tmp_path / "pipe.jpg", tmp_path, "\udcff.jpg", "x" * 5000):
        with pytest.raises(DataError, match=r"images\[0\]: .*can't be read") as error:
            extractor(path)
        assert str(error.value).isprintable()


def test_weights_in_the_home_folder(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved[0].parent))
    assert dmosnet_jax.load("~/model").feature_dim == saved[1].feature_dim
