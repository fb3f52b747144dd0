"""JSON objects from anywhere: an object, or one line."""

import pytest

from dmosnet_jax.core import safe_json
from dmosnet_jax.core.errors import DataError


def test_an_object_comes_back(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "ü"]}', encoding="utf-8")
    assert safe_json.read_object(path, fix="") == {"a": [1, "ü"]}
    with pytest.raises(FileNotFoundError):
        safe_json.read_object(tmp_path / "b.json", fix="")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'"text"', b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b"{}{}"],
)
def test_anything_else_is_one_line(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json: is damaged, or of another kind \(.*\): make it again") as error:
        safe_json.read_object(path, fix="make it again")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_long_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_json, "MAX_BYTES", 10)
    path = tmp_path / "a.json"
    path.write_bytes(b"{}" + b" " * 20)
    with pytest.raises(DataError, match="more than 10 bytes"):
        safe_json.read_object(path, fix="")
