"""Conversion shard by shard: a plan says what goes where, each shard is written alone, and what is finished stays.

A stage (a folder or URL, not yet a data set) holds

    plan.json             the fingerprint of the plan, and images and bytes of every shard
    plan/00000            the images of a shard
    dataset/<shard>       finished shards, each with its index
    done/00000            written last: what came of the shard
    failed/00000          why a shard was given up
    stop                  there when nobody waits for the rest any more

Nothing here needs TensorFlow or Beam, so that workers start fast and stay small.
"""

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from data_prep import luperson_source
from data_prep.luperson_source import Image, Source
from dmosnet_jax.core import files as places
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records, transforms
from dmosnet_jax.data import shards as indices
from dmosnet_jax.data.records import Record
from dmosnet_jax.data.shards import frame

# Share of the images that may be unreadable.
MAX_UNREADABLE = 1e-3
DATASET = "dataset"
_PLAN, _PLANS, _DONE, _FAILED, _STOP = "plan.json", "plan", "done", "failed", "stop"
# Images between two looks whether to stop.
_LOOK = 512
_FORMAT = 1
# What a record holds besides the image and its name, with its framing.
_RECORD_BYTES = 110


class Skipped(NamedTuple):
    """An unreadable image: its reference in the source, and why."""

    ref: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a shard; `error` is why it was given up, None where it was written."""

    images: int
    skipped: list[Skipped]
    shard_bytes: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which images go into which shard.

    Attributes:
      dataset: its name; the split is `train`.
      kind: and `root`: of the source, see `luperson_source.reader`.
      root: see there.
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
) -> tuple[Plan, list[bytes]]:
    """Lists a source and cuts it into shards.

    Args:
      source: what is listed.
      dataset: name of the data set to write.
      shard_bytes: a shard has no more than so many bytes, and no less where another follows it, up to one image.
      names: `numbers`, `paths`, or `auto`: numbers where the source has them, or has as many images as LUPerson.
      progress: called with the number of images found so far, now and then.

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

    for image in source.images():
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
    if names == "auto":
        known = source.kind != "tree" or sum(counts) == luperson_source.IMAGES
        names = "numbers" if known and numbered else "paths"
    elif names == "numbers" and not numbered:
        raise DataError(
            f"source {source.location} lacks the level of the video, so LUPerson's numbers are not known: names=paths"
        )
    digest.update(json.dumps([_FORMAT, dataset, source.kind, shard_bytes, names]).encode())
    plan = Plan(dataset, source.kind, source.root, names, counts, sizes, videos, digest.hexdigest())
    return plan, parts


def install(stage: str, plan: Plan, parts: list[bytes]) -> set[int]:
    """Puts a plan on the stage, or goes on where an equal one stopped.

    Returns:
      The shards that are finished already.

    Raises:
      OSError: the stage cannot be written.
    """
    places.remove(places.join(stage, _STOP))
    before = read_plan(stage)
    if before is None or before.fingerprint != plan.fingerprint:
        for name in (_PLAN, _DONE, _FAILED, _PLANS, DATASET):
            places.remove(places.join(stage, name))
        for number, part in enumerate(parts):
            places.write(places.join(stage, _PLANS, f"{number:05d}"), part)
        finished: set[int] = set()
    else:
        places.remove(places.join(stage, _FAILED))
        finished = {number for number, result in results(stage).items() if _is_whole(stage, plan, number, result)}
        for entry in _listed(places.join(stage, DATASET)):
            # Left by a process that was killed.
            if entry.endswith(places.PART):
                places.remove(places.join(stage, DATASET, entry))
    # The source may have moved.
    places.write(places.join(stage, _PLAN), json.dumps(dataclasses.asdict(plan)).encode())
    for number in results(stage).keys() - finished:
        places.remove(places.join(stage, _DONE, f"{number:05d}"))
    return finished


def read_plan(stage: str) -> Plan | None:
    """The plan on a stage, None where there is none."""
    try:
        return Plan(**json.loads(places.read(places.join(stage, _PLAN))))
    except (OSError, ValueError, TypeError):
        return None


def results(stage: str, *, known: dict[int, Result] | None = None) -> dict[int, Result]:
    """What came of the shards so far, failed ones included; those of `known` are not read again."""
    found = dict(known or {})
    for folder in (_DONE, _FAILED):
        for name in _listed(places.join(stage, folder)):
            if name.isdigit() and int(name) not in found:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    value = json.loads(places.read(places.join(stage, folder, name)))
                    value["skipped"] = [Skipped(*entry) for entry in value["skipped"]]
                    found[int(name)] = Result(**value)
    return found


def stop(stage: str) -> None:
    """Tells workers, wherever they are, that their shards are not wanted any more."""
    with contextlib.suppress(OSError):
        places.write(places.join(stage, _STOP), b"")


class _StoppedError(BaseException):
    """Nobody waits for this shard; no failure, which storages would tell as one of theirs."""


def write_shard(stage: str, number: int) -> None:
    """Writes one shard, its index and its result; an equal call writes equal files.

    Whatever goes wrong with the images or the storage becomes the result; only a result that cannot be written raises.
    """
    plan = read_plan(stage)
    if plan is None:
        raise OSError(f"{stage} has no plan any more")
    try:
        result = _write(stage, plan, number)
    except _StoppedError:
        return
    except DataError as error:
        result = Result(0, [], error=str(error))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        result = Result(0, [], error=f"cannot write to {stage} ({reason}): free space, or give another data_dir")
    folder = _DONE if result.error is None else _FAILED
    places.write(places.join(stage, folder, f"{number:05d}"), json.dumps(dataclasses.asdict(result)).encode())


def _write(stage: str, plan: Plan, number: int) -> Result:
    images = (Image(*entry) for entry in json.loads(zlib.decompress(_part(stage, number))))
    read = luperson_source.reader(plan.kind, plan.root)
    path = places.join(stage, DATASET, plan.shard_name(number))
    skipped: list[Skipped] = []
    with places.create(path) as file:
        shard = _Shard(file.write)
        for row, image in enumerate(images):
            if row % _LOOK == 0 and places.is_file(places.join(stage, _STOP)):
                raise _StoppedError
            name = image.ref if plan.names == "paths" or image.number is None else image.number
            try:
                data = read(image.ref)
                transforms.decode(data)
                name.encode()
            except (DataError, UnicodeEncodeError) as error:
                why = str(error) if isinstance(error, DataError) else "its name is not UTF-8 text"
                skipped.append(Skipped(image.ref, why))
                if len(skipped) > plan.allowed:
                    return Result(shard.count, skipped, error="too many")
                continue
            shard.add(Record(data, -1, image.video, name))
    places.write(path + indices.INDEX_SUFFIX, indices.to_bytes(shard.index()))
    return Result(shard.count, skipped, shard.size)


def _part(stage: str, number: int) -> bytes:
    return places.read(places.join(stage, _PLANS, f"{number:05d}"))


class _Shard:
    """Writes records and remembers what the index needs."""

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
        if len(self._head) < indices.ENDS:
            self._head = (self._head + raw)[: indices.ENDS]
        self._tail = raw[-indices.ENDS :] if len(raw) >= indices.ENDS else (self._tail + raw)[-indices.ENDS :]

    def index(self) -> indices.Index:
        return indices.make_index(self._rows, self.size, indices.checksum_of_ends(self._head, self._tail))


def _is_whole(stage: str, plan: Plan, number: int, result: Result) -> bool:
    """Whether a finished shard is there, with its index, as long as it was."""
    path = places.join(stage, DATASET, plan.shard_name(number))
    try:
        return (
            result.error is None
            and places.size(path) == result.shard_bytes
            and places.is_file(path + indices.INDEX_SUFFIX)
        )
    except OSError:
        return False


def _listed(folder: str) -> list[str]:
    try:
        return [entry.name for entry in places.entries(folder)]
    except FileNotFoundError:
        return []
