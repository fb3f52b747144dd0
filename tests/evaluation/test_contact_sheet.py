import io

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.evaluation import contact_sheet


def coloured(colour, size=(32, 64)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize(("count", "columns"), [(1, 8), (5, 8), (8, 8), (9, 8), (100, 8), (4_180_243, 3)])
def test_rows_are_neighbours_around_their_position(count, columns):
    ranks = contact_sheet.rows_at(count, columns)
    assert ranks.shape == (5, min(columns, count))
    assert (np.diff(ranks, axis=1) == 1).all()
    assert ranks.min() == ranks[0, 0] == 0
    assert ranks.max() == ranks[-1, -1] == count - 1
    for position, row in zip(contact_sheet.POSITIONS, ranks, strict=True):
        assert row[0] <= round(position / 100 * (count - 1)) <= row[-1]


def cells(path, columns, rows=5):
    """The colour in the middle of each image of a sheet."""
    with Image.open(path) as sheet:
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        pixels = np.asarray(sheet)
    left = contact_sheet._MARGIN + contact_sheet._LABEL + contact_sheet._CELL[0] // 2
    top = contact_sheet._MARGIN + contact_sheet._HEAD + contact_sheet._CELL[1] // 2
    line = contact_sheet._CELL[1] + contact_sheet._CAPTION + contact_sheet._GAP
    column = contact_sheet._CELL[0] + contact_sheet._GAP
    return [[tuple(pixels[top + r * line, left + c * column].tolist()) for c in range(columns)] for r in range(rows)]


def test_images_stand_where_their_scores_put_them(tmp_path, rng):
    scores = rng.permutation(np.linspace(-1, 1, 101)).astype(np.float32)
    path = tmp_path / "new" / "sheet.png"
    # The red of an image is its score in hundredths, its green is 7.
    contact_sheet.write_contact_sheet(
        path,
        scores,
        lambda row: coloured((round((scores[row] + 1) * 50), 7, 0), (20 + row % 3 * 40, 40 + row % 5 * 30)),
        title="title",
        columns=3,
    )
    hundredths = [[red for red, green, _ in row if green == 7] for row in cells(path, 3)]
    assert hundredths == [[100, 99, 98], [76, 75, 74], [51, 50, 49], [26, 25, 24], [2, 1, 0]]
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_a_sheet_is_the_same_every_time(tmp_path):
    for name in "ab":
        contact_sheet.write_contact_sheet(
            tmp_path / name, np.zeros(3, np.float32), lambda row: coloured((row, 0, 0)), title=""
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert cells(tmp_path / "a", 3) == [[(0, 0, 0), (1, 0, 0), (2, 0, 0)]] * 5


def test_problems_are_told_in_one_line_and_leave_nothing(tmp_path):
    scores = np.zeros(3, np.float32)
    with pytest.raises(DataError, match=r"contact sheet: image 0: .*; convert the data set again"):
        contact_sheet.write_contact_sheet(tmp_path / "sheet.png", scores, lambda row: b"no image", title="")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"sheet\.png: can't be written"):
        contact_sheet.write_contact_sheet(
            tmp_path / "file" / "sheet.png", scores, lambda row: coloured((0, 0, 0)), title=""
        )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
