"""The benchmarks of clustering, memory and checkpoints: what they compare is equal, and they write what they print."""

import csv

import numpy as np
import pytest

from dmosnet_jax.benchmarks import checkpoints, clustering, dense, memory, structured
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.memory.clustering import cluster
from dmosnet_jax.memory.clustering.neighbours import search_host


@pytest.mark.parametrize("images", [700, 1300, 20])
def test_neighbours_of_structured_features_are_the_true_ones(images):
    features, people, nearest = structured.features(images, 256, seed=1)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(nearest, search_host(features, 30).indices)
    assert (people == -1).any()
    known = people[people >= 0]
    first = features[people == known[0]]
    assert (first @ first.T).mean() > (first @ features[people == known[-1]].T).mean()


def test_dense_computation_agrees_with_the_sparse_one():
    features, _, _ = structured.features(600, 128)
    clusters, classes, seconds = dense.labels(features, k1=20)
    found = cluster(features, k1=20)
    np.testing.assert_array_equal(found.dbscan, clusters)
    np.testing.assert_array_equal(found.labels[:, None] == found.labels, classes[:, None] == classes)
    assert list(seconds) == ["neighbours", "weights", "jaccard", "dbscan", "criterion"]
    assert (clusters >= 0).any()
    assert (clusters < 0).any()


@pytest.mark.slow
def test_checkpoints_are_saved_and_restored_in_every_form(tmp_path):
    output, folder = tmp_path / "c.csv", tmp_path / "scratch"
    folder.mkdir()
    sizes = ["--n=40_000", "--classes=40_000", "--model=osnet_x0_25"]
    forms = ["compacted", "with sums"]
    assert checkpoints.main([*sizes, f"--forms={','.join(forms)}", f"--folder={folder}", f"--output={output}"]) == 0
    with open(output, newline="") as file:
        rows = {row["form"]: row for row in csv.DictReader(file)}
    assert list(rows) == forms
    for row in rows.values():
        assert 0 < float(row["blocked s"]) <= float(row["save s"])
        assert float(row["restore s"]) > 0
    # As many classes as images: half of the tables is not written.
    written = {form: float(row["written GiB"]) for form, row in rows.items()}
    assert written["compacted"] < 0.75 * written["with sums"]
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_clustering_command_compares_and_writes(tmp_path, capsys):
    output = tmp_path / "clustering.csv"
    assert clustering.main(["--n", "400,300", "--dim", "64", "--search_limit", "300", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    with open(output, newline="") as file:
        given, searched = csv.DictReader(file)
    assert (given["images"], searched["images"]) == ("400", "300")
    assert (given["neighbours"], given["ratio"]) == ("", "")
    assert searched["same labels"] == "yes"
    ratio = float(searched["dense"]) / float(searched["total"])
    assert float(searched["ratio"]) == pytest.approx(ratio)
    for row in (given, searched):
        assert row["clusters"] in printed
        assert float(row["us/image"]) > 0
        assert float(row["peak GiB"]) > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["clustering.csv"]


def test_features_from_a_file(tmp_path, capsys):
    features = 3 * structured.features(300, 64)[0]
    np.savez(tmp_path / "f.npz", features=features)
    assert len(clustering._load(str(tmp_path / "f.npz"), 200)) == 200
    np.testing.assert_allclose(clustering._load(str(tmp_path / "f.npz"), 300), features / 3, atol=1e-6)
    with pytest.raises(DataError, match=r"\(300, 64\); --n asks for 301"):
        clustering._load(str(tmp_path / "f.npz"), 301)
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"bad\.npy: not an"):
        clustering._load(str(tmp_path / "bad.npy"), 1)


def test_direct_computation_has_the_gradient_of_its_loss():
    features, labels, inputs, indices = memory.problem(150, 40, 12, 5, seed=3)
    value, gradient = memory.direct(features, labels, inputs, indices)
    for d in range(12):
        shift = np.zeros_like(inputs, np.float64)
        shift[:, d] = 1e-5
        up, down = (memory.direct(features, labels, inputs + sign * shift, indices)[0] for sign in (1, -1))
        # All inputs moved at once: the difference is the sum of their gradients.
        assert (up - down) / 2e-5 == pytest.approx(gradient[:, d].sum(), rel=1e-4, abs=1e-7)
    assert value > 0
    assert set(labels) == set(range(40))
    assert indices[0] == indices[-1]


@pytest.mark.slow
def test_memory_command_checks_and_writes(tmp_path, capsys):
    output = tmp_path / "memory.csv"
    arguments = ["--n", "900", "--classes", "300", "--dim", "32", "--batch", "16", "--repeats", "2"]
    assert memory.main([*arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    with open(output, newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["direct"] in printed
    assert float(row["direct"]) < 1e-5
    assert float(row["ratio"]) == pytest.approx(float(row["reference ms"]) / float(row["step ms"]))
    assert float(row["held GiB"]) < 2 * float(row["tables GiB"])


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (clustering, ["--n", "1"], "must be 2 or more"),
        (clustering, ["--n", "many"], "invalid"),
        (clustering, ["--features", "x.npy", "--neighbours", "given"], "leave out --features"),
        (memory, ["--n", "10,20", "--classes", "5"], "--classes has 1 numbers, --n has 2"),
        (memory, ["--n", "10", "--classes", "50"], "more classes than images"),
        (memory, ["--batch", "1"], "--batch must be 2 or more"),
    ],
)
def test_bad_arguments_end_with_status_2(capsys, command, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
