import dataclasses
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.builders.market1501 import Market1501
from data_prep.synthetic import pedestrians
from data_prep.synthetic.figure import Figure, Pose
from data_prep.synthetic.pedestrians import Scene, Studio, plan
from data_prep.synthetic.wardrobe import draw_person
from dmosnet_jax.core.errors import ConfigError, DataError

SMALL = Scene(train_ids=3, test_ids=4, cameras=3, images=2, distractors=5, junk=2)


def test_plan_is_a_fair_data_set():
    scene = Scene()
    shots = plan(scene)
    assert len({shot.path for shot in shots}) == len(shots)
    listing = Market1501.scan([shot.path for shot in shots])
    train, query, gallery = (listing.splits[name] for name in ("train", "query", "gallery"))
    assert {item.pid for item in train} == set(range(1, 97))
    assert {item.pid for item in query} == set(range(97, 145)) == {item.pid for item in gallery} - {0}
    assert (sum(item.pid == 0 for item in gallery), listing.junk) == (32, 8)
    # One query for each camera that saw a person, the other images of it in the gallery, and a match elsewhere.
    assert len({item[1:] for item in query}) == len(query)
    for item in query:
        cameras = [other.camid for other in gallery if other.pid == item.pid]
        assert cameras.count(item.camid) == scene.images - 1
        assert len(set(cameras)) >= 2
    seen = len({item[1:] for item in train + query})
    assert 0.75 < seen / (144 * scene.cameras) < 0.95


def test_same_seed_same_pixels_in_any_order():
    shots = plan(SMALL)
    first, second = Studio(SMALL), Studio(SMALL)
    backwards = {shot: np.asarray(second.photograph(shot)) for shot in reversed(shots)}
    for shot in shots:
        np.testing.assert_array_equal(np.asarray(first.photograph(shot)), backwards[shot])
    other = Studio(Scene(**{**vars(SMALL), "seed": 1}))
    assert (np.asarray(other.photograph(shots[0])) != backwards[shots[0]]).mean() > 0.5


def test_identity_and_camera_do_not_depend_on_how_many_there_are():
    shot = plan(SMALL)[0]
    more = Scene(**{**vars(SMALL), "test_ids": 9, "images": 4, "junk": 0})
    np.testing.assert_array_equal(np.asarray(Studio(SMALL).photograph(shot)), np.asarray(Studio(more).photograph(shot)))


@pytest.mark.parametrize("size", [(16, 16), (17, 90), (96, 31), (256, 128)])
def test_any_size_can_be_drawn(size):
    scene = Scene(**{**vars(SMALL), "image_size": size})
    studio = Studio(scene)
    for shot in plan(scene)[::3]:
        image = studio.photograph(shot)
        assert (image.height, image.width) == size
        assert image.mode == "RGB"


def figure_from(heading, **looks):
    """A person drawn before plain grey, and where."""
    person = dataclasses.replace(draw_person(np.random.RandomState(3)), bag="none", hairstyle="short", **looks)
    pose = Pose(heading=heading, pitch=0.1, stride=0.0, phase=0.0, elbow=0.1, telephone=False)
    canvas = Image.new("RGB", (128, 256), (120, 120, 120))
    Figure(canvas, person, pose, (64, 246), 230, 0.0).draw()
    return np.asarray(canvas).astype(int)


@pytest.mark.parametrize(
    ("pattern", "shown"), [("logo", 0.0), ("open", 0.0), ("back", np.pi), ("hoops", None), ("plain", None)]
)
def test_what_is_worn_turns_with_the_body(pattern, shown):
    white, red = (250, 250, 250), (250, 0, 0)
    print_seen = {}
    for heading in (0.0, np.pi / 2, np.pi):
        image = figure_from(
            heading, pattern=pattern, upper="vest", upper_colour=white, second_colour=red, side_stripe=False
        )
        chest = image[60:140]
        print_seen[heading] = ((chest[..., 0] > 120) & (chest[..., 1] < 20)).sum()
    if pattern == "plain":
        assert not any(print_seen.values())
    elif pattern == "hoops":
        assert min(print_seen.values()) > 200
    else:
        assert print_seen[shown] > 200
        assert print_seen[np.pi - shown] == 0
        assert 0 < print_seen[np.pi / 2] < 0.7 * print_seen[shown]


def test_the_drawing_stays_on_the_person():
    image = figure_from(0.3)
    drawn = (image != 120).any(-1)
    assert 0.15 < drawn.mean() < 0.5
    assert not drawn[:15].any()
    assert not drawn[:, :10].any()
    assert drawn[225:].any()


def test_colours_alone_do_not_solve_it_but_appearance_does():
    """Cross-camera retrieval by colour histogram is better than chance and far from solved; layout helps much."""
    for seed in (0, 1):
        scene = Scene(seed=seed, train_ids=1)
        studio = Studio(scene)
        shots = [shot for shot in plan(scene) if shot.pid == 0 or shot.pid > scene.train_ids]
        images = [np.asarray(studio.photograph(shot)) for shot in shots]
        chance = mean_precision(shots, [random_feature(image) for image in images])
        colours = mean_precision(shots, [histogram(image) for image in images])
        layout = mean_precision(shots, [stripes(image) for image in images])
        assert chance < 0.04
        assert 1.5 * chance < colours < 0.35
        assert layout > colours + 0.2
        assert layout < 0.75


def random_feature(image):
    return np.random.default_rng(zlib.crc32(image.tobytes())).standard_normal(32)


def histogram(image, bins=8):
    index = (image.astype(int) * bins // 256) @ [bins * bins, bins, 1]
    counts = np.sqrt(np.bincount(index.ravel(), minlength=bins**3))
    return counts / np.linalg.norm(counts)


def stripes(image):
    """Histograms of six stripes, each channel normalised: knows where colours are, and not the camera's cast."""
    middle = image[:, 16:48]
    even = (middle - middle.mean((0, 1))) / (middle.std((0, 1)) + 1)
    levels = np.clip((even + 2) * 64, 0, 255)
    return np.concatenate([histogram(part) for part in np.array_split(levels, 6)])


def mean_precision(shots, features):
    """mAP over the queries; images of the query's identity in its camera do not count."""
    features = np.stack(features)
    pids, cams = np.array([s.pid for s in shots]), np.array([s.camid for s in shots])
    queries = np.array([s.path.startswith("query") for s in shots])
    scores = []
    for row in np.flatnonzero(queries):
        rest = ~queries & ~((pids == pids[row]) & (cams == cams[row]))
        order = np.argsort(-(features[rest] @ features[row]), kind="stable")
        hits = np.flatnonzero(pids[rest][order] == pids[row])
        scores.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
    return float(np.mean(scores))


def test_render_writes_the_layout_at_once(tmp_path):
    count = pedestrians.render(tmp_path / "raw", SMALL)
    files = sorted(p.relative_to(tmp_path / "raw").as_posix() for p in (tmp_path / "raw").rglob("*.jpg"))
    assert files == sorted(shot.path for shot in plan(SMALL))
    assert count == len(files)
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]
    shot = plan(SMALL)[4]
    with Image.open(tmp_path / "raw" / shot.path) as image:
        decoded = np.asarray(image, np.float64)
    assert np.abs(decoded - np.asarray(Studio(SMALL).photograph(shot))).mean() < 8  # JPEG only
    with pytest.raises(DataError, match="exists already"):
        pedestrians.render(tmp_path / "raw", SMALL)


def test_interrupted_render_leaves_nothing(tmp_path, monkeypatch):
    photograph = Studio.photograph

    def interrupted(self, shot):
        if shot.pid == 3:
            raise KeyboardInterrupt
        return photograph(self, shot)

    monkeypatch.setattr(Studio, "photograph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pedestrians.render(tmp_path / "raw", SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [{"cameras": 1}, {"images": 1}, {"train_ids": 0}, {"junk": -1}, {"image_size": (8, 64)}, {"seed": -1}]
)
def test_impossible_scenes_are_refused(option):
    name = next(iter(option))
    with pytest.raises(ConfigError, match=name):
        Scene(**option)


def test_jpeg_bytes_repeat():
    """Rendering twice gives the same files, so a conversion can be repeated."""
    shot = plan(SMALL)[0]
    files = []
    for _ in range(2):
        buffer = io.BytesIO()
        studio = Studio(SMALL)
        studio.photograph(shot).save(buffer, "JPEG", quality=studio.quality(shot))
        files.append(buffer.getvalue())
    assert files[0] == files[1]
