"""A picture of images along an order, best first: rows are positions in it, as in Figure 5 of the paper."""

import os
import pathlib
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64
from PIL import Image, ImageDraw, ImageFont

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.data import transforms

# In percent of the order, best first.
POSITIONS = (0, 25, 50, 75, 100)

_CELL = (96, 192)
_GAP, _MARGIN, _CAPTION, _LABEL, _HEAD = 8, 16, 18, 104, 34
_PAPER, _INK, _SOFT, _FRAME = "#ffffff", "#1c2330", "#5b6472", "#eceef1"


def rows_at(count: int, columns: int) -> Int64[np.ndarray, "positions columns"]:
    """Ranks, among `count`, of the neighbours around each of `POSITIONS`: the first at 0 and the last at 100."""
    columns = min(columns, count)
    centres = np.round(np.asarray(POSITIONS) / 100 * (count - 1)).astype(np.int64)
    firsts = np.clip(centres - columns // 2, 0, count - columns)
    return firsts[:, None] + np.arange(columns)[None, :]


def write_contact_sheet(
    path: str | os.PathLike[str],
    scores: Float[np.ndarray, " n"],
    image: Callable[[int], bytes],
    *,
    title: str,
    columns: int = 8,
) -> None:
    """Draws images at positions of the order of their scores; the file appears under its name only when complete.

    Args:
        path: the `.png` file.
        scores: higher is better; equal ones keep their order.
        image: gives the encoded image of a row.
        title: a line above the images.
        columns: images of each position.

    Raises:
        DataError: an image can't be decoded, or the file can't be written.
    """
    order = np.argsort(-scores, kind="stable")
    table = rows_at(len(order), columns)
    width = 2 * _MARGIN + _LABEL + table.shape[1] * (_CELL[0] + _GAP)
    line = _CELL[1] + _CAPTION + _GAP
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _HEAD + len(table) * line), _PAPER)
    pen = ImageDraw.Draw(sheet)
    head, text = ImageFont.load_default(17), ImageFont.load_default(13)
    pen.text((_MARGIN, _MARGIN), title, _INK, head)
    for number, (position, ranks) in enumerate(zip(POSITIONS, table, strict=True)):
        top = _MARGIN + _HEAD + number * line
        pen.text((_MARGIN, top + _CELL[1] // 2 - 14), f"{position:g} %", _INK, head)
        pen.text((_MARGIN, top + _CELL[1] // 2 + 10), f"from {ranks[0] + 1:,}", _SOFT, text)
        for column, rank in enumerate(ranks):
            row = int(order[rank])
            left = _MARGIN + _LABEL + column * (_CELL[0] + _GAP)
            _paste(sheet, _thumbnail(image(row), row), left, top)
            pen.text((left + _CELL[0] // 2, top + _CELL[1] + 2), f"{scores[row]:.4f}", _SOFT, text, anchor="ma")
    with atomic_write(pathlib.Path(path)) as part:
        sheet.save(part, "PNG", optimize=True)


def _thumbnail(data: bytes, row: int) -> Image.Image:
    try:
        picture = Image.fromarray(transforms.decode(data))
    except DataError as error:
        raise DataError(f"contact sheet: image {row}: {error}; convert the data set again") from error
    scale = min(_CELL[0] / picture.width, _CELL[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _paste(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    """Centres a picture in its cell."""
    sheet.paste(_FRAME, (left, top, left + _CELL[0], top + _CELL[1]))
    sheet.paste(picture, (left + (_CELL[0] - picture.width) // 2, top + (_CELL[1] - picture.height) // 2))
