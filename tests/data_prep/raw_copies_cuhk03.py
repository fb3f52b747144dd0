"""Writes small raw copies of CUHK03: `cuhk-03.mat` with the files of the new protocol, and CUHK03-NP."""

import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from dmosnet_jax.data import records

KINDS = ("detected", "labeled")
_PAIRS = 5
_SLOTS = 10
_VIEW = 5
_USER_BLOCK = 512
_SPLITS = {records.TRAIN: "train_idx", records.QUERY: "query_idx", records.GALLERY: "gallery_idx"}


class Album:
    """The images of both kinds, filled one by one."""

    def __init__(self, people: int):
        """Starts empty; identities are 1 to `people`."""
        self._people = people
        # By kind and identity, then by slot: the split and the pixels, uint8 [h, w, 3].
        self._images: dict[tuple[str, int], dict[int, tuple[str, np.ndarray]]] = {}

    def add(self, split: str, pid: int, camid: int, take: int, image: Image.Image) -> None:
        """Adds an image; the boxes drawn by hand are a little tighter, and one image has none."""
        pixels = np.asarray(image)
        slot = (camid - 1) * _VIEW + take
        self._images.setdefault(("detected", pid), {})[slot] = split, pixels
        if (pid, slot) != (1, 0):
            self._images.setdefault(("labeled", pid), {})[slot] = split, pixels[1:-1, 1:-1]

    def rows(self, kind: str) -> list[tuple[str, str, int, int, np.ndarray]]:
        """Name in the protocol, split, identity, camera and pixels of every image, in the protocol's order."""
        result = []
        for pid in range(1, self._people + 1):
            pair, person = self._place(pid)
            for slot, (split, pixels) in sorted(self._images.get((kind, pid), {}).items()):
                view = 1 + slot // _VIEW
                result.append((f"{pair + 1}_{person + 1:03d}_{view}_{slot + 1:02d}.png", split, pid, view, pixels))
        return result

    def _place(self, pid: int) -> tuple[int, int]:
        """Camera pair of an identity and its number there, from 0."""
        each = -(-self._people // _PAIRS)
        return (pid - 1) // each, (pid - 1) % each

    def write_mat(self, root: pathlib.Path) -> None:
        """Writes `cuhk-03.mat` and the two files of the protocol."""
        import h5py
        import scipy.io

        root.mkdir(parents=True)
        with h5py.File(root / "cuhk-03.mat", "w", userblock_size=_USER_BLOCK) as file:
            store = file.create_group("#refs#")
            for kind in KINDS:
                _put_cell(file, kind, self._pairs(store, kind))
        header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
        with (root / "cuhk-03.mat").open("r+b") as file:
            file.write(header)
        for kind in KINDS:
            rows = self.rows(kind)
            content: dict[str, Any] = {
                "filelist": np.array([row[0] for row in rows], object)[:, None],
                "labels": np.array([row[2] for row in rows], np.uint16)[:, None],
                "camId": np.array([row[3] for row in rows], np.uint8)[:, None],
            }
            for split, field in _SPLITS.items():
                content[field] = np.array([i for i, row in enumerate(rows, 1) if row[1] == split], np.uint16)[:, None]
            path = root / f"cuhk03_new_protocol_config_{kind}.mat"
            scipy.io.savemat(path, content, do_compression=True)

    def _pairs(self, store: Any, kind: str) -> np.ndarray:
        """References to the camera pairs of one kind, [1, 5]."""
        import h5py

        pairs = np.empty((1, _PAIRS), h5py.ref_dtype)
        members: list[list[int]] = [[] for _ in range(_PAIRS)]
        for pid in range(1, self._people + 1):
            members[self._place(pid)[0]].append(pid)
        for pair, pids in enumerate(members):
            # MATLAB's order of dimensions is the reverse of HDF5's.
            cells = np.empty((_SLOTS, len(pids)), h5py.ref_dtype)
            for person, pid in enumerate(pids):
                found = self._images.get((kind, pid), {})
                for slot in range(_SLOTS):
                    cells[slot, person] = _put_image(store, found[slot][1] if slot in found else None).ref
            pairs[0, pair] = _put_cell(store, _next(store), cells).ref
        return pairs

    def write_folders(self, root: pathlib.Path) -> None:
        """Writes CUHK03-NP: `detected/` and `labeled/`, files `<pid>_c<camera>_<row>.png`."""
        for kind in KINDS:
            for folder in ("bounding_box_train", "query", "bounding_box_test"):
                (root / kind / folder).mkdir(parents=True)
            for name, _, _, pixels in self.folder_files(kind):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "png")
                (root / name).write_bytes(buffer.getvalue())

    def folder_files(self, kind: str) -> list[tuple[str, str, tuple[int, int], np.ndarray]]:
        """Path in CUHK03-NP, split, identity and camera, and pixels of every image."""
        folders = {records.TRAIN: "bounding_box_train", records.QUERY: "query", records.GALLERY: "bounding_box_test"}
        return [
            (f"{kind}/{folders[split]}/{pid:04d}_c{camid}_{row}.png", split, (pid, camid), pixels)
            for row, (_, split, pid, camid, pixels) in enumerate(self.rows(kind), 1)
        ]


def _next(store: Any) -> str:
    return f"r{len(store)}"


def _put_cell(parent: Any, name: str, references: np.ndarray) -> Any:
    import h5py

    dataset = parent.create_dataset(name, data=references, dtype=h5py.ref_dtype)
    dataset.attrs["MATLAB_class"] = np.bytes_("cell")
    return dataset


def _put_image(store: Any, pixels: np.ndarray | None) -> Any:
    if pixels is None:
        # An empty array is stored as its dimensions.
        dataset = store.create_dataset(_next(store), data=np.zeros(2, np.uint64))
        dataset.attrs["MATLAB_class"], dataset.attrs["MATLAB_empty"] = np.bytes_("double"), np.uint8(1)
        return dataset
    # MATLAB compresses what it saves.
    dataset = store.create_dataset(_next(store), data=pixels.T, compression="gzip", compression_opts=3)
    dataset.attrs["MATLAB_class"] = np.bytes_("uint8")
    return dataset
