import contextlib
import dataclasses
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import pipeline, samplers, transforms
from dmosnet_jax.data.loading import ImageCache
from dmosnet_jax.data.splits import Rows

SIZE = (16, 8)


@dataclasses.dataclass(frozen=True)
class Record:
    image: bytes
    pid: int
    camid: int
    filename: str


class MemorySplit:
    """What the pipeline needs of a split, with encoded images in memory; counts its reads."""

    name, location, read_many = "market1501", "", Rows.read_many

    def __init__(self, images, pids, camids):
        self.source, self.pids, self.camids = images, pids, camids
        self.reads = 0

    def __len__(self):
        return len(self.source)

    def record(self, index):
        self.reads += 1
        return Record(self.source[index], int(self.pids[index]), int(self.camids[index]), f"train/{index:04d}.jpg")


def make_split(count=40):
    rng = np.random.default_rng(count)
    images = []
    for _ in range(count):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(stream, "JPEG")
        images.append(stream.getvalue())
    return MemorySplit(images, (np.arange(count) // 4).astype(np.int32), (np.arange(count) % 3).astype(np.int32))


@pytest.fixture
def split():
    return make_split()


def expected_batch(split, rows):
    return {
        "image": np.stack([transforms.load(split.source[i], SIZE) for i in rows]),
        "pid": split.pids[rows],
        "camid": split.camids[rows],
        "index": rows,
        "mask": np.ones(len(rows), bool),
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def open_stream(*args, **options):
    return contextlib.closing(pipeline.train_batches(*args, **options))


def plan_for(split, steps=9, batch_size=8, seed=0):
    return samplers.class_epoch(
        split.pids, split.camids, batch_size=batch_size, instances=4, seed=seed, epoch=0, steps=steps
    )


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_stream_gives_the_planned_batches_in_order(split, threads):
    plan = plan_for(split)
    with open_stream(split, plan, image_size=SIZE, threads=threads) as stream:
        batches = list(stream)
    assert len(batches) == 9
    for batch, rows in zip(batches, plan, strict=True):
        assert_same(batch, expected_batch(split, rows))


def test_labels_replace_identities(split):
    labels = np.arange(40)[::-1] - 5
    plan = plan_for(split, steps=2)
    with open_stream(split, plan, image_size=SIZE, labels=labels) as stream:
        batch = next(stream)
    assert batch["pid"].dtype == np.int32
    np.testing.assert_array_equal(batch["pid"], labels[plan[0]])


@pytest.mark.parametrize("threads", [0, 2])
def test_resumed_stream_equals_an_uninterrupted_one(split, threads):
    plan = plan_for(split)
    with open_stream(split, plan, image_size=SIZE, threads=2) as stream:
        whole = list(stream)
    for stop in (0, 1, 5, 9):
        with open_stream(split, plan, image_size=SIZE, start=np.int64(stop), threads=threads) as resumed:
            rest = list(resumed)
        assert len(rest) == 9 - stop
        for batch, reference in zip(rest, whole[stop:], strict=True):
            assert_same(batch, reference)


def test_processes_share_each_global_batch(split):
    plan = plan_for(split, steps=3)
    parts = []
    for index in range(4):
        with open_stream(split, plan, image_size=SIZE, process_index=index, process_count=4) as stream:
            parts.append(list(stream))
    for step, rows in enumerate(plan):
        joined = {name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][0]}
        assert_same(joined, expected_batch(split, rows))


@pytest.mark.parametrize("batch_size", [8, 16, 40, 64])
@pytest.mark.parametrize("processes", [1, 4])
def test_evaluation_gives_every_image_once_in_order(batch_size, processes):
    split = make_split(37)
    options = {"image_size": SIZE, "batch_size": batch_size, "process_count": processes}
    parts = [list(pipeline.evaluation_batches(split, process_index=i, **options)) for i in range(processes)]
    steps = -(-37 // batch_size)
    assert [len(part) for part in parts] == [steps] * processes
    seen = []
    for step in range(steps):
        batch = {name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][0]}
        assert batch["image"].shape == (batch_size, *SIZE, 3)
        real = batch["mask"]
        seen.extend(batch["index"][real])
        assert_same({name: value[real] for name, value in batch.items()}, expected_batch(split, batch["index"][real]))
        for name in ("pid", "camid", "index"):
            assert np.all(batch[name][~real] == -1)
        assert not batch["image"][~real].any()
    assert seen == list(range(37))
    assert split.reads == 37


def test_evaluation_of_nothing_is_empty():
    empty = MemorySplit([], np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert list(pipeline.evaluation_batches(empty, image_size=SIZE, batch_size=8)) == []


def test_cache_reads_each_image_once_and_changes_nothing(split):
    plan = plan_for(split, steps=30)
    cache = ImageCache.within(split, SIZE, 40 * 16 * 8 * 3)
    for _ in range(2):
        with open_stream(split, plan, image_size=SIZE, threads=1, cache=cache) as stream:
            for batch, rows in zip(stream, plan, strict=True):
                assert_same(batch, expected_batch(split, rows))
    np.testing.assert_array_equal(np.flatnonzero(cache.filled), np.unique(plan))
    assert split.reads == len(np.unique(plan))
    list(pipeline.evaluation_batches(split, image_size=SIZE, batch_size=16, threads=3, cache=cache))
    assert split.reads == 40


def test_cache_only_within_its_budget(split):
    assert ImageCache.within(split, SIZE, 40 * 16 * 8 * 3 - 1) is None
    with pytest.raises(ConfigError, match=r"data.workers=2 cannot share an image cache"):
        pipeline.train_batches(split, plan_for(split), image_size=SIZE, workers=2, cache=ImageCache(40, SIZE))
    with pytest.raises(ValueError, match="the cache holds"):
        pipeline.train_batches(split, plan_for(split), image_size=(8, 8), cache=ImageCache(40, SIZE))


def test_batches_do_not_share_memory_with_the_cache(split):
    cache = ImageCache(40, SIZE)
    plan = np.arange(8, dtype=np.int32)[None].repeat(2, axis=0)
    with open_stream(split, plan, image_size=SIZE, threads=0, cache=cache) as stream:
        next(stream)["image"][:] = 0
        assert_same(next(stream), expected_batch(split, plan[0]))


@pytest.mark.parametrize("threads", [0, 2])
def test_damaged_image_is_named_in_one_line(split, threads):
    split.source[17] = split.source[17][:200]
    plan = np.arange(40, dtype=np.int32).reshape(5, 8)
    with open_stream(split, plan, image_size=SIZE, threads=threads) as stream:
        assert_same(next(stream), expected_batch(split, plan[0]))
        next(stream)
        with pytest.raises(DataError, match=r"market1501 image 17 \(train/0017.jpg\): damaged image") as caught:
            next(stream)
        assert "\n" not in str(caught.value)
    batches = pipeline.evaluation_batches(split, image_size=SIZE, batch_size=32, threads=threads)
    with pytest.raises(DataError, match=r"train/0017.jpg"):
        next(batches)


def test_error_of_the_source_arrives_as_it_was_raised(split):
    message = "market1501-train.tfrecord-00000-of-00001: record 3 at byte 912 is corrupt; convert again"

    def broken(index):
        raise DataError(message)

    split.record = broken
    with (
        open_stream(split, plan_for(split), image_size=SIZE) as stream,
        pytest.raises(DataError) as caught,
    ):
        next(stream)
    assert str(caught.value) == message


def test_defects_keep_their_own_type(split):
    split.record = lambda index: 1 // 0
    with (
        open_stream(split, plan_for(split), image_size=SIZE) as stream,
        pytest.raises(ZeroDivisionError),
    ):
        next(stream)


def decoding_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def wait_until(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_no_threads_are_left_behind(split):
    assert wait_until(lambda: not decoding_threads())
    with open_stream(split, plan_for(split), image_size=SIZE, threads=3) as stream:
        next(stream)
        assert decoding_threads()
    assert wait_until(lambda: not decoding_threads())
    batches = pipeline.evaluation_batches(split, image_size=SIZE, batch_size=4, threads=3)
    next(batches)
    assert decoding_threads()
    batches.close()
    assert wait_until(lambda: not decoding_threads())


def test_prefetching_is_bounded(split):
    plan = np.zeros((200, 4), np.int32)
    with open_stream(split, plan, image_size=SIZE, threads=2) as stream:
        next(stream)
        time.sleep(0.3)
        # One batch given, four more made ahead at most, and one being handed over.
        assert split.reads <= 6 * 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": -1}, ConfigError, "data.threads=-1"),
        ({"workers": -2}, ConfigError, "data.workers=-2"),
        ({"start": 10}, ConfigError, "start=10 is outside the plan's 0..9"),
        ({"image_size": (0, 8)}, ConfigError, "image_size="),
        ({"process_count": 3}, ConfigError, "batch_size=8 is not a multiple of the 3 processes: use 6"),
        ({"process_index": 2, "process_count": 2}, ConfigError, "process_index=2"),
        ({"labels": np.zeros(39, int)}, ValueError, "labels"),
    ],
)
def test_impossible_options_are_refused_at_once(split, options, error, message):
    with pytest.raises(error, match=message):
        pipeline.train_batches(split, plan_for(split), **{"image_size": SIZE, **options})


@pytest.mark.parametrize("row", [-1, 40])
def test_plan_of_another_split_is_refused(split, row):
    with pytest.raises(ValueError, match="outside the split's 40 images"):
        pipeline.train_batches(split, np.full((2, 8), row), image_size=SIZE)
