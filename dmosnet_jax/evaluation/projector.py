"""Files of TensorBoard's projector: features, what each is of, and their pictures, for `tensorboard --logdir`.

Formats: https://github.com/tensorflow/tensorboard/blob/master/docs/tensorboard_projector_plugin.ipynb and the messages
of tensorboard/plugins/projector/projector_config.proto. The configuration lies in the folder that TensorBoard is given,
the others in `projector/` beside it.
"""

import io
import math
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.data import transforms
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation import distances
from dmosnet_jax.evaluation.principal import some_identities
from dmosnet_jax.train.metrics import progress_bar

CONFIG, FOLDER = "projector_config.pbtxt", "projector"
# More points than these move slowly. The sheet of pictures is one texture of the browser's graphics: 8192 pixels is
# what TensorBoard allows, 4800 what any graphics holds. Its cells are drawn as squares, whatever their shape is.
POINTS, _SHEET, _CELL = 10_000, 4800, 64
_AT_ONCE = 256


class Embeddings(NamedTuple):
    """Images and their features; these are L2-normalised here."""

    query: Rows
    gallery: Rows
    query_features: Float[np.ndarray, "q d"]
    gallery_features: Float[np.ndarray, "g d"]


def write(folder: pathlib.Path, embeddings: Mapping[str, Embeddings], *, most: int = POINTS) -> pathlib.Path:
    """Writes the files; the configuration, the last of them, when the others are complete.

    Args:
        folder: what TensorBoard is given as `--logdir`.
        embeddings: by name of the data set.
        most: points of each. Where there are more images, those of identities that are spread over the data set.

    Returns:
        The configuration.

    Raises:
        DataError: a record can't be read or decoded, or a file can't be written.
    """
    config = folder / CONFIG
    text = "".join(_write_one(folder, name, found, most) for name, found in embeddings.items())
    with atomic_write(config) as part:
        part.write_text(text, encoding="utf-8")
    return config


def _write_one(folder: pathlib.Path, name: str, found: Embeddings, most: int) -> str:
    """Writes the files of one data set and returns its part of the configuration."""
    query, gallery = found.query, found.gallery
    every = np.concatenate(distances.prepare_pair(found.query_features, found.gallery_features, "cosine"))
    rows = np.arange(len(every))
    if len(every) > most:
        rows = some_identities(np.concatenate([query.pids, gallery.pids]), most)
        # Without identities, every so many images. Sorted, those of the query come first.
        rows = np.sort(rows) if rows.size else np.linspace(0, len(every) - 1, most).astype(np.int64)
    paths = {kind: f"{FOLDER}/{name}/{kind}" for kind in ("features.bytes", "metadata.tsv", "sprite.jpg")}
    with atomic_write(folder / paths["features.bytes"]) as part:
        part.write_bytes(every[rows].astype("<f4").tobytes())
    lines, cell = _write_sprite(folder / paths["sprite.jpg"], query, gallery, rows)
    with atomic_write(folder / paths["metadata.tsv"]) as part:
        part.write_text("\n".join(["pid\tcamid\tsplit\tpath", *lines, ""]), encoding="utf-8")
    return f"""embeddings {{
  tensor_name: "{name}"
  tensor_path: "{paths["features.bytes"]}"
  tensor_shape: {len(rows)}
  tensor_shape: {every.shape[1]}
  metadata_path: "{paths["metadata.tsv"]}"
  sprite {{
    image_path: "{paths["sprite.jpg"]}"
    single_image_dim: {cell}
    single_image_dim: {cell}
  }}
}}
"""


def _write_sprite(path: pathlib.Path, query: Rows, gallery: Rows, rows: np.ndarray) -> tuple[list[str], int]:
    """Writes the pictures, row by row; returns a line of metadata for each, and the side of a cell in pixels."""
    columns = math.ceil(math.sqrt(len(rows)))
    cell = min(_CELL, _SHEET // columns)
    sheet = Image.new("RGB", (columns * cell, math.ceil(len(rows) / columns) * cell), "white")
    lines: list[str] = []
    with progress_bar(len(rows), label="sprite") as bar:
        first = np.searchsorted(rows, len(query))
        for split, own in ((query, rows[:first]), (gallery, rows[first:] - len(query))):
            for start in range(0, len(own), _AT_ONCE):
                for record in split.read_many(own[start : start + _AT_ONCE]):
                    try:
                        picture = Image.fromarray(transforms.decode(record.image))
                    except DataError as error:
                        raise DataError(f"projector: {record.filename}: {error}; convert the data set again") from error
                    down, across = divmod(len(lines), columns)
                    sheet.paste(ImageOps.pad(picture, (cell, cell), color="white"), (across * cell, down * cell))
                    file = re.sub(r"[\t\r\n]", " ", record.filename)
                    lines.append(f"{record.pid}\t{record.camid}\t{split.split}\t{file}")
                    bar.update()
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    with atomic_write(path) as part:
        part.write_bytes(buffer.getvalue())
    return lines, cell
