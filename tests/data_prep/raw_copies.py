"""Writes small raw copies of the data sets in the formats they are given out in, of rendered pedestrians.

They are for tests, and for trying a chain before the real data are there:
`write("msmt17", "raw", Scene(), version="v2")`.
"""

import dataclasses
import inspect
import io
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from PIL import Image

from data_prep.synthetic import pedestrians
from data_prep.synthetic.pedestrians import Scene, Shot, Studio
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records
from tests.data_prep.raw_copies_cuhk03 import Album

_UNLABELLED = -1


class Label(NamedTuple):
    """What the generator knows of an image: path (LMDB: key) in the raw copy, identity, camera."""

    filename: str
    pid: int
    camid: int


Labels = dict[str, list[Label]]


def write(dataset: str, folder: str | os.PathLike[str], scene: Scene | None = None, **options: Any) -> Labels:
    """Writes a raw copy, whole or not at all.

    Args:
      dataset: name as for conversion.
      folder: to be made; it is then the source for conversion.
      scene: what to render; the number of cameras is limited to what a format has room for.
      **options: `cuhk03_detected`, `cuhk03_labeled`: `form` = "mat" (default: `cuhk-03.mat` and the split files) or
        "folders" (CUHK03-NP). `msmt17`: `version` = "v1" (default), "v2" or "boxes" (file names as Market-1501's).
        `luperson`: `form` = "folder" (default) or "lmdb"; `video` = True, whether folders have the level of the video;
        `keys` = "list" (default) or "dict", the form of `keys.pkl`. `folder`: `form` = "tree" (default) or "csv";
        `splits` = True, whether the split is said; `cameras` = True, likewise. Where the split is not said, the labels
        have the one it was rendered for, not the one that the conversion will choose.

    Returns:
      The labels of every split in the order of file names, without junk. Images of `luperson` are all in `train`, with
      identity -1 and the number of their video, from 0, as camera; without the level of the video, 0.

    Raises:
      ConfigError: unknown data set or option.
      DataError: the folder is there already, or cannot be written.
    """
    if dataset not in _WRITERS:
        raise ConfigError(f"dataset={dataset} is unknown: use one of {', '.join(_WRITERS)}")
    names = list(inspect.signature(_WRITERS[dataset]).parameters)[2:]
    unknown = [name for name in options if name not in names]
    if unknown:
        raise ConfigError(
            f"dataset={dataset} has no option {', '.join(unknown)}: there are {', '.join(names) or 'none'}"
        )
    folder = pathlib.Path(folder).expanduser()
    if folder.exists():
        raise DataError(f"{folder} exists already: give a folder that does not, or remove it")
    aside = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        labels = _WRITERS[dataset](aside, scene or Scene(), **options)
        os.rename(aside, folder)
    except OSError as error:
        raise DataError(f"cannot write to {folder} ({error.strerror}): free space, or give another one") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {split: sorted(items) for split, items in labels.items()}


def known() -> tuple[str, ...]:
    """Names of the data sets that can be written."""
    return tuple(_WRITERS)


def _shots(scene: Scene, **changes: Any) -> Iterator[tuple[Shot, str, bytes]]:
    """Every image of a scene without distractors and junk: the shot, its split, the JPEG file."""
    scene = dataclasses.replace(scene, distractors=0, junk=0, **changes)
    studio = Studio(scene)
    splits = {"bounding_box_train": records.TRAIN, "query": records.QUERY, "bounding_box_test": records.GALLERY}
    for shot in pedestrians.plan(scene):
        buffer = io.BytesIO()
        studio.photograph(shot).save(buffer, "jpeg", quality=studio.quality(shot))
        yield shot, splits[shot.path.split("/")[0]], buffer.getvalue()


def _put(root: pathlib.Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _choice(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is unknown: use one of {', '.join(known)}")


def _market1501(root: pathlib.Path, scene: Scene) -> Labels:
    pedestrians.render(root, scene)
    splits = {"bounding_box_train": records.TRAIN, "query": records.QUERY, "bounding_box_test": records.GALLERY}
    labels: Labels = {split: [] for split in splits.values()}
    for shot in pedestrians.plan(scene):
        if shot.pid != -1:
            labels[splits[shot.path.split("/")[0]]].append(Label(shot.path, shot.pid, shot.camid))
    return labels


def _luperson(root: pathlib.Path, scene: Scene, form: str = "folder", video: bool = True, keys: str = "list") -> Labels:
    """As the data set's own scripts `extract.py` and `convert_lmdb.py` write it."""
    _choice("form", form, "folder", "lmdb")
    _choice("keys", keys, "list", "dict")
    files: dict[str, bytes] = {}
    for shot, _, data in _shots(scene):
        # One video for each camera, in two countries with up to two cities.
        country, city = f"country{shot.camid % 2}", f"city{shot.camid // 2 % 2}"
        place = f"{country}/{city}/" + (f"{country}+{city}+video{shot.camid:04d}/" if video else "")
        files[f"{place}{25 * shot.take + shot.camid:08d}_{shot.pid:04d}.jpg"] = data
    if form == "folder":
        for name, data in files.items():
            _put(root, name, data)
        return {records.TRAIN: _numbered_videos(files, "/" if video else None)}
    named = _lmdb_keys(files)
    _write_lmdb(root, named, keys)
    return {records.TRAIN: _numbered_videos(named, "_")}


def _numbered_videos(names: Iterable[str], separator: str | None) -> list[Label]:
    """Labels of images whose names begin with their video, up to the last separator."""
    before = {name: name.rpartition(separator)[0] if separator else "" for name in names}
    videos = {video: number for number, video in enumerate(sorted(set(before.values())))}
    return [Label(name, _UNLABELLED, videos[video]) for name, video in before.items()]


def _lmdb_keys(files: dict[str, bytes]) -> dict[str, bytes]:
    """Numbers countries, their cities, those's videos, and their images, in sorted order."""

    def number(paths: list[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
        siblings: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for path in sorted(set(paths)):
            siblings.setdefault(path[:-1], []).append(path)
        return {path: i for group in siblings.values() for i, path in enumerate(group)}

    paths = {name: tuple(name.split("/")) for name in files}
    levels = [number([path[: depth + 1] for path in paths.values()]) for depth in range(3)]
    images = number(list(paths.values()))
    named = {}
    for name in sorted(files):
        path = paths[name]
        # Without the level of the video each city counts as one.
        video = levels[2][path[:3]] if len(path) == 4 else 0
        key = f"{levels[0][path[:1]]:02d}_{levels[1][path[:2]]:02d}_{video:04d}_{images[path]:08d}"
        named[key] = files[name]
    return named


def _write_lmdb(root: pathlib.Path, named: dict[str, bytes], keys: str) -> None:
    import lmdb

    root.mkdir(parents=True)
    size = 2 * sum(map(len, named.values())) + 2**24
    with lmdb.open(str(root / "lmdb"), map_size=size) as env, env.begin(write=True) as transaction:
        for key, data in named.items():
            transaction.put(key.encode("ascii"), data)
    names = list(named)
    videos = {key[:10]: i for i, key in enumerate(sorted({key[:10] for key in named}))}
    content = names if keys == "list" else {"keys": names, "vids": [videos[key[:10]] for key in names]}
    (root / "keys.pkl").write_bytes(pickle.dumps(content, protocol=2))


def _dukemtmc(root: pathlib.Path, scene: Scene) -> Labels:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (root / folder).mkdir(parents=True)
    labels: Labels = {}
    for shot, split, data in _shots(scene):
        name = f"{shot.path.split('/')[0]}/{shot.pid:04d}_c{shot.camid}_f{60 * shot.take + 46182:07d}.jpg"
        _put(root, name, data)
        labels.setdefault(split, []).append(Label(name, shot.pid, shot.camid))
    return labels


def _cuhk03(kind: str) -> Callable[..., Labels]:
    def write_kind(root: pathlib.Path, scene: Scene, form: str = "mat") -> Labels:
        _choice("form", form, "mat", "folders")
        # Every person is in one of five pairs of cameras, with up to five images in each of the two.
        album = Album(scene.train_ids + scene.test_ids)
        for shot, split, data in _shots(scene, cameras=2, images=min(scene.images, 5)):
            album.add(split, shot.pid, shot.camid, shot.take, Image.open(io.BytesIO(data)))
        labels: Labels = {}
        if form == "mat":
            album.write_mat(root)
            for name, split, pid, camid, _ in album.rows(kind):
                labels.setdefault(split, []).append(Label(f"{kind}/{name}", pid, camid))
        else:
            album.write_folders(root)
            for name, split, (pid, camid), _ in album.folder_files(kind):
                labels.setdefault(split, []).append(Label(name, pid, camid))
        return labels

    return write_kind


def _msmt17(root: pathlib.Path, scene: Scene, version: str = "v1") -> Labels:
    _choice("version", version, "v1", "v2", "boxes")
    names = {"v1": ("train", "test"), "v2": ("mask_train_v2", "mask_test_v2")}
    labels: Labels = {split: [] for split in (records.TRAIN, records.VAL, records.QUERY, records.GALLERY)}
    lists: dict[str, list[str]] = {split: [] for split in labels}
    counts: dict[tuple[bool, int], int] = {}
    for shot, split, data in _shots(scene):
        # Numbers start at 0, and again in the test set.
        test = split != records.TRAIN
        pid = shot.pid - 1 - (scene.train_ids if test else 0)
        number = counts[test, pid] = counts.get((test, pid), -1) + 1
        if not test and number == 1:
            split = records.VAL
        if version == "boxes":
            name = f"{shot.path.split('/')[0]}/{pid:04d}_c{shot.camid}_{number:04d}.jpg"
        else:
            tail = "_ex" if version == "v2" else ""
            file = f"{pid:04d}/{pid:04d}_{number:03d}_{shot.camid:02d}_0303morning_{25 * shot.take:04d}_0{tail}.jpg"
            name = f"{names[version][test]}/{file}"
            lists[split].append(f"{file} {pid}")
        _put(root, name, data)
        labels[split].append(Label(name, pid, shot.camid))
    if version == "boxes":
        labels[records.TRAINVAL] = labels.pop(records.TRAIN) + labels.pop(records.VAL)
        return labels
    for split, lines in lists.items():
        _put(root, f"list_{split}.txt", "".join(f"{line}\n" for line in sorted(lines)).encode())
    return labels


def _folder(root: pathlib.Path, scene: Scene, form: str = "tree", splits: bool = True, cameras: bool = True) -> Labels:
    _choice("form", form, "tree", "csv")
    labels: Labels = {}
    table = [f"path,pid{',camid' if cameras else ''}{',split' if splits else ''}"]
    for shot, split, data in _shots(scene):
        above = f"{split}/" if splits and form == "tree" else ""
        camera, file = (f"{shot.camid}/", f"{shot.take}") if cameras else ("", f"{shot.camid}_{shot.take}")
        name = (
            f"{above}{shot.pid}/{camera}{file}.jpg" if form == "tree" else f"images/{shot.pid}_{shot.camid}_{file}.jpg"
        )
        _put(root, name, data)
        labels.setdefault(split, []).append(Label(name, shot.pid, shot.camid))
        table.append(",".join([name, str(shot.pid), *([str(shot.camid)] * cameras), *([split] * splits)]))
    if form == "csv":
        _put(root, "images.csv", "".join(f"{line}\n" for line in table).encode())
    if not cameras:
        order = sorted(label.filename for items in labels.values() for label in items)
        numbers = {name: i for i, name in enumerate(order, 1)}
        labels = {
            split: [label._replace(camid=numbers[label.filename]) for label in items] for split, items in labels.items()
        }
    return labels


_WRITERS: dict[str, Callable[..., Labels]] = {
    "market1501": _market1501,
    "synthetic": _market1501,
    "dukemtmc": _dukemtmc,
    "cuhk03_detected": _cuhk03("detected"),
    "cuhk03_labeled": _cuhk03("labeled"),
    "msmt17": _msmt17,
    "luperson": _luperson,
    "folder": _folder,
}
