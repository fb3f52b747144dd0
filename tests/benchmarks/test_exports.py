"""The benchmarks of exported files and of galleries run, on little."""

import csv

import pytest

from dmosnet_jax.benchmarks import gallery, onnx_runtime


@pytest.mark.slow
def test_onnx(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert onnx_runtime.main(["--models=osnet_x0_25", "--batch=1", f"--output={tmp_path / 'x.csv'}"]) == 0
    with open(tmp_path / "x.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["network"], row["operators"]) == ("osnet_x0_25", "395")
    assert float(row["difference"]) < 1e-4
    assert float(row["ms onnxruntime 1"]) > 0 < float(row["ms here 1"])
    assert "osnet_x0_25" in capsys.readouterr().out


def test_galleries_of_both_kinds(tmp_path):
    for dtype, size in (("float16", 2), ("float32", 4)):
        path = str(tmp_path / dtype)
        gallery.fill(path, 3000, dtype)
        stored = (tmp_path / dtype / "features-00000.npy").stat().st_size
        assert stored == pytest.approx(3000 * 512 * size, abs=200)
        row = gallery.measure(path, repeats=1)
        assert row["s for 1"] > 0 < row["s for 1000"]
        assert gallery.equal_to_full_product(path)
