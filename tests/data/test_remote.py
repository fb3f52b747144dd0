"""Data sets behind a URL, in an in-memory file system."""

import concurrent.futures
import functools
import json
import pickle
import random
import subprocess
import sys
import threading
import time
import uuid

import numpy as np
import pytest

from dmosnet_jax.core import files
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import splits
from dmosnet_jax.data.shards import INDEX_SUFFIX, load_index, to_bytes

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DMOSNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path, write_dataset, example, rng):
    raw = [example(rng.bytes(int(n)), i // 2, i % 3, f"train/{i}.jpg") for i, n in enumerate(rng.integers(0, 9000, 30))]
    write_dataset(tmp_path / "data", "tiny", "1.0.0", {"train": [raw[:20], [], raw[20:]]})
    return tmp_path / "data"


@pytest.fixture
def remote(local):
    """URL of a copy of `local`; no index is there."""
    root = f"memory://{uuid.uuid4().hex}/data"
    for path in local.rglob("*"):
        if path.is_file():
            files.copy(path, f"{root}/{path.relative_to(local).as_posix()}")
    return root


@pytest.fixture
def requests(monkeypatch):
    """Paths and ranges that the file system was asked for."""
    made = []
    original = fsspec.implementations.memory.MemoryFileSystem.cat_file

    def counted(self, path, start=None, end=None, **options):
        made.append((path.rsplit("/", 1)[-1], start, end))
        return original(self, path, start=start, end=end, **options)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "cat_file", counted)
    return made


def shard(root, number):
    return f"{root}/tiny/1.0.0/tiny-train.tfrecord-{number:05d}-of-00003"


def test_a_remote_split_is_the_local_one(local, remote):
    here, there = (splits.load_split(root, "tiny", "train") for root in (local, remote + "/"))
    assert len(here) == len(there) == 30
    assert [there.record(i) for i in range(30)] == [here.record(i) for i in range(30)]
    np.testing.assert_array_equal(there.pids, here.pids)
    np.testing.assert_array_equal(there.camids, here.camids)
    assert splits.split_names(remote, "tiny") == ["train"]
    copy = pickle.loads(pickle.dumps(there))
    assert copy.record(29) == here.record(29)


def test_a_record_is_one_request_for_its_bytes(local, remote, requests):
    here, there = (splits.load_split(root, "tiny", "train") for root in (local, remote))
    requests.clear()
    assert there.record(21) == here.record(21)
    ((name, start, end),) = requests
    assert name == "tiny-train.tfrecord-00002-of-00003"
    assert end - start == len(there.source[21]) + 16


def test_the_index_is_kept_locally_and_used_again(local, remote, cache, requests):
    first = splits.load_split(remote, "tiny", "train")
    assert len(list(cache.iterdir())) == 3
    assert not files.is_file(shard(remote, 0) + INDEX_SUFFIX)
    requests.clear()
    again = splits.load_split(remote, "tiny", "train")
    assert sum(end - start for _, start, end in requests if start is not None) <= 3 * 2 * 4096
    assert not [name for name, *_ in requests if name.endswith(INDEX_SUFFIX)]
    assert again.record(3) == first.record(3)
    # The sidecar that a conversion wrote is taken rather than the shard read.
    splits.load_split(local, "tiny", "train")
    for path in (local / "tiny" / "1.0.0").glob("*" + INDEX_SUFFIX):
        files.copy(path, f"{remote}/tiny/1.0.0/{path.name}")
    for path in cache.iterdir():
        path.unlink()
    requests.clear()
    splits.load_split(remote, "tiny", "train")
    assert len([name for name, *_ in requests if name.endswith(INDEX_SUFFIX)]) == 3
    assert len(list(cache.iterdir())) == 3
    # Another data set at the same place.
    content = files.read(shard(remote, 2))
    files.write(shard(remote, 2), content[: len(content) // 2])
    with pytest.raises(DataError, match="00002-of-00003: is cut short: record"):
        splits.load_split(remote, "tiny", "train")


def test_damage_is_told_as_for_local_data(remote):
    split = splits.load_split(remote, "tiny", "train")
    content = bytearray(files.read(shard(remote, 0)))
    offset = int(split.source._offsets[5])
    content[offset + 30] ^= 16
    files.write(shard(remote, 0), bytes(content))
    with pytest.raises(DataError, match=f"{shard(remote, 0)}: record 5 at byte {offset} is corrupt"):
        split.record(5)
    files.write(shard(remote, 0), bytes(content[: offset + 20]))
    with pytest.raises(DataError, match=f"record 5 at byte {offset} is corrupt .the file ends"):
        split.record(5)
    files.remove(shard(remote, 0))
    with pytest.raises(DataError, match=r"cannot be read at byte .*No such file"):
        split.record(5)
    with pytest.raises(DataError, match=r"00000-of-00003: cannot be read .No such file"):
        splits.load_split(remote, "tiny", "train")


def test_labels_that_are_not_the_records_are_refused_and_both_indices_named(local, remote, cache):
    index = load_index(shard(local, 0))
    wrong = index | {"pid": np.full(20, 7, np.int32)}
    files.write(shard(remote, 0) + INDEX_SUFFIX, to_bytes(wrong))
    split = splits.load_split(remote, "tiny", "train")
    with pytest.raises(DataError, match=r"record 3 at byte .*: its pid is 1, in the index 7: remove mem") as error:
        split.record(3)
    named = str(error.value).partition(": remove ")[2].partition(" (it is made again)")[0].split(" and ")
    for place in named:
        files.remove(place)
    assert splits.load_split(remote, "tiny", "train").record(3).pid == 1


def test_missing_remote_data_say_how_to_convert_them(remote):
    command = f"python -m data_prep.convert --dataset=duke --source=PATH --data_dir={remote}"
    with pytest.raises(DataError, match="no data set duke in") as error:
        splits.load_split(remote, "duke", "train")
    assert command in str(error.value)
    with pytest.raises(DataError, match="there is no split 'query'"):
        splits.load_split(remote, "tiny", "query")
    info = f"{remote}/tiny/1.0.0/dataset_info.json"
    files.write(info, b"{")
    with pytest.raises(DataError, match="is damaged, or of another kind"):
        splits.load_split(remote, "tiny", "train")
    files.write(info, json.dumps({"fileFormat": "riegeli", "splits": []}).encode())
    with pytest.raises(DataError, match="'riegeli' files"):
        splits.load_split(remote, "tiny", "train")


def test_a_storage_that_fails_is_one_line(remote, monkeypatch):
    split = splits.load_split(remote, "tiny", "train")

    def broken(*_, **__):
        raise RuntimeError("the network\nis away")

    for name in ("cat_file", "ls"):
        monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, name, broken)
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    told = "8 requests in 0 s failed, the last by: the network is away: see that this machine reaches the storage"
    with pytest.raises(DataError, match=told) as error:
        split.record(0)
    assert str(error.value).startswith(shard(remote, 0))
    # Doubled up to a cap, each shortened by chance so that readers do not come back together.
    assert len(waits) == 7
    for number, wait in enumerate(waits):
        longest = min(15.0, 0.2 * 2**number)
        assert longest / 2 <= wait <= longest
    with pytest.raises(DataError, match=told):
        splits.load_split(remote, "tiny", "train")


class Distant:
    """A storage that takes its time, fails now and then, and counts how many ask at once."""

    def __init__(self, monkeypatch, seconds, failing=0.0):
        self.most = self.asking = self.failed = self.asked = 0
        lock, rng = threading.Lock(), random.Random(0)
        system = fsspec.implementations.memory.MemoryFileSystem
        original = system.cat_file

        def distant(fs, path, start=None, end=None, **options):
            with lock:
                self.asking, self.asked = self.asking + 1, self.asked + 1
                self.most = max(self.most, self.asking)
                fails = rng.random() < failing
                self.failed += fails
            time.sleep(seconds)
            with lock:
                self.asking -= 1
            if fails:
                raise ConnectionResetError("connection reset by peer")
            return original(fs, path, start=start, end=end, **options)

        monkeypatch.setattr(system, "cat_file", distant)


def test_records_of_a_batch_wait_for_a_distant_storage_together(local, remote, monkeypatch):
    here, there = (splits.load_split(root, "tiny", "train") for root in (local, remote))
    rows = [*range(30), *range(30)]
    storage = Distant(monkeypatch, seconds=0.03)
    since = time.perf_counter()
    found = there.read_many(rows)
    seconds = time.perf_counter() - since
    assert found == [here.record(row) for row in rows]
    assert storage.asked == 60
    assert 8 < storage.most <= files.REQUESTS
    # One after the other they take 1.8 s.
    assert seconds < 60 * 0.03 / 4
    assert splits.Subset(there, np.arange(5, 9)).read_many([1]) == [here.record(6)]
    assert there.filenames([3, 29]) == here.filenames([3, 29])


def test_requests_are_bounded_whoever_asks(remote, monkeypatch):
    monkeypatch.setattr(files, "REQUESTS", 4)
    monkeypatch.setattr(files, "_readers", functools.cache(files._readers.__wrapped__))
    there = splits.load_split(remote, "tiny", "train")
    storage = Distant(monkeypatch, seconds=0.01)
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda _: there.read_many(range(30)), range(6)))
    assert (storage.asked, storage.most) == (180, 4)


def test_requests_that_fail_now_and_then_do_not_end_an_epoch(local, remote, monkeypatch):
    here, there = (splits.load_split(root, "tiny", "train") for root in (local, remote))
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.001)
    storage = Distant(monkeypatch, seconds=0.0, failing=0.2)
    for _ in range(10):
        assert there.read_many(range(30)) == [here.record(row) for row in range(30)]
    assert storage.failed > 20
    assert storage.asked == 300 + storage.failed


def test_a_shard_without_an_index_is_read_again_where_it_fails(local, remote, monkeypatch):
    monkeypatch.setattr(files, "_FIRST_WAIT", 0.001)
    system, failures = fsspec.implementations.memory.MemoryFileSystem, [1, 1, 1]
    original = system.open

    def open_or_fail(fs, *arguments, **options):
        if failures:
            failures.pop()
            raise ConnectionResetError("connection reset by peer")
        return original(fs, *arguments, **options)

    monkeypatch.setattr(system, "open", open_or_fail)
    assert len(splits.load_split(remote, "tiny", "train")) == 30
    assert not failures


def test_what_is_not_there_is_not_asked_for_again(remote, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(FileNotFoundError):
        files.read(f"{remote}/nowhere")


def test_local_data_need_no_fsspec_and_remote_ones_say_so(local, remote, monkeypatch):
    code = """if True:
        import sys
        sys.modules["fsspec"] = None
        from dmosnet_jax.data.splits import load_split
        print(len(load_split(sys.argv[1], "tiny", "train")))
    """
    done = subprocess.run([sys.executable, "-c", code, str(local)], capture_output=True, check=True, text=True)
    assert done.stdout == "30\n"
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"dmosnet_jax\[remote\]"):
        splits.load_split("gs://bucket/data", "tiny", "train")
