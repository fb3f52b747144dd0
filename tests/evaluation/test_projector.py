"""The projector's files, read as TensorBoard reads them (tensorboard/plugins/projector/projector_plugin.py)."""

import io

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.unit import unit_rows_np
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.splits import Rows
from dmosnet_jax.evaluation import projector

# What is used of tensorboard/plugins/projector/projector_config.proto.
MESSAGES = {
    "SpriteMetadata": [("image_path", 1, "STRING"), ("single_image_dim", 2, "*UINT32")],
    "EmbeddingInfo": [
        ("tensor_name", 1, "STRING"),
        ("metadata_path", 2, "STRING"),
        ("bookmarks_path", 3, "STRING"),
        ("tensor_shape", 4, "*UINT32"),
        ("sprite", 5, "SpriteMetadata"),
        ("tensor_path", 6, "STRING"),
    ],
    "ProjectorConfig": [("embeddings", 2, "*EmbeddingInfo")],
}


class _Rows(Rows):
    """Pictures that are wider or higher than the other way, in a colour that tells their row."""

    def record(self, index, /):
        out = io.BytesIO()
        level = 10 + index
        colour = (level, 200, 0) if self.split == "query" else (level, 0, 200)
        Image.new("RGB", (20, 40) if index % 2 else (40, 20), colour).save(out, "PNG")
        return Record(out.getvalue(), int(self.pids[index]), int(self.camids[index]), f"{self.split}/a\tb_{index}.png")


@pytest.fixture
def case(rng):
    splits = [
        _Rows(name, name, rng.integers(0, 9, size).astype(np.int32), rng.integers(1, 4, size).astype(np.int32))
        for name, size in (("query", 30), ("gallery", 80))
    ]
    return projector.Embeddings(*splits, *(rng.normal(size=(len(one), 6)).astype(np.float32) for one in splits))


def read_config(path):
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="p.proto", package="t", syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for label, number, kind in fields:
            field = message.field.add(name=label, number=number, label=kinds.LABEL_OPTIONAL)
            if kind.startswith("*"):
                field.label = kinds.LABEL_REPEATED
            kind = kind.lstrip("*")
            if kind.isupper():
                field.type = getattr(kinds, f"TYPE_{kind}")
            else:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ProjectorConfig"))()
    return text_format.Parse(path.read_text(), config)


@pytest.mark.parametrize("most", [1000, 40])
def test_files_are_what_tensorboard_reads(case, tmp_path, most):
    path = projector.write(tmp_path, {"first": case, "second": case}, most=most)
    assert path == tmp_path / "projector_config.pbtxt"
    first, second = read_config(path).embeddings
    assert (first.tensor_name, second.tensor_name) == ("first", "second")
    data = (tmp_path / first.tensor_path).read_bytes()
    # TensorBoard takes a file for numbers in words where it is a text.
    with pytest.raises(UnicodeDecodeError):
        data.decode()
    features = np.frombuffer(data, "float32").reshape(first.tensor_shape)
    header, *lines = (tmp_path / first.metadata_path).read_text().splitlines()
    assert header.split("\t") == ["pid", "camid", "split", "path"]
    assert len(features) == len(lines) == (110 if most == 1000 else len(lines)) <= most
    wide, high = first.sprite.single_image_dim
    assert wide == high <= 64
    with Image.open(tmp_path / first.sprite.image_path) as opened:
        assert opened.format == "JPEG"
        sheet = np.asarray(opened).astype(int)
    assert sheet.shape[0] % high == sheet.shape[1] % wide == 0
    expected = [unit_rows_np(case.query_features), unit_rows_np(case.gallery_features)]
    seen = set()
    for place, (line, feature) in enumerate(zip(lines, features, strict=True)):
        pid, camid, name, file = line.split("\t")
        row = int(file.rpartition("_")[2].removesuffix(".png"))
        split = case.query if name == "query" else case.gallery
        seen.add((name, row))
        assert (int(pid), int(camid), file) == (split.pids[row], split.camids[row], f"{name}/a b_{row}.png")
        np.testing.assert_allclose(feature, expected[name == "gallery"][row], rtol=1e-6)
        down, across = divmod(place, sheet.shape[1] // wide)
        cell = sheet[down * high : (down + 1) * high, across * wide : (across + 1) * wide]
        colour = [10 + row, 200, 0] if name == "query" else [10 + row, 0, 200]
        np.testing.assert_allclose(cell[high // 2, wide // 2], colour, atol=6)
        # Not drawn out to a square: its sides are left white.
        np.testing.assert_allclose(cell[[2, -3], wide // 2] if row % 2 == 0 else cell[high // 2, [2, -3]], 255, atol=6)
    assert len(seen) == len(lines)


def test_a_sheet_of_the_most_points_fits(case, tmp_path, monkeypatch):
    columns = int(np.ceil(np.sqrt(projector.POINTS)))
    assert columns * (projector._SHEET // columns) <= 8192
    # As many images as make the cells smaller than they may be.
    monkeypatch.setattr(projector, "_SHEET", 300)
    (found,) = read_config(projector.write(tmp_path, {"a": case})).embeddings
    with Image.open(tmp_path / found.sprite.image_path) as sheet:
        assert max(sheet.size) <= 300
        assert sheet.size == (11 * found.sprite.single_image_dim[0], 10 * found.sprite.single_image_dim[1])


def test_without_identities_and_with_a_bad_image(case, tmp_path, monkeypatch):
    case.query.pids[:] = case.gallery.pids[:] = -1
    projector.write(tmp_path, {"a": case}, most=50)
    (found,) = read_config(tmp_path / "projector_config.pbtxt").embeddings
    assert list(found.tensor_shape) == [50, 6]
    monkeypatch.setattr(_Rows, "record", lambda self, row: Record(b"x", -1, -1, f"{row}.jpg"))
    with pytest.raises(DataError, match=r"projector: 0\.jpg: not an image"):
        projector.write(tmp_path / "new", {"a": case})
    assert not (tmp_path / "new" / "projector_config.pbtxt").exists()
