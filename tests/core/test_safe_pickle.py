import io
import os
import pickle
import tracemalloc

import numpy as np
import pytest

from dmosnet_jax.core import safe_pickle
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.core.safe_pickle import read_plain


class Payload:
    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        ["a.jpg", "b/ü.jpg", ""],
        {"keys": ["IN_00_0001_00000001", "IN_00_0001_00000002"], "n": 2, "ratio": 0.5, "nothing": None},
        [b"CC_CC_VVVV_MMMMMMMM", b"\x00\xff"],
        [("a", 1), ["deep", {"er": (True, False)}]],
        [str(i) for i in range(3000)],
    ],
)
def test_plain_data_come_back_in_every_protocol(tmp_path, protocol, value):
    path = tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain(path) == value


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: ["a.jpg", p], lambda p: {"keys": ["a"], "hook": p}])
def test_code_is_refused_by_its_name_and_never_run(tmp_path, protocol, wrap):
    marker, path = tmp_path / "marker", tmp_path / "keys.pkl"
    path.write_bytes(pickle.dumps(wrap(Payload(marker)), protocol))
    with pytest.raises(DataError, match=r"keys\.pkl: refused, nothing was run: .*posix\.system") as error:
        read_plain(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


def test_what_is_no_plain_data_is_refused_in_one_line(tmp_path):
    path = tmp_path / "keys.pkl"
    with pytest.raises(DataError, match=r"keys\.pkl: can't be read"):
        read_plain(path)
    for value in (np.array(["a", "b"]), os.stat_result(range(10))):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match="refused, nothing was run"):
            read_plain(path)
    # The only call that is understood, with something else than bytes spelled as text.
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.")
    with pytest.raises(DataError, match="damaged pickle"):
        read_plain(path)
    good = pickle.dumps([str(i) for i in range(100)])
    for content in (b"", b"a.jpg\nb.jpg\n", good[:-1], good[: len(good) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"keys\.pkl") as error:
            read_plain(path)
        assert "\n" not in str(error.value)
    path.write_bytes(good)
    with pytest.raises(DataError, match="more than 100 opcodes"):
        read_plain(path, max_opcodes=100)


@pytest.mark.parametrize("opcode", [b"}", b"]", b"(", b")\x85", b"\x8f"])
def test_containers_are_bounded_by_the_length(opcode):
    """Each takes a byte in the stream and sixty in memory."""
    data = b"\x80\x04" + opcode * 400_000
    vocabulary = safe_pickle.PlainVocabulary("f")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="made of containers alone"):
            safe_pickle.interpret(io.BytesIO(data), vocabulary, "f")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40_000_000


def test_lists_of_pairs_are_within_the_bound(tmp_path):
    pairs = [(f"{number:08d}.jpg", number / 3) for number in range(150_000)]
    path = tmp_path / "a.pkl"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(pairs, protocol))
        assert safe_pickle.read_plain(path) == pairs
