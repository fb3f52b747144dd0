"""Galleries: what is found is what a full product finds, what is added is kept, and damage is told in one line."""

import json
import os
import shutil

import numpy as np
import pytest

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.evaluation import search
from dmosnet_jax.evaluation.gallery import Gallery

WIDTH = 24


def by_full_product(queries, gallery, k):
    product = queries.astype(np.float32) @ np.concatenate([part.astype(np.float32) for part in gallery]).T
    order = np.argsort(-product, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(product, order, axis=1)


@pytest.fixture
def gallery(tmp_path, rng):
    made = Gallery.create(tmp_path / "gallery", fingerprint="abc", feature_dim=WIDTH, checkpoint="weights.pth")
    made.append(3 * rng.standard_normal((50, WIDTH)).astype(np.float32), [f"a/{n}.jpg" for n in range(50)])
    more = rng.standard_normal((7, WIDTH)).astype(np.float32)
    made.append(more, [f"ü{n}.jpg" for n in range(7)], cameras=range(7), root="/photos")
    return made


@pytest.mark.parametrize("backend", ["host", "device"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("queries", "block", "k"), [(1, 16, 5), (19, 7, 57), (3, 1000, 100), (25, 1, 1)])
def test_equals_a_full_product(rng, backend, dtype, queries, block, k):
    parts = [unit_rows_np(rng.standard_normal((n, WIDTH)).astype(np.float32)).astype(dtype) for n in (50, 1, 6)]
    asked = unit_rows_np(rng.standard_normal((queries, WIDTH)).astype(np.float32))
    found = search.search(asked, parts, k, backend=backend, block=block, threads=3)
    indices, scores = by_full_product(asked, parts, k)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)
    assert (found.indices.dtype, found.scores.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("queries", [1, 20])
def test_other_arrays_are_searched_too(rng, queries):
    part = np.asfortranarray(unit_rows_np(rng.standard_normal((30, WIDTH))))
    asked = unit_rows_np(rng.standard_normal((queries, WIDTH)))
    for stored in (part, np.asfortranarray(part.astype(np.float16)), part[::2]):
        found = search.search(asked, [stored], 4)
        np.testing.assert_array_equal(found.indices, by_full_product(asked, [stored], 4)[0])


def test_every_half_is_widened():
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)][None, :]
    np.testing.assert_array_equal(search._widened(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("backend", ["host", "device"])
def test_equal_ones_are_in_the_order_of_the_gallery(backend):
    part = np.ones((40, WIDTH), np.float16)
    found = search.search(np.ones((2, WIDTH), np.float32), [part, part], 30, backend=backend, block=9)
    np.testing.assert_array_equal(found.indices, np.stack([np.arange(30)] * 2))


def test_many_queries_go_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(search, "QUERIES", 4)
    asked, part = (unit_rows_np(rng.standard_normal((n, WIDTH)).astype(np.float32)) for n in (11, 30))
    found = search.search(asked, [part], 3)
    np.testing.assert_array_equal(found.indices, by_full_product(asked, [part], 3)[0])


def test_what_is_added_is_there_when_it_is_opened(gallery):
    found = Gallery.open(gallery.path)
    assert (len(found), found.fingerprint, found.feature_dim, found.dtype) == (57, "abc", WIDTH, "float16")
    assert found.checkpoint == "weights.pth"
    assert found.files == [*(f"a/{n}.jpg" for n in range(50)), *(f"ü{n}.jpg" for n in range(7))] == gallery.files
    np.testing.assert_array_equal(found.cameras, [-1] * 50 + list(range(7)))
    assert found.roots == [""] * 50 + ["/photos"] * 7
    for part, own in zip(found.features, gallery.features, strict=True):
        np.testing.assert_array_equal(part, own)
        np.testing.assert_allclose(np.linalg.norm(part.astype(np.float32), axis=1), 1, atol=1e-3)
        assert isinstance(part, np.memmap)
    # Length does not matter.
    itself = found.search(100 * found.features[1][:1].astype(np.float32), 3)
    assert (itself.indices[0, 0], itself.scores[0, 0]) == (50, pytest.approx(1, abs=1e-3))


def test_an_empty_one(tmp_path):
    made = Gallery.create(tmp_path / "empty", fingerprint="", feature_dim=WIDTH)
    made.append(np.zeros((0, WIDTH), np.float32), [])
    found = Gallery.open(tmp_path / "empty")
    assert (len(found), found.files, found.cameras.shape) == (0, [], (0,))
    assert found.search(np.ones((2, WIDTH), np.float32)).indices.shape == (2, 0)


def test_a_killed_append_leaves_what_was_there(gallery, rng, monkeypatch):
    def killed(self):
        raise KeyboardInterrupt

    more = rng.standard_normal((4, WIDTH)).astype(np.float32)
    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            gallery.append(more, ["x"] * 4)
    for found in (gallery, Gallery.open(gallery.path)):
        assert len(found) == len(found.files) == 57
    gallery.append(more, ["y"] * 4)
    assert Gallery.open(gallery.path).files[57:] == ["y"] * 4


def test_what_can_not_be_added(gallery, no_array_checks):
    good = np.ones((2, WIDTH), np.float32)
    cases = [
        ((good, ["a"]), {}, "not that of 1 files and 24 values"),
        ((good[:, 1:], ["a", "b"]), {}, "not that of 2 files and 24 values"),
        ((good * np.nan, ["a", "b"]), {}, "not finite"),
        ((good, ["a", "b"]), {"cameras": [1]}, "2 files have cameras of shape"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(DataError, match=message):
            gallery.append(*arguments, **options)
    assert len(Gallery.open(gallery.path)) == 57
    with pytest.raises(DataError, match="exists already"):
        Gallery.create(gallery.path, fingerprint="", feature_dim=3)
    with pytest.raises(ConfigError, match="dtype='int8' is not known"):
        Gallery.create(gallery.path.parent / "x", fingerprint="", feature_dim=3, dtype="int8")


def test_other_weights_are_refused(gallery):
    gallery.check("abc", "same.pth")
    with pytest.raises(DataError, match=r"was made by other weights \(weights\.pth\) than new\.pth"):
        gallery.check("abd", "new.pth")


def test_bad_searches(gallery, no_array_checks):
    with pytest.raises(DataError, match="queries have 3 values, the gallery's features 24"):
        gallery.search(np.ones((1, 3), np.float32))
    with pytest.raises(DataError, match="not finite"):
        gallery.search(np.full((1, WIDTH), np.nan, np.float32))
    with pytest.raises(ConfigError, match="search: top_k=0 must be a whole number of at least 1"):
        gallery.search(np.ones((1, WIDTH), np.float32), 0)
    with pytest.raises(ConfigError, match="backend='gpu' is unknown"):
        gallery.search(np.ones((1, WIDTH), np.float32), backend="gpu")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gallery.json", None, "is no gallery"),
        ("gallery.json", b"{", "is damaged"),
        ("gallery.json", b"[]", "is damaged, or of another kind"),
        ("features-00001.npy", None, "can't be read"),
        ("features-00001.npy", b"", "is damaged"),
        ("features-00001.npy", b"\x93NUMPY\x01\x00", "is damaged"),
        ("cameras-00000.npy", b"x" * 100, "is damaged"),
    ],
)
def test_damage_is_found_when_it_is_opened(gallery, name, content, message):
    path = gallery.path / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Gallery.open(gallery.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "int8"},
        {"feature_dim": 0},
        {"feature_dim": "x"},
        {"checkpoint": None},
        {"parts": [3]},
        {"parts": [{"images": 50}]},
        {"parts": [{"images": 51, "root": ""}]},
        {"parts": [{"images": -1, "root": ""}]},
    ],
)
def test_manifests_that_do_not_fit(gallery, change):
    file = gallery.path / "gallery.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError):
        Gallery.open(gallery.path)


@pytest.mark.parametrize("name", ["gallery.json", "features-00001.npy", "cameras-00000.npy", "files-00001.json"])
def test_pipes_are_not_waited_for(gallery, name):
    (gallery.path / name).unlink()
    os.mkfifo(gallery.path / name)
    with pytest.raises(DataError) as caught:
        assert Gallery.open(gallery.path).files
    assert name in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[3]", '["a"]', "[" * 100_000])
def test_damaged_names(gallery, content):
    (gallery.path / "files-00001.json").write_text(content)
    with pytest.raises(DataError, match=r"files-00001\.json: is "):
        _ = Gallery.open(gallery.path).files


def test_no_object_is_unpickled(gallery, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([print], object), allow_pickle=True)
    shutil.copy(tmp_path / "objects.npy", gallery.path / "features-00000.npy")
    with pytest.raises(DataError, match="is damaged"):
        Gallery.open(gallery.path)
