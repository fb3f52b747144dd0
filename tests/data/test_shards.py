import multiprocessing
import os
import pickle
import shutil
import struct
import threading

import numpy as np
import pytest

from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data.shards import INDEX_SUFFIX, RecordSource, load_index


@pytest.fixture
def shards(tmp_path, example, write_shard, rng):
    """Paths of three shards (one empty), their records, and the offsets in the first."""
    raw = [example(rng.bytes(int(n)), pid=i, camid=i % 6) for i, n in enumerate(rng.integers(0, 3000, 40))]
    parts = [raw[:25], [], raw[25:]]
    paths = [tmp_path / f"d-train.tfrecord-{i:05d}-of-00003" for i in range(3)]
    offsets = [write_shard(path, part) for path, part in zip(paths, parts, strict=True)]
    return paths, raw, offsets[0]


def test_every_record_in_order_and_at_random(shards, rng):
    paths, raw, _ = shards
    source = RecordSource(paths)
    assert len(source) == 40
    assert list(source) == raw
    assert source[-1] == raw[-1]
    assert source[-40] == raw[0]
    for row in rng.integers(0, 40, 100):
        assert source[row] == raw[row]
    np.testing.assert_array_equal(source.pids, np.arange(40))
    np.testing.assert_array_equal(source.camids, np.arange(40) % 6)
    assert source.pids.dtype == source.camids.dtype == np.int32
    for row in (40, -41):
        with pytest.raises(IndexError):
            source[row]


def test_index_is_written_once_and_then_used(shards):
    paths, raw, offsets = shards
    RecordSource(paths)
    sidecar = paths[0].with_name(paths[0].name + INDEX_SUFFIX)
    with np.load(sidecar, allow_pickle=False) as index:
        np.testing.assert_array_equal(index["offset"], offsets)
        np.testing.assert_array_equal(index["length"], [len(r) for r in raw[:25]])
        assert index["shard_bytes"] == paths[0].stat().st_size
    before = sidecar.stat().st_mtime_ns
    assert not [
        p for p in paths[0].parent.iterdir() if p.name not in {x.name + s for x in paths for s in ("", INDEX_SUFFIX)}
    ]
    # A damaged record behind a good index is met when it is read, so opening did not read the shard.
    flip(paths[0], offsets[7] + 40)
    source = RecordSource(paths)
    assert source[6] == raw[6]
    with pytest.raises(DataError, match=r"00000-of-00003: record 7 at byte \d+ is corrupt"):
        source[7]
    assert sidecar.stat().st_mtime_ns == before


def test_stale_or_damaged_index_is_made_again(shards, example, write_shard):
    paths, raw, _ = shards
    RecordSource(paths)
    sidecar = paths[2].with_name(paths[2].name + INDEX_SUFFIX)
    good = sidecar.read_bytes()
    swapped = raw[26:27] + raw[25:26] + raw[27:]  # same size in bytes, other records
    write_shard(paths[2], swapped)
    assert list(RecordSource(paths))[25:] == swapped
    write_shard(paths[2], raw[25:])
    for broken in (b"", b"not a zip", good[: len(good) // 2], good[:300] + bytes([good[300] ^ 255]) + good[301:]):
        sidecar.write_bytes(broken)
        assert list(RecordSource(paths)) == raw
        assert len(load_index(paths[2])["offset"]) == 15
    with np.load(sidecar, allow_pickle=False) as index:
        arrays = dict(index)
    for name, value in {
        "offset": arrays["offset"][::-1],
        "length": arrays["length"][:-1],
        "pid": arrays["pid"].astype(np.int64),
        "camid": np.zeros((15, 1), np.int32),
        "shard_bytes": np.zeros(3, np.int64),
    }.items():
        np.savez(sidecar, **(arrays | {name: value}))
        assert list(RecordSource(paths)) == raw
    pickled = np.array([{"a": 1}], dtype=object)
    np.savez(sidecar, **(arrays | {"offset": pickled}))
    assert list(RecordSource(paths)) == raw


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_read_only_folder_keeps_the_index_in_memory(shards):
    paths, raw, _ = shards
    paths[0].parent.chmod(0o555)
    try:
        assert list(RecordSource(paths)) == raw
    finally:
        paths[0].parent.chmod(0o755)
    assert not list(paths[0].parent.glob("*" + INDEX_SUFFIX))


def test_index_that_cannot_be_written_is_kept_in_memory(shards):
    paths, raw, _ = shards
    for path in paths:  # a folder in its place cannot be replaced by a file, whoever tries
        path.with_name(path.name + INDEX_SUFFIX).mkdir()
    assert list(RecordSource(paths)) == raw
    assert sorted(p.name for p in paths[0].parent.iterdir() if p.is_file()) == sorted(p.name for p in paths)


@pytest.mark.parametrize("place", ["length", "length_crc", "data", "data_crc"])
@pytest.mark.parametrize("indexed", [True, False])
def test_flipped_byte_names_shard_record_and_offset(shards, place, indexed):
    paths, raw, offsets = shards
    number = 11
    at = offsets[number] + {"length": 1, "length_crc": 9, "data": 12, "data_crc": 12 + len(raw[number]) + 3}[place]
    if indexed:
        RecordSource(paths)
    flip(paths[0], at)
    with pytest.raises(
        DataError, match=f"d-train.tfrecord-00000-of-00003: record 11 at byte {offsets[number]} is corrupt"
    ) as e:
        RecordSource(paths)[number]
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("indexed", [True, False])
def test_cut_shard_names_the_file_wherever_it_is_cut(shards, indexed, rng):
    paths, _, offsets = shards
    content = paths[0].read_bytes()
    for size in [1, 11, 12, 15, *rng.integers(16, len(content), 20).tolist(), len(content) - 1]:
        if size in offsets:
            continue
        paths[0].write_bytes(content)
        if indexed:
            RecordSource(paths)
        paths[0].write_bytes(content[:size])
        with pytest.raises(DataError, match=r"00000-of-00003: is cut short: record \d+ at byte \d+"):
            RecordSource(paths)


def test_cut_between_records_is_found_by_the_counts(shards):
    paths, _, offsets = shards
    with open(paths[0], "r+b") as file:
        file.truncate(offsets[20])
    with pytest.raises(DataError, match="00000-of-00003: holds 20 records instead of 25"):
        RecordSource(paths, [25, 0, 15])


def test_length_beyond_any_memory_is_refused(tmp_path):
    from google_crc32c import value

    length = struct.pack("<Q", 2**60)
    crc = value(length)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    path = tmp_path / "huge.tfrecord"
    path.write_bytes(length + struct.pack("<I", masked) + b"data")
    with pytest.raises(DataError, match="cut short"):
        RecordSource([path])


def test_missing_shard_and_foreign_records_are_named(shards, tmp_path, write_shard):
    with pytest.raises(DataError, match=r"nothing\.tfrecord: cannot be read \(No such file"):
        RecordSource([tmp_path / "nothing.tfrecord"])
    write_shard(tmp_path / "other.tfrecord", [b"\x0a\x00", b"hello"])
    with pytest.raises(DataError, match=r"other\.tfrecord: record 0 at byte 0: not a record of this format"):
        RecordSource([tmp_path / "other.tfrecord"])


def test_shard_that_shrinks_or_vanishes_after_opening(shards):
    paths, _, offsets = shards
    source = RecordSource(paths)
    os.truncate(paths[0], offsets[10] + 5)
    with pytest.raises(DataError, match="record 10 at byte"):
        source[10]
    paths[2].unlink()
    with pytest.raises(DataError, match="00002-of-00003: cannot be read"):
        source[39]


def test_pickles_and_serves_threads(shards, rng):
    paths, raw, _ = shards
    source = pickle.loads(pickle.dumps(RecordSource(paths)))
    orders = [rng.permutation(40) for _ in range(8)]
    wrong = []

    def read(order):
        wrong.extend(int(row) for row in order if source[row] != raw[row])

    threads = [threading.Thread(target=read, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def read_in_worker(source, rows, queue):
    queue.put([source[row] for row in rows])


def test_a_forked_worker_reads_through_the_same_files(shards):
    paths, raw, _ = shards
    source = RecordSource(paths)
    assert source[3] == raw[3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_in_worker, args=(source, range(40), queue))
    worker.start()
    assert queue.get(timeout=30) == raw
    worker.join()
    assert list(source) == raw


def test_more_shards_than_files_may_stay_open(tmp_path, example, write_shard, monkeypatch):
    monkeypatch.setattr("dmosnet_jax.data.shards._MAX_OPEN", 3)
    raw = [example(pid=i) for i in range(10)]
    for i, record in enumerate(raw):
        write_shard(tmp_path / f"{i}", [record])
    source = RecordSource([tmp_path / f"{i}" for i in range(10)])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert list(source) == raw == list(source)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 3
    source.close()
    assert list(source) == raw


def test_a_copy_of_the_folder_keeps_its_index(shards, tmp_path):
    paths, raw, _ = shards
    RecordSource(paths)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in list(tmp_path.glob("d-*")):
        shutil.copyfile(path, copy / path.name)  # new dates
    sidecar = copy / (paths[0].name + INDEX_SUFFIX)
    before = sidecar.stat().st_mtime_ns
    assert list(RecordSource([copy / path.name for path in paths])) == raw
    assert sidecar.stat().st_mtime_ns == before


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))
