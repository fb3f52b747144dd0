"""Damages files of every kind that users bring, and watches what becomes of them.

    python -m tests.fuzz --count=1000
    python -m tests.fuzz --count=200 --kinds=torch,lmdb --first=1000

Each damaged file must be read, or be refused by one bounded line of ours: no other error, no crash of the process, no
code of the file run, less than 300 MB of memory, nothing left behind. A kind runs in a process of its own, which is
started again behind a file that ends it. The exit status is 1 where one did not behave; `--first=NUMBER --count=1`
makes it again.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEMORY = 300_000_000
_LONGEST_MESSAGE = 6_000
# Files whose sound form is refused.
_HOSTILE = {"hostile.pth", "beside.pth", "c.pkl"}
# What counters, sizes and offsets in headers are damaged to.
_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)

# Makes a folder with sound files, and gives the files to damage and the function that reads the folder.
Case = tuple[list[pathlib.Path], Callable[[], Any]]


def mutate(rng: np.random.Generator, base: bytes) -> bytes:
    """A damaged copy: cut, flipped bits, parts removed, inserted or repeated, numbers overwritten."""
    data = bytearray(base)
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        at = int(rng.integers(len(data) + 1))
        match int(rng.choice([0, 1, 1, 1, 2, 3, 4, 5, 5, 6])):
            case 0:
                del data[at:]
            case 1:
                for place in rng.integers(max(len(data), 1), size=int(rng.choice([1, 1, 2, 8]))):
                    if place < len(data):
                        data[place] ^= 1 << int(rng.integers(8))
            case 2:
                del data[at : at + int(rng.integers(1, 40))]
            case 3:
                data[at:at] = rng.bytes(int(rng.integers(1, 40)))
            case 4:
                start = int(rng.integers(len(data) + 1))
                data[at:at] = data[start : start + int(rng.integers(1, 200))]
            case 5:
                width = int(rng.choice([1, 2, 4, 8]))
                value = _NUMBERS[int(rng.integers(len(_NUMBERS)))] % (1 << 8 * width)
                order = "little" if rng.integers(2) else "big"
                data[at : at + width] = value.to_bytes(width, order)
            case 6:
                data[at : at + int(rng.integers(1, 600))] = bytes(int(rng.integers(1, 600)))
    return bytes(data)


class _Payload:
    """Runs where a pickle is executed."""

    def __init__(self, marker: pathlib.Path):
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self._marker}",)


def _torch(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from safetensors.numpy import save_file

    from dmosnet_jax.export.weights import open_weights
    from tests.export.conftest import Writer, small_state

    weights = small_state()
    body, storages = Writer.state(weights)
    hostile = pickle.dumps({"state_dict": {"conv1.conv.weight": _Payload(marker)}}, protocol=2)
    beside = Writer.mapping({"state_dict": body, "hook": Writer.call(Writer.name("posix", "system"), Writer.text("x"))})
    contents = {
        "zip.pth": Writer.zipped(body, storages),
        "legacy.pth": Writer.legacy(body, storages),
        "hostile.pth": hostile,
        "beside.pth": Writer.zipped(beside, storages),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    save_file(weights, folder / "w.safetensors")
    for path in sorted(folder.iterdir()):
        yield [path], lambda path=path: open_weights(path)
    # Behind the checksums of the zip.
    (folder / "body").write_bytes(body)

    def read_body() -> None:
        (folder / "zip.pth").write_bytes(Writer.zipped((folder / "body").read_bytes(), storages))
        open_weights(folder / "zip.pth")

    yield [folder / "body"], read_body
    yield [folder / "body"], read_body


def _photo(rng: np.random.Generator) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 12, 3), dtype=np.uint8)).save(out, "jpeg")
    return out.getvalue()


def _dataset(folder: pathlib.Path) -> pathlib.Path:
    from tests.conftest import write_tiny

    rng = np.random.default_rng(0)
    return write_tiny(folder, ids=2, images=2, splits=("train",), picture=lambda *_: _photo(rng))


def _read_dataset(folder: pathlib.Path) -> None:
    from dmosnet_jax.data import transforms
    from dmosnet_jax.data.splits import load_split

    split = load_split(folder, "tiny", "train")
    for row in range(len(split)):
        record = split.record(row)
        assert (record.pid, record.camid) == (split.pids[row], split.camids[row])
        transforms.decode(record.image)


def _records(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from dmosnet_jax.data.shards import RecordSource, frame

    place = _dataset(folder)
    for with_index in (False, True):
        if with_index:
            _read_dataset(folder)
        shards = sorted(path for path in place.glob("*.tfrecord-*") if not path.name.endswith(".npz"))
        yield shards, lambda: _read_dataset(folder)
    # Behind the checksums of the records.
    [first, *_] = shards
    rows = RecordSource([first])
    (folder / "record").write_bytes(rows[0])
    rest = [rows[row] for row in range(1, len(rows))]

    def read_record() -> None:
        first.write_bytes(b"".join(map(frame, [(folder / "record").read_bytes(), *rest])))
        _read_dataset(folder)

    yield [folder / "record"], read_record
    yield [folder / "record"], read_record


def _sidecars(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from dmosnet_jax.data import rankings
    from dmosnet_jax.data.splits import load_split
    from dmosnet_jax.recipes.chunks import Chunks
    from dmosnet_jax.train import checksums
    from dmosnet_jax.train.metrics import read_rows

    place = _dataset(folder)
    _read_dataset(folder)
    yield sorted(place.glob("*.index.npz")), lambda: _read_dataset(folder)
    yield [place / "dataset_info.json"], lambda: _read_dataset(folder)
    split = load_split(folder, "tiny", "train")
    run = folder / "run"
    run.mkdir()
    about = {"chunk_images": 3, "dataset": "tiny", "weights": {"path": "x", "sum": "y"}}
    chunks = Chunks(run, split, about)
    chunks.write(0, np.ones(3, np.float32), ["a", "b", "c"])
    yield [run / "run.json"], lambda: Chunks(run, split, about)
    yield [run / "chunks" / "000000.npz"], lambda: Chunks(run, split, about).missing()
    with (run / "scores.npz").open("wb") as file:
        rankings.write_scores(file, np.arange(len(split), dtype=np.float32), split)
    yield [run / "scores.npz"], lambda: rankings.read_ranking(run / "scores.npz", split)
    np.save(run / "names.npy", np.array(["a.jpg", "b.jpg"] * 20))
    yield [run / "names.npy"], lambda: rankings.read_ranking(run / "names.npy", split)
    names = {"a.txt": b"a.jpg\nb.jpg\n" * 20, "b.pkl": pickle.dumps(["a.jpg", ("b.jpg", 0.5)] * 20)}
    names["c.pkl"] = pickle.dumps({"names": [_Payload(marker)]})
    rankings.write_names(run / "d.txt.gz", ["a.jpg"] * 50, compress=True)
    for name, content in names.items():
        (run / name).write_bytes(content)
    for name in (*names, "d.txt.gz"):
        yield [run / name], lambda name=name: rankings.read_ranking(run / name, split)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(20)))
    yield [run / "metrics.jsonl"], lambda: read_rows(run / "metrics.jsonl")
    (run / "step" / "model").mkdir(parents=True)
    (run / "step" / "model" / "a").write_bytes(b"content" * 30)
    checksums.write(run / "step", ["model"])
    yield (
        [run / "step" / "checksums.json", run / "step" / "model" / "a"],
        lambda: checksums.verify(run / "step", ["model"]),
    )


def _exported(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    import jax

    from dmosnet_jax import models
    from dmosnet_jax.export import folder as exported
    from dmosnet_jax.export.weights import open_weights
    from tests.models.drawn import draw_tree

    model = models.build("osnet_x0_25", image_size=(64, 32))
    rng = np.random.default_rng(0)
    params, stats = (draw_tree(tree, rng) for tree in model.shapes())
    exported.save(folder / "net", params, stats, exported.Card(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)))
    sound = jax.tree.leaves((params, stats))

    def read() -> None:
        found = open_weights(folder / "net")
        assert (found.mean, found.interpolation) == ((0.5, 0.4, 0.3), "bicubic")
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found.trees), sound, strict=True))

    # The card is what a hand can reach; of the weights any damage is one.
    for name in ("config.json", "config.json", "config.json", "model.safetensors"):
        yield [folder / "net" / name], read


def _zips(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from data_prep.builders import base
    from data_prep.builders.market1501 import Market1501

    rng = np.random.default_rng(0)
    names = ["bounding_box_train/0002_c1s1_000451_03.jpg", "query/0003_c1s6_015971_00.jpg"]
    names += ["bounding_box_test/0003_c3s3_064744_00.jpg", "bounding_box_test/-1_c1s1_000401_03.jpg", "readme.txt"]

    def read(path: pathlib.Path) -> None:
        files, listing = Market1501.read_source(path)
        base.check_listing(files, listing)
        base.check_images(files, listing)

    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = folder / f"{compression}.zip"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name in names:
                archive.writestr(name, _photo(rng))
        yield [path], lambda path=path: read(path)


def _mat(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from data_prep.builders import cuhk03
    from data_prep.synthetic.pedestrians import Scene
    from tests.data_prep import raw_copies

    scene = Scene(train_ids=2, test_ids=2, cameras=2, images=2, image_size=(16, 16))
    raw_copies.write("cuhk03_detected", folder / "raw", scene)

    def read() -> None:
        files, listing = cuhk03.read_source(folder / "raw", "detected")
        for items in listing.splits.values():
            for item in items:
                files.read(item.filename)

    for pattern in ("cuhk-03.mat", "cuhk03_new_protocol_config_detected.mat"):
        yield list((folder / "raw").rglob(pattern)), read


def _lmdb(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from data_prep.sources import luperson
    from data_prep.synthetic.pedestrians import Scene
    from tests.data_prep import raw_copies

    raw_copies.write("luperson", folder / "raw", Scene(3, 2, 2, 2, image_size=(16, 16)), form="lmdb")
    keys = list((folder / "raw").rglob("keys.pkl"))
    data = list((folder / "raw").rglob("data.mdb"))

    def read() -> None:
        from dmosnet_jax.core.errors import DataError

        source = luperson.find(data[0])
        images = list(source.images())
        reader = luperson.reader(source.kind, source.root)
        for image in images:
            # Single unreadable images are counted by the conversion.
            with contextlib.suppress(DataError):
                reader(image.ref)

    yield data, read
    yield keys, read
    yield data, read
    keys[0].rename(folder / "aside.pkl")
    yield data, read


def _csv(folder: pathlib.Path, marker: pathlib.Path) -> Iterator[Case]:
    from data_prep.builders.folder import Folder

    rows = [f"{split}/{i}.jpg,{pid},{i % 2},{split}" for i, (split, pid) in enumerate(_ROWS)]
    for row in rows:
        path = folder / row.split(",")[0]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    for name, text in (("a.csv", "\n".join(["path,pid,camid,split", *rows])), ("b.csv", _QUOTED)):
        (folder / name).write_text(text, encoding="utf-8")
        for policy in ("given", "none"):
            yield (
                [folder / name],
                lambda name=name, policy=policy: Folder.read_source(folder / name, camera_policy=policy),
            )


_ROWS = [("train", 1), ("train", -1), ("train", 2), ("query", 3), ("gallery", 3), ("gallery", 4)]
_QUOTED = '\ufeffpid, path ,camid,more\n1.0,"train/0.jpg",4,\n-1.0,train/1.jpg,5,x\n"bob",query/3.jpg,5,"x\ny"\n'

KINDS: dict[str, Callable[[pathlib.Path, pathlib.Path], Iterator[Case]]] = {
    "torch": _torch,
    "records": _records,
    "sidecars": _sidecars,
    "exported": _exported,
    "zips": _zips,
    "mat": _mat,
    "lmdb": _lmdb,
    "csv": _csv,
}


def _memory() -> int:
    """Most bytes of memory since the last call of `_forget`."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _forget() -> None:
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _listing(folder: pathlib.Path) -> set[str]:
    # Indices are made again where they are damaged.
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.name.endswith((".index.npz", "-lock"))}


def _attempt(number: int, kind: str, cases: list[Case], place: pathlib.Path, marker: pathlib.Path) -> tuple[str, str]:
    """Damages one file, reads, and puts the file back: the outcome, and what was wrong."""
    from dmosnet_jax.core.errors import UserError, one_line

    rng = np.random.default_rng((number, *kind.encode()))
    paths, read = cases[number % len(cases)]
    path = paths[int(rng.integers(len(paths)))]
    sound = {other: other.read_bytes() for other in place.rglob("*") if other.is_file()}
    outcome, problem = "accepted", ""
    path.write_bytes(mutate(rng, sound[path]))
    before = _listing(place)
    _forget()
    start = _memory()
    try:
        read()
    except UserError as error:
        outcome = "refused"
        text = one_line(error)
        if "\n" in str(error) or len(text) > _LONGEST_MESSAGE or not text:
            problem = f"message: {text[:300]}"
    except Exception as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    used = _memory() - start
    if used > MEMORY:
        problem = problem or f"took {used:,} bytes"
    if marker.exists():
        problem = "code of the file was run"
        marker.unlink()
    left = _listing(place) - before
    if left:
        problem = problem or f"left {sorted(left)}"
    for other in {p for p in place.rglob("*") if p.is_file()} - sound.keys():
        other.unlink()
    for other, content in sound.items():
        other.write_bytes(content)
    return (problem and "wrong") or outcome, problem or str(used)


def work(kind: str, first: int, count: int, report: pathlib.Path) -> None:
    """Runs attempts of a kind in this process; each is noted before it begins and when it is over."""
    warnings.simplefilter("ignore")
    # Crashes are looked for, and not wanted on the terminal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as scratch, report.open("a", buffering=1) as notes:
        marker = pathlib.Path(scratch, "ran")
        cases: list[tuple[Case, pathlib.Path]] = []
        for number in range(_count_cases(kind, pathlib.Path(scratch, "probe"), marker)):
            # A folder for each case: some generators change theirs from one case to the next.
            place = pathlib.Path(scratch, str(number))
            place.mkdir()
            made = KINDS[kind](place, marker)
            for _ in range(number):
                next(made)
            case = next(made)
            if not _HOSTILE & {path.name for path in case[0]}:
                case[1]()
            cases.append((case, place))
        for number in range(first, first + count):
            notes.write(f"{number} begin\n")
            case, place = cases[number % len(cases)]
            outcome, text = _attempt(number, kind, [case], place, marker)
            notes.write(f"{number} {outcome} {text}\n")


def _count_cases(kind: str, place: pathlib.Path, marker: pathlib.Path) -> int:
    place.mkdir()
    count = sum(1 for _ in KINDS[kind](place, marker))
    shutil.rmtree(place)
    return count


def run(kind: str, first: int, count: int) -> tuple[collections.Counter[str], int, list[str]]:
    """Outcomes of a kind, the most memory of an attempt, and what was wrong."""
    outcomes: collections.Counter[str] = collections.Counter()
    wrong, most, at = [], 0, first
    with tempfile.TemporaryDirectory() as scratch:
        report = pathlib.Path(scratch, "report")
        while at < first + count:
            report.write_text("")
            command = [sys.executable, "-m", "tests.fuzz", f"--work={kind}", f"--first={at}"]
            command += [f"--count={first + count - at}", f"--report={report}"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
            begun = at - 1
            for line in report.read_text().splitlines():
                number, outcome, *text = line.split(" ", 2)
                begun = int(number)
                if outcome == "begin":
                    continue
                outcomes[outcome] += 1
                at = begun + 1
                if outcome == "wrong":
                    wrong.append(f"{kind} {number}: {text[0]}")
                else:
                    most = max(most, int(text[0]))
            if begun < at:
                if done.returncode:
                    raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
                continue
            outcomes["crashed"] += 1
            wrong.append(f"{kind} {begun}: the process ended with {done.returncode}: {done.stderr[-300:]}")
            at = begun + 1
    return outcomes, most, wrong


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="damaged files of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--report", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.first, given.count, pathlib.Path(given.report))
        return 0
    bad = []
    print(f"{'kind':10}{'files':>7}{'read':>7}{'refused':>9}{'wrong':>7}{'crashed':>9}{'most MB':>9}{'seconds':>9}")
    for kind in given.kinds.split(","):
        since = time.monotonic()
        outcomes, most, wrong = run(kind, given.first, given.count)
        row = [outcomes[name] for name in ("accepted", "refused", "wrong", "crashed")]
        cells = "".join(f"{value:>{width}}" for value, width in zip(row, (7, 9, 7, 9), strict=True))
        print(f"{kind:10}{sum(row):>7}{cells}{most / 1e6:>9.1f}{time.monotonic() - since:>9.1f}", flush=True)
        bad += wrong
    for text in bad:
        print(text)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
