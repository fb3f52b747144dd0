import jax
import numpy as np
import pytest

from dmosnet_jax.core import parallel
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.memory import hybrid, tables
from dmosnet_jax.memory.clustering import cluster, neighbours


def unit(rng, rows, dim=16):
    features = rng.normal(size=(rows, dim)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def filled(features, mesh, edges, *, before=0):
    filling = tables.Filling(before + len(features), features.shape[1], mesh)
    pieces = [(a, features[a:b]) for a, b in zip([0, *edges], [*edges, len(features)], strict=True)]
    filling.write(0, np.zeros((before, features.shape[1]), np.float32))
    for start, piece in reversed(pieces):
        filling.write(before + start, piece)
    return filling.finish()


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_table_comes_together_from_pieces(rng, devices):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    features = unit(rng, 1500)
    rows = filled(features, mesh, [1, 700, 1399])
    assert rows.shape == features.shape
    assert rows.table.sharding == parallel.by_rows(mesh)
    assert len(rows.table) == tables.padded(1500, mesh)
    assert {len(shard.data) for shard in rows.table.addressable_shards} == {len(rows.table) // devices}
    np.testing.assert_array_equal(np.asarray(rows.table)[:1500], features, strict=True)
    assert not np.asarray(rows.table)[1500:].any()
    np.testing.assert_array_equal(rows.on_first, features, strict=True)
    np.testing.assert_array_equal(rows.fetch(90, 130), features[90:130], strict=True)
    # Several processes take it by this program.
    for start, count in ((0, 1), (1490, 10), (3, 1200)):
        found = tables._rows_of(rows.table, np.int32(start), count=count, mesh=mesh)
        np.testing.assert_array_equal(found, features[start : start + count], strict=True)


@pytest.mark.parametrize("devices", [1, 8])
def test_rows_of_a_table_are_searched_where_they_are(rng, devices):
    mesh = parallel.make_mesh(jax.devices()[:devices])
    features = unit(rng, 1300)
    features[700:720] = features[:20]
    table = filled(features, mesh, [500], before=37)
    images = tables.TableRows(table.table, 37, 1337, mesh)
    expected = neighbours.search_host(features, 9)
    for backend in ("host", "device"):
        found = neighbours.search(images, 9, backend=backend)
        np.testing.assert_array_equal(found.indices, expected.indices, err_msg=backend)
        np.testing.assert_allclose(found.similarities, expected.similarities, atol=1e-6)


def test_the_host_search_is_the_same_in_strips(rng, monkeypatch):
    features = rng.integers(-2, 3, (700, 6)).astype(np.float32)
    whole = neighbours.search_host(features, 9, block=64)
    for strip in (1, 3):
        monkeypatch.setattr(neighbours, "_STRIP", strip)
        found = neighbours.search_host(features, 9, block=64)
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_array_equal(found.similarities, whole.similarities)


def test_the_memory_takes_a_table_as_it_is(rng):
    mesh = parallel.make_mesh()
    features = unit(rng, 300)
    rows = filled(features, mesh, [])
    settings = {"momentum": 0.2, "temperature": 0.05, "mesh": mesh}
    labels = cluster(rows, eps=0.9, eps_gap=0.01, k1=20).labels
    np.testing.assert_array_equal(labels, cluster(features, eps=0.9, eps_gap=0.01, k1=20).labels)
    memory = hybrid.set_labels(hybrid.shapes(300, 16, **settings), labels, features=rows)
    assert memory.features is rows.table
    expected = hybrid.init(features, labels, **settings)
    for one, other in zip(jax.tree.leaves(memory), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bad_rows_of_a_table_are_told(rng):
    mesh = parallel.make_mesh()
    features = unit(rng, 300)
    features[[120, 260], 3] = np.nan
    with pytest.raises(DataError, match="2 of 300 features are not finite, the first is row 120; the network has div"):
        filled(features, mesh, [100, 200])
    features[[120, 260], 3] = 2
    with pytest.raises(DataError, match=r"row 260 of the table has length 2.*, not 1|row 120 of the table has length"):
        cluster(filled(features, mesh, []))
