"""The pass over all features: it goes on where it was interrupted, and never mixes what does not belong together."""

import pathlib

import numpy as np
import pytest

from dmosnet_jax.recipes import feature_pass


class Split:
    """Images that are their own number."""

    name, split = "numbers", "train"

    def __init__(self, count):
        self.pids = np.arange(count)
        self.camids = np.zeros(count, np.int32)

    def __len__(self):
        return len(self.pids)

    def filenames(self, indices=None):
        return [f"{i}.jpg" for i in (range(len(self.pids)) if indices is None else indices)]


class Extractor:
    """Features that tell which image and weights they are of; breaks down after some parts."""

    def __init__(self, breaks_after=99):
        self.parts, self.left = [], breaks_after

    def batches(self, params, stats, split, *, label, cache=None):
        features = self(params, stats, split, label=label, cache=cache)
        yield features[:20]
        yield features[20:]

    def __call__(self, params, stats, split, *, label, cache=None):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.parts.append(np.asarray(split.pids))
        return np.stack([params["w"] + split.pids, np.ones(len(split.pids))], axis=1).astype(np.float32)


def extract(*args, **options):
    pieces = list(feature_pass.extract(*args, **options))
    assert [start for start, _ in pieces] == np.cumsum([0] + [len(piece) for _, piece in pieces])[:-1].tolist()
    return np.concatenate([piece for _, piece in pieces])


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def files(workdir):
    folder = pathlib.Path(workdir) / feature_pass.FOLDER
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_an_interrupted_pass_goes_on(tmp_path, capsys):
    split, params = Split(50), {"w": np.float32(2)}
    expected = unit(np.stack([2 + np.arange(50), np.ones(50)], axis=1).astype(np.float32))
    broken = Extractor(breaks_after=3)
    with pytest.raises(KeyboardInterrupt):
        extract(broken, params, {}, split, tmp_path, part=12)
    assert len(files(tmp_path)) == 3
    # One part was damaged since.
    path = tmp_path / feature_pass.FOLDER / files(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-5])
    second = Extractor()
    found = extract(second, params, {}, split, tmp_path, part=12)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    assert [part[0] for part in second.parts] == [12, 36, 48]
    assert "24 of 50 features were there" in capsys.readouterr().out
    assert len(files(tmp_path)) == 5
    feature_pass.clear(tmp_path)
    assert files(tmp_path) == []
    feature_pass.clear(tmp_path)


def test_parts_of_other_weights_or_images_are_not_used(tmp_path):
    extract(Extractor(), {"w": np.float32(2)}, {}, Split(50), tmp_path, part=12)
    for params, split in (({"w": np.float32(3)}, Split(50)), ({"w": np.float32(3)}, Split(49))):
        extractor = Extractor()
        found = extract(extractor, params, {}, split, tmp_path, part=12)
        assert len(extractor.parts) == 5
        assert len(files(tmp_path)) == 5
        np.testing.assert_allclose(found[:, 0] / found[:, 1], 3 + np.arange(len(split)), rtol=1e-5)


def test_parts_of_other_settings_are_not_used_and_files_of_others_stay(tmp_path):
    mine = tmp_path / feature_pass.FOLDER / "notes.npy"
    mine.parent.mkdir()
    mine.touch()
    for about, parts in (("256x128", 5), ("256x128", 0), ("128x64", 5)):
        extractor = Extractor()
        extract(extractor, {"w": np.float32(2)}, {}, Split(50), tmp_path, part=12, about=about)
        assert len(extractor.parts) == parts
    assert len(files(tmp_path)) == 6
    feature_pass.clear(tmp_path)
    assert files(tmp_path) == ["notes.npy"]


def test_small_sets_are_extracted_at_once(tmp_path):
    extractor = Extractor()
    found = extract(extractor, {"w": np.float32(2)}, {}, Split(50), tmp_path, part=50)
    np.testing.assert_array_equal(found, unit(Extractor()({"w": np.float32(2)}, {}, Split(50), label="")))
    assert len(extractor.parts) == 1
    assert files(tmp_path) == []
