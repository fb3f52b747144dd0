"""The benchmark of convolution forms: it compares equals, and writes what it prints."""

import csv

import jax
import numpy as np
import pytest

from dmosnet_jax.benchmarks import convolution
from dmosnet_jax.core import tables
from dmosnet_jax.core.errors import DataError


@pytest.mark.parametrize("operation", ["depthwise 3x3", "pointwise 1x1"])
def test_all_forms_compute_the_same(rng, operation):
    kernel = rng.normal(size=(3, 3, 1, 4) if operation.startswith("depthwise") else (4, 4)).astype(np.float32)
    x, weights = rng.normal(size=(2, 2, 5, 6, 4)).astype(np.float32)
    known = convolution.forms()[operation]
    first, *others = [
        jax.tree.leaves(convolution.passes(f)["forward + backward"](x, kernel, weights)) for f in known.values()
    ]
    assert len(others) == 2
    for other in others:
        for ours, theirs in zip(other, first, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_plain_form_has_no_gradient_of_its_own():
    known = convolution.forms()["depthwise 3x3"]
    x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 1, 2), np.float32)
    traced = {name: str(jax.make_jaxpr(form)(x, kernel)) for name, form in known.items()}
    assert ["custom_vjp" in text for text in traced.values()] == [False, False, True]


def test_command_prints_a_table_and_writes_csv(tmp_path, capsys):
    path = tmp_path / "new" / "forms.csv"
    assert convolution.main(["--shape", "1", "4", "4", "2", "--repeats", "2", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        assert row["form"] in printed
        assert float(row["milliseconds"]) > 0
    for first in rows[::3]:
        group = [row for row in rows if (row["operation"], row["pass"]) == (first["operation"], first["pass"])]
        assert first["form"].startswith("XLA")
        assert len(group) == 3
        for row in group:
            ratio = float(first["milliseconds"]) / float(row["milliseconds"])
            assert float(row["ratio"]) == pytest.approx(ratio)
    assert [p.name for p in path.parent.iterdir()] == ["forms.csv"]


def test_bad_arguments_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as caught:
        convolution.main(["--repeats", "0"])
    assert caught.value.code == 2
    assert "--repeats must be 1 or more" in capsys.readouterr().err


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["--shape", "1", "4", "4", "2", "--repeats", "1", "--output", str(tmp_path / "file" / "x.csv")]
    assert convolution.main(arguments) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_table_aligns_numbers_to_the_right():
    rows = [{"name": "a", "count": 1, "share": 0.5}, {"name": "long", "count": 12345, "share": None}]
    assert tables.as_text(rows).splitlines() == ["name   count  share", "a          1   0.50", "long  12,345      -"]


def test_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match=r"taken: can't be written"):
        tables.write_csv(tmp_path / "taken", [{"a": 1}])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
