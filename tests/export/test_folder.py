"""Exported folders: what is written is read back, and every kind of damage is one line."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest

from dmosnet_jax import models
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.export import folder, torch_export, torch_import
from dmosnet_jax.export.weights import open_weights
from tests.models.drawn import draw_tree

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model = models.build("dmosnet_ibn_x0_25", attention=(0, 1, 0), pool="gem", image_size=(128, 64), num_classes=3)
    rng = np.random.default_rng(0)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    card = folder.Card(model, mean=MEAN, std=STD, source="drawn", licence="CC0", threshold=0.5)
    folder.save(path, params, stats, card)
    return path, params, stats, card


@pytest.fixture
def exported(saved, tmp_path):
    """A copy to damage."""
    path, *rest = saved
    return shutil.copytree(path, tmp_path / "model"), *rest


def test_round_trip_is_bit_identical(exported):
    path, params, stats, card = exported
    assert folder.is_folder(path)
    got_params, got_stats, got_card = folder.load(path)
    assert got_card == card
    assert jax.tree.structure((got_params, got_stats)) == jax.tree.structure((params, stats))
    jax.tree.map(np.testing.assert_array_equal, (got_params, got_stats), (params, stats))
    assert {type(leaf) for leaf in jax.tree.leaves((got_params, got_stats))} == {np.ndarray}
    assert sorted(p.name for p in path.parent.iterdir()) == ["model"]


def test_card_says_what_a_user_needs(exported):
    path, *_ = exported
    values = json.loads((path / "config.json").read_text())
    assert values.pop("sha256") == hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    assert values == {
        "format": 1,
        "name": "dmosnet_ibn_x0_25",
        "attention": [0, 1, 0],
        "neck": "bnneck",
        "pool": "gem",
        "classifier": "linear",
        "variant": "",
        "num_classes": 3,
        "image_size": [128, 64],
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "feature_dim": 128,
        "source": "drawn",
        "licence": "CC0",
        "threshold": 0.5,
        "false_accept_rate": None,
        "evaluations": [],
    }


def test_the_weights_are_a_pytorch_file_too(exported):
    path, params, stats, card = exported
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    found = torch_import.convert(torch_import.load(path / "model.safetensors"), card.model)
    jax.tree.map(np.testing.assert_array_equal, found, (params, stats))


def test_arrays_of_another_model_are_refused_with_all_differences(tmp_path, rng):
    model = models.build("osnet_x0_25")
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    del params["bottleneck"]
    params["conv5"]["conv"]["kernel"] = np.zeros((1, 1, 128, 7), np.float32)
    stats["extra"] = {"mean": np.zeros(3, np.float32)}
    with pytest.raises(DataError) as caught:
        folder.save(tmp_path / "model", params, stats, folder.Card(model, mean=MEAN, std=STD))
    for part in ("missing bottleneck.scale", "missing bottleneck.bias", "conv5.conv.kernel has shape", "extra.mean"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(exported):
    path, params, stats, card = exported
    before = (path / "config.json").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        folder.save(path, params, stats, dataclasses.replace(card, source="other"))
    assert (path / "config.json").read_bytes() == before


def test_an_unwritable_place(tmp_path, exported):
    _, params, stats, card = exported
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        folder.save(tmp_path / "file" / "model", params, stats, card)


def test_flipped_bits_and_missing_files_are_found(exported):
    path, *_ = exported
    file = path / "model.safetensors"
    sound = file.read_bytes()
    flipped = []
    for position in (0, 20, len(sound) // 2, len(sound) - 1):
        flipped.append(bytearray(sound))
        flipped[-1][position] ^= 0x10
    for data in (*map(bytes, flipped), sound[:-1], b"", None):
        file.unlink() if data is None else file.write_bytes(data)
        with pytest.raises(DataError, match="is damaged") as caught:
            folder.load(path)
        assert "\n" not in str(caught.value)
    file.write_bytes(sound)
    folder.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "osnet_x9"}, "model.name='osnet_x9' is not known"),
        ({"name": 3}, "model.name=3 is not known"),
        ({"image_size": [100, 64]}, "the height must be a multiple"),
        ({"image_size": 5}, "config.json"),
        ({"mean": [1, 2]}, "mean=.1, 2. must be three numbers"),
        ({"mean": "grey"}, "mean='grey' must be three numbers"),
        ({"std": [0.1, 0, 0.1]}, "std=.* must be three numbers"),
        ({"interpolation": "nearest"}, "interpolation='nearest' must be one of bilinear, bicubic"),
        ({"feature_dim": 512}, "feature_dim=512 is 128"),
        ({"threshold": "high"}, "threshold='high' must be a number from -1 to 1, or null"),
        ({"threshold": 3}, "threshold=3 must be a number"),
        ({"threshold": True}, "threshold=True must be a number"),
        ({"false_accept_rate": -0.1}, "false_accept_rate=-0.1 must be a number from 0 to 1"),
        ({"evaluations": 3}, "holds no results"),
        ({"evaluations": [{}]}, "mAP, .* missing or of another kind"),
        ({"num_classes": "many"}, "config.json"),
        ({"num_classes": 4}, "misshapen: classifier.weight"),
        ({"name": "osnet_x0_25", "attention": [0, 0, 0]}, "unexpected"),
        ({"format": 2}, "is not of format 1"),
        ({"format": None}, "is not of format 1"),
        ({"colour": "red"}, "missing or unknown fields: colour"),
        ({"sha256": "0"}, "is damaged .the checksum of model.safetensors differs"),
    ],
)
def test_cards_that_do_not_fit(exported, change, message):
    path, *_ = exported
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=message) as caught:
        folder.load(path)
    assert "\n" not in str(caught.value)


def test_folders_from_before_the_threshold_have_none(exported):
    path, *_ = exported
    # They do not hold the checksum of the card either.
    torch_export.save(path / "model.safetensors", torch_import.load(path / "model.safetensors"))
    values = json.loads((path / "config.json").read_text())
    values["sha256"] = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    for name in ("threshold", "false_accept_rate", "evaluations"):
        del values[name]
    (path / "config.json").write_text(json.dumps(values))
    *_, card = folder.load(path)
    assert (card.threshold, card.false_accept_rate, card.evaluations) == (None, None, ())


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff", '"name"'])
def test_damaged_cards(exported, text):
    path, *_ = exported
    (path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"config\.json: is (damaged|not of format 1)"):
        folder.load(path)


def test_no_folder(tmp_path):
    assert not folder.is_folder(tmp_path)
    with pytest.raises(DataError, match=r"config\.json: can't be read"):
        folder.load(tmp_path)


def test_a_card_that_was_changed_is_found_whatever_was_changed(exported):
    path, *_ = exported
    values = json.loads((path / "config.json").read_text())
    for change in ({"mean": [0.5, 0.4, 0.2]}, {"interpolation": "bilinear"}, {"licence": "none"}, {"source": ""}):
        (path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(DataError, match=r"config\.json: is damaged, or was changed"):
            folder.load(path)
    # Written in another way, it is the same.
    (path / "config.json").write_text(json.dumps(values))
    folder.load(path)


def test_a_folder_that_lost_its_weights_is_told_so(exported):
    path, *_ = exported
    (path / "model.safetensors").unlink()
    assert folder.is_folder(path)
    with pytest.raises(DataError, match=r"is damaged \(model\.safetensors: No such file"):
        open_weights(path)


def test_an_earlier_export_is_replaced_where_that_is_said(exported):
    path, params, stats, card = exported
    folder.save(path, params, stats, dataclasses.replace(card, source="other"), overwrite=True)
    assert folder.load(path)[2].source == "other"
    assert [p.name for p in path.parent.iterdir()] == ["model"]
    (path / "config.json").unlink()
    (path / "model.safetensors").unlink()
    (path / "README.md").unlink()
    (path / "mine.txt").write_text("")
    with pytest.raises(DataError, match="something else than an earlier result"):
        folder.save(path, params, stats, card, overwrite=True)
    assert [p.name for p in path.iterdir()] == ["mine.txt"]
