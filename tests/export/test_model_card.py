"""The exported folder as others open it: a model card for the hub, thresholds, Roboflow's names, a program for JAX."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import yaml
from PIL import Image

import dmosnet_jax
from dmosnet_jax import models
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import augment
from dmosnet_jax.export import folder, model_card, roboflow, torch_import
from dmosnet_jax.export.weights import fingerprint
from dmosnet_jax.recipes.export import convert
from tests.models.drawn import draw_tree

SIZE = (64, 32)
INPUTS = {"mean": augment.IMAGENET_MEAN, "std": augment.IMAGENET_STD}
RESULTS = {
    "mAP": 0.7739,
    "rank1": 0.9148,
    "rank5": 0.9691,
    "rank10": 0.9804,
    "mINP": 0.4373,
    "num_query": 3368,
    "num_valid_query": 3368,
    "num_gallery": 15913,
    "interpolation": "bilinear",
    "cmc": [0.9, 1.0],
    "thresholds": {
        "eer": 0.026,
        "eer_threshold": 0.5365,
        "tar_at_far": [
            {"far": 1e-2, "tar": 0.945, "threshold": 0.58},
            {"far": 1e-3, "tar": 0.788, "threshold": 0.685},
        ],
    },
    "checkpoint": "/home/someone/weights.pth",
    "model": "osnet_x0_25",
    "dataset": "market1501",
}


def drawn(name="osnet_x0_25", **options):
    model = models.build(name, image_size=SIZE, **{"neck": "fc"} | options)
    rng = np.random.default_rng(3)
    return model, *(draw_tree(tree, rng) for tree in model.shapes())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with everything, exported from a plain one and results, and those results."""
    path = tmp_path_factory.mktemp("exported")
    model, params, stats = drawn(num_classes=3)
    folder.save(path / "plain", params, stats, folder.Card(model, **INPUTS, interpolation="bilinear"))
    (path / "results.json").write_text(json.dumps(RESULTS))
    options = {"results": path / "results.json", "stablehlo": True, "licence": "MIT", "origin": "drawn | at random"}
    convert(path / "plain", path / "full", **options)
    return path / "full"


def header(path):
    text = (path / "README.md").read_text()
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    return yaml.safe_load(front), body


def test_the_hub_reads_the_card(exported):
    values, body = header(exported)
    assert (values["license"], values["library_name"]) == ("mit", "dmosnet_jax")
    assert values["pipeline_tag"] == "image-feature-extraction"
    assert values["datasets"] == ["market1501"]
    (entry,) = values["model-index"]
    assert entry["name"] == "osnet_x0_25"
    (result,) = entry["results"]
    assert result["dataset"] == {"type": "market1501", "name": "market1501"}
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {"mAP": 77.39, "rank-1": 91.48, "rank-5": 96.91, "rank-10": 98.04, "mINP": 43.73}
    assert all("single query, cosine distance" in metric["name"] for metric in result["metrics"])
    assert "| market1501 | 77.39 | 91.48 | 96.91 | 98.04 | 43.73 | 3368 | 15913 | bilinear |" in body
    assert "| market1501 | 2.60 % | 0.1 % | 78.80 % | 0.6850 |" in body
    assert "from a cosine of 0.6850 on two photos are taken for one person, which accepts 0.1 %" in body
    assert r"drawn \| at random" in body
    assert "six months" in body
    # The user's own paths are nobody's business.
    assert not any("/home" in (exported / name).read_text() for name in ("README.md", "config.json"))


@pytest.mark.parametrize(
    ("licence", "wanted"),
    [
        ("", {"license": "unknown"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("ours: \"no\" | 'use'", {"license": "other", "license_name": "ours: \"no\" \\| 'use'"}),
    ],
)
def test_licences(tmp_path, licence, wanted):
    model, params, stats = drawn()
    folder.save(tmp_path / "x", params, stats, folder.Card(model, **INPUTS, licence=licence))
    values, body = header(tmp_path / "x")
    assert {key: values.get(key) for key in wanted} == wanted
    assert "model-index" not in values
    assert "none given" in body


def test_python_in_the_card_runs(exported, rng, tmp_path, monkeypatch):
    _, body = header(exported)
    blocks = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(exported)
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (80, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    code = "\n".join(blocks).replace("this folder", str(exported))
    code = code.replace('"a.jpg"', repr(str(tmp_path / "a.jpg"))).replace('"b.jpg"', repr(str(tmp_path / "b.jpg")))
    names = {"images": rng.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)}
    exec(code, names)
    assert names["features"].shape == (2, 512)
    assert isinstance(names["pair"].same, bool)


def test_the_threshold_decides(exported, rng):
    extractor = dmosnet_jax.load(exported)
    assert extractor.threshold == 0.685
    first, second = rng.integers(0, 256, (2, 80, 40, 3), dtype=np.uint8)
    itself = extractor.compare(first, first)
    assert itself.similarity == pytest.approx(1, abs=1e-5)
    assert itself.same is True
    features = extractor([first, second], normalised=True)
    pair = extractor.compare(first, second)
    assert pair.similarity == pytest.approx(features[0] @ features[1], abs=1e-5)
    extractor.threshold = pair.similarity + 0.01
    assert extractor.compare(first, second).same is False
    extractor.threshold = None
    assert extractor.compare(first, second).same is None
    with pytest.raises(DataError, match=r"images\[1\]"):
        extractor.compare(first, "nowhere.jpg")


def test_a_threshold_of_ones_own_and_other_rates(exported, tmp_path):
    convert(exported, tmp_path / "own", threshold=0.7)
    card = json.loads((tmp_path / "own" / "config.json").read_text())
    # What the folder says of itself is kept.
    assert (card["threshold"], card["false_accept_rate"]) == (0.7, None)
    assert [found["mAP"] for found in card["evaluations"]] == [0.7739]
    assert (card["licence"], card["source"]) == ("MIT", "drawn | at random")
    (tmp_path / "results.json").write_text(
        json.dumps({"datasets": {"a": RESULTS, "b": RESULTS}, "model": "osnet_x0_25"})
    )
    convert(exported, tmp_path / "two", results=tmp_path / "results.json", false_accept_rate=1e-2)
    _, _, found = folder.load(tmp_path / "two")
    assert (found.threshold, found.false_accept_rate, len(found.evaluations)) == (0.58, 0.01, 2)
    with pytest.raises(ConfigError, match=r"false_accept_rate=0\.5: .* has thresholds at 0\.01, 0\.001: give one"):
        convert(exported, tmp_path / "none", results=tmp_path / "results.json", false_accept_rate=0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged, or of another kind"),
        ("3", "is damaged, or of another kind"),
        (json.dumps(RESULTS | {"mAP": "high"}), "mAP: missing or of another kind"),
        (json.dumps(RESULTS | {"mAP": float("nan")}), "mAP: missing or of another kind"),
        (json.dumps(RESULTS | {"thresholds": 3}), "thresholds: missing or of another kind"),
        (json.dumps(RESULTS | {"thresholds": {"eer": 0, "tar_at_far": [3]}}), "tar_at_far: missing"),
        (json.dumps(RESULTS | {"model": "osnet_x1_0"}), "was made with model osnet_x1_0, not osnet_x0_25"),
    ],
)
def test_results_that_do_not_fit(exported, tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        convert(exported, tmp_path / "x", results=tmp_path / "results.json")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(DataError, match=r"nowhere\.json: can't be read"):
        convert(exported, tmp_path / "x", results=tmp_path / "nowhere.json")


def test_a_program_for_jax_alone(exported, rng):
    images = rng.integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    wanted = dmosnet_jax.load(exported)(images)
    command = (
        "import sys, jax, jax.export, numpy\n"
        "program = jax.export.deserialize(bytearray(open(sys.argv[1], 'rb').read()))\n"
        "images = numpy.load(sys.argv[2])\n"
        "numpy.save(sys.argv[3], program.call(images))\n"
        "print(program.platforms, 'dmosnet_jax' in sys.modules)\n"
    )
    given, answer = exported.parent / "images.npy", exported.parent / "features.npy"
    np.save(given, images)
    run = [sys.executable, "-c", command, exported / "model.stablehlo", given, answer]
    finished = subprocess.run(run, capture_output=True, text=True, check=True)
    assert finished.stdout == "('cpu', 'cuda', 'tpu') False\n"
    np.testing.assert_allclose(np.load(answer), wanted, atol=1e-4 * np.abs(wanted).max())


def test_no_program_calls_into_this_process(exported):
    text = (exported / "model.stablehlo").read_bytes()
    # Nor does one name files of this machine.
    assert b"dmosnet" not in text
    assert b".py" not in text
    assert b"numba" not in text


def test_roboflow_finds_its_files(exported, tmp_path):
    values = json.loads((exported / "reid_config.json").read_text())
    assert values["architecture"] == "osnet_x0_25"
    preprocessing = values["preprocessing"]
    assert (preprocessing["input_size"], preprocessing["interpolation"]) == ([64, 32], "bilinear")
    own, theirs = (torch_import.load(exported / name) for name in ("model.safetensors", "weights.safetensors"))
    assert own.keys() == theirs.keys()
    # Its network has these counters, and a file must have all that it has.
    assert "conv1.bn.num_batches_tracked" in theirs
    assert (exported / "model.safetensors").stat().st_mode & 0o044 == 0o044 & ~_umask()
    for name, options in (
        ("osnet_ibn_x0_25", {}),
        ("osnet_x0_25", {"neck": "bnneck"}),
        ("osnet_x0_25", {"pool": "gem"}),
    ):
        other = drawn(name, **options)
        assert not roboflow.has(other[0])
        folder.save(tmp_path / name / str(options), *other[1:], folder.Card(other[0], **INPUTS))
        assert not (tmp_path / name / str(options) / "reid_config.json").exists()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_fingerprints_tell_networks_apart():
    model, params, stats = drawn(num_classes=3)
    inputs = {**INPUTS, "interpolation": "bilinear"}
    first = fingerprint(model, params, stats, **inputs)
    without = drawn()[0], {key: value for key, value in params.items() if key != "classifier"}, stats
    assert fingerprint(*without, **inputs) == first
    changed = jax.tree.map(np.copy, stats)
    changed["conv1"]["bn"]["mean"][0] += 1e-3
    others = [
        fingerprint(model, params, changed, **inputs),
        fingerprint(model, params, stats, **inputs | {"interpolation": "bicubic"}),
        fingerprint(model, params, stats, **inputs | {"mean": (0.5, 0.5, 0.5)}),
        fingerprint(models.build("osnet_x0_25", neck="fc", image_size=(64, 64)), params, stats, **inputs),
    ]
    assert len({first, *others}) == 5


def test_results_without_thresholds_make_a_card(exported, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"thresholds": None}))
    convert(exported, tmp_path / "x", results=tmp_path / "results.json")
    _, _, card = folder.load(tmp_path / "x")
    assert (card.threshold, card.false_accept_rate) == (None, None)
    assert "equal error rate" not in (tmp_path / "x" / "README.md").read_text()
    assert model_card.threshold_at((), 1e-3, "x") is None
