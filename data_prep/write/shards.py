"""Conversion shard by shard: a plan lists the images of each shard, and finished shards survive an interruption.

A stage (a folder or URL, not yet a data set) holds

    plan.json             the fingerprint of the plan, and images and bytes of every shard
    plan/00000            the images of a shard
    dataset/<shard>       finished shards, each with its index
    done/00000            written last: the result of the shard

Nothing here needs TensorFlow or Beam, so that workers start fast and stay small.
"""

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from data_prep.sources import luperson
from data_prep.sources.base import reason
from data_prep.sources.luperson import Image, LeftOut, Source
from dmosnet_jax.core import files
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records, transforms
from dmosnet_jax.data import shards as reading
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.shards import frame

# Share of the images that may be unreadable.
MAX_UNREADABLE = 1e-3
DATASET = "dataset"
_PLAN, _PLANS, _DONE = "plan.json", "plan", "done"
# Images between two reports of the progress.
_REPORT = 512
_FORMAT = 1
# What a record holds besides the image and its name, with its framing.
_RECORD_BYTES = 110


class Skipped(NamedTuple):
    """An unreadable image: its reference in the source, and why."""

    ref: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of writing a shard: images and bytes written, and the images left out."""

    images: int
    skipped: list[Skipped]
    shard_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which images go into which shard.

    Attributes:
      dataset: its name; the split is `train`.
      kind: of the source, see `sources.luperson.Source`.
      root: of the source.
      names: `numbers` or `paths`, what file names are.
      images: in each shard.
      sizes: bytes of the images of each shard.
      videos: in the source.
      fingerprint: of everything that decides the content of the shards.
    """

    dataset: str
    kind: str
    root: str
    names: str
    images: list[int]
    sizes: list[int]
    videos: int
    fingerprint: str

    @property
    def total(self) -> int:
        """Images in the source."""
        return sum(self.images)

    @property
    def allowed(self) -> int:
        """How many of them may be unreadable."""
        return int(self.total * MAX_UNREADABLE)

    def shard_name(self, number: int) -> str:
        """File name of a shard."""
        return records.shard_name(self.dataset, records.TRAIN, number, len(self.images))


def make_plan(
    source: Source,
    dataset: str,
    shard_bytes: int,
    names: str = "auto",
    progress: Callable[[int], None] = lambda _: None,
    left_out: LeftOut | None = None,
) -> tuple[Plan, list[bytes]]:
    """Lists a source and cuts it into shards.

    Args:
      source: the images.
      dataset: name of the data set to write.
      shard_bytes: the most bytes of a shard; all but the last are filled up to one image.
      names: `numbers`, `paths`, or `auto`: numbers where the source has them, or has as many images as LUPerson.
      progress: called with the number of images found so far, now and then.
      left_out: counts what is no image.

    Returns:
      The plan, and the compressed list of images of each shard; equal sources give equal ones.

    Raises:
      DataError: the source holds no image, or something that LUPerson does not have.
    """
    parts: list[bytes] = []
    digest = hashlib.blake2b(digest_size=16)
    counts, sizes, videos, numbered, part, held = [], [], 0, True, list[Image](), 0

    def finish() -> None:
        content = json.dumps(part).encode()
        digest.update(content)
        parts.append(zlib.compress(content, 1))
        counts.append(len(part))
        sizes.append(sum(image.size for image in part))
        progress(sum(counts))
        part.clear()

    for image in source.images(left_out):
        size = image.size + len(image.ref.encode(errors="surrogateescape")) + _RECORD_BYTES
        if part and held + size > shard_bytes:
            finish()
            held = 0
        part.append(image)
        held += size
        videos, numbered = max(videos, image.video + 1), numbered and image.number is not None
    if not part:
        raise DataError(
            f"source {source.location} holds no image: give the folder with LUPerson's countries, of numbered images, "
            "or of its LMDB"
        )
    finish()
    names = "numbers" if use_numbers(source, sum(counts), numbered, names) else "paths"
    digest.update(json.dumps([_FORMAT, dataset, source.kind, shard_bytes, names]).encode())
    plan = Plan(dataset, source.kind, source.root, names, counts, sizes, videos, digest.hexdigest())
    return plan, parts


def use_numbers(source: Source, count: int, numbered: bool, names: str) -> bool:
    """Whether file names are LUPerson's numbers, for a `count` of images that are all `numbered` or not.

    Raises:
      DataError: `names` asks for them and they are not known.
    """
    if names == "numbers" and not numbered:
        raise DataError(
            f"source {source.location} lacks the level of the video, so LUPerson's numbers are not known: names=paths"
        )
    return numbered and (
        names == "numbers" or (names == "auto" and (source.kind != luperson.TREE or count == luperson.IMAGES))
    )


def remove_unfinished(stage: str) -> None:
    """Removes what killed processes have left of their shards; nobody else may be writing there."""
    for entry in _listed(files.join(stage, DATASET)):
        if entry.endswith(files.PART):
            files.remove(files.join(stage, DATASET, entry))


def install(stage: str, plan: Plan, parts: list[bytes]) -> dict[int, Result]:
    """Writes a plan to the stage, or resumes an equal one that is there.

    Returns:
      The results of the shards that are finished already.

    Raises:
      OSError: the stage cannot be written.
    """
    before = read_plan(stage)
    if before is None or before.fingerprint != plan.fingerprint:
        for name in (_PLAN, _DONE, _PLANS, DATASET):
            files.remove(files.join(stage, name))
    for number, part in enumerate(parts):
        # Those of an equal plan are there already, unless they are damaged.
        path = files.join(stage, _PLANS, f"{number:05d}")
        if not _holds(path, part):
            files.write(path, part)
    # The source may have moved.
    files.write(files.join(stage, _PLAN), json.dumps(dataclasses.asdict(plan)).encode())
    remove_unfinished(stage)
    finished = {}
    for number, result in results(stage).items():
        if _is_whole(stage, plan, number, result):
            finished[number] = result
        else:
            files.remove(files.join(stage, _DONE, f"{number:05d}"))
    return finished


def read_plan(stage: str) -> Plan | None:
    """The plan on a stage, None where there is none."""
    try:
        return Plan(**json.loads(files.read(files.join(stage, _PLAN))))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def results(stage: str) -> dict[int, Result]:
    """The results of the finished shards, by their numbers."""
    found = {}
    for name in _listed(files.join(stage, _DONE)):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                value = json.loads(files.read(files.join(stage, _DONE, name)))
                value["skipped"] = [Skipped(*entry) for entry in value["skipped"]]
                found[int(name)] = Result(**value)
    return found


def write_shard(stage: str, number: int, progress: Callable[[int], None] = lambda _: None) -> Result:
    """Writes one shard, its index and its result; an equal call writes equal files.

    `progress` is called now and then with the number of images done since the last call, and may raise.

    Returns:
      Its result; with more unreadable images than allowed it is given up, and the next run starts it again.

    Raises:
      DataError: the stage cannot be written, or a source cannot be opened any more.
    """
    plan = read_plan(stage)
    if plan is None:
        raise DataError(f"{stage} has no plan any more: run the same command again")
    try:
        result = _write(stage, plan, number, progress)
        path = files.join(stage, _DONE, f"{number:05d}")
        files.write(path, json.dumps(dataclasses.asdict(result)).encode())
    except OSError as error:
        raise DataError(f"cannot write to {stage} ({reason(error)}): free space, or give another data_dir") from error
    return result


def _write(stage: str, plan: Plan, number: int, progress: Callable[[int], None]) -> Result:
    images = [Image(*entry) for entry in json.loads(zlib.decompress(_part(stage, number)))]
    read = luperson.reader(plan.kind, plan.root)
    path = files.join(stage, DATASET, plan.shard_name(number))
    skipped: list[Skipped] = []
    with files.create(path) as file:
        shard = _Shard(file.write)
        for row, image in enumerate(images, 1):
            name = image.ref if plan.names == "paths" or image.number is None else image.number
            try:
                data = read(image.ref)
                transforms.decode(data)
                name.encode()
            except (DataError, UnicodeEncodeError) as error:
                why = str(error) if isinstance(error, DataError) else "its name is not UTF-8 text"
                skipped.append(Skipped(image.ref, why))
                if len(skipped) > plan.allowed:
                    return Result(shard.count, skipped, shard.size)
            else:
                shard.add(Record(data, -1, image.video, name))
            if row % _REPORT == 0 or row == len(images):
                progress(row - (row - 1) // _REPORT * _REPORT)
    files.write(path + reading.INDEX_SUFFIX, reading.to_bytes(shard.index()))
    return Result(shard.count, skipped, shard.size)


def _holds(path: str, content: bytes) -> bool:
    try:
        return files.size(path) == len(content) and files.read(path) == content
    except OSError:
        return False


def _part(stage: str, number: int) -> bytes:
    return files.read(files.join(stage, _PLANS, f"{number:05d}"))


class _Shard:
    """Writes records and collects their index."""

    def __init__(self, write: Callable[[bytes], Any]):
        self._write = write
        self._rows: list[tuple[int, int, int, int]] = []
        self._head = self._tail = b""
        self.size = 0

    @property
    def count(self) -> int:
        return len(self._rows)

    def add(self, record: Record) -> None:
        data = records.serialise(record)
        raw = frame(data)
        self._write(raw)
        self._rows.append((self.size, len(data), record.pid, record.camid))
        self.size += len(raw)
        if len(self._head) < reading.ENDS:
            self._head = (self._head + raw)[: reading.ENDS]
        self._tail = raw[-reading.ENDS :] if len(raw) >= reading.ENDS else (self._tail + raw)[-reading.ENDS :]

    def index(self) -> reading.Index:
        return reading.make_index(self._rows, self.size, reading.checksum_of_ends(self._head, self._tail))


def _is_whole(stage: str, plan: Plan, number: int, result: Result) -> bool:
    """Whether a finished shard and its index are there, and the shard has its length."""
    path = files.join(stage, DATASET, plan.shard_name(number))
    try:
        if len(result.skipped) > plan.allowed:
            return False
        return files.size(path) == result.shard_bytes and files.is_file(path + reading.INDEX_SUFFIX)
    except OSError:
        return False


def _listed(folder: str) -> list[str]:
    try:
        return [entry.name for entry in files.entries(folder)]
    except FileNotFoundError:
        return []
