"""CUHK03 (Li et al., CVPR 2014) under the new protocol (Zhong et al., CVPR 2017), boxes detected or labeled.

Either as its authors give it out, `cuhk-03.mat`, with the protocol's `cuhk03_new_protocol_config_detected.mat` or
`..._labeled.mat` beside it, or as the ready-made folders CUHK03-NP, `detected/bounding_box_train/0001_c1_1.png`. From
the `.mat` the images become PNG files of exactly its pixels, named as the protocol names them.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from data_prep.builders import market_layout
from data_prep.builders.base import Item, Listing, ReidBuilder
from data_prep.sources.base import Files, Tree, some
from data_prep.sources.folder import FolderTree, read_file
from data_prep.sources.mat import MatImages, Protocol, read_protocol
from data_prep.sources.root import open_tree
from dmosnet_jax.core.errors import DataError

MAT = "cuhk-03.mat"
_NAME = re.compile(r"(\d+)_c(\d+)_\d+\.png", re.IGNORECASE)


class Cuhk03Builder(ReidBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base of the builders of both kinds of boxes."""

    HOMEPAGE = "https://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html"
    CITATION = "Li et al., DeepReID: Deep Filter Pairing Neural Network for Person Re-identification, CVPR 2014"
    ENCODING = "png"
    # `detected` or `labeled`.
    KIND: ClassVar[str]

    @classmethod
    def read_source(cls, source: str | os.PathLike[str], **options: Any) -> tuple[Files, Listing]:
        """See `read_source` of this module."""
        return read_source(source, cls.KIND)


def protocol_file(kind: str) -> str:
    """Name of the protocol's file for `detected` or `labeled` boxes."""
    return f"cuhk03_new_protocol_config_{kind}.mat"


def read_source(source: str | os.PathLike[str], kind: str) -> tuple[Files, Listing]:
    """Opens CUHK03: `cuhk-03.mat`, a folder or zip that holds it, or CUHK03-NP.

    Raises:
      DataError: the source is none of these, or not whole.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_file() and path.suffix == ".mat":
        return _from_mat(FolderTree(path.absolute().parent, [path.name]), path.name, path, kind)
    tree = open_tree(path, (MAT, protocol_file(kind), kind, *market_layout.FOLDERS))
    mats = [name for name in tree.names if name.rsplit("/", 1)[-1] == MAT]
    if len(mats) > 1:
        raise DataError(f"source {path} holds {MAT} {len(mats)} times ({', '.join(mats)}): give one of them")
    if mats:
        return _from_mat(tree, mats[0], path, kind)
    # The folders of the other kind lie beside.
    prefix = f"{kind}/" if any(name.startswith(f"{kind}/") for name in tree.names) else ""
    return tree, scan_folders(tree.names, prefix)


def scan_folders(names: Sequence[str], prefix: str = "") -> Listing:
    """Sorts the files of CUHK03-NP into splits, see `market_layout.scan`."""
    listing = market_layout.scan(names, _NAME, "<pid>_c<camera>_<number>.png", root=prefix)
    return dataclasses.replace(listing, details={"layout": "cuhk03-np folders"})


def _from_mat(tree: Tree, mat: str, source: pathlib.Path, kind: str) -> tuple[Files, Listing]:
    protocol = _protocol(tree, source, kind)
    try:
        file = tree.open(mat)
    except DataError as error:
        raise DataError(f"source {source}: {mat} cannot be read ({error}): copy it again") from error
    images = MatImages(file, kind, str(source))
    known = set(images.names)
    splits = {}
    for split, rows in protocol.splits.items():
        items = [
            Item(f"{kind}/{protocol.names[row]}", int(protocol.pids[row]), int(protocol.camids[row])) for row in rows
        ]
        missing = [item.filename for item in items if item.filename not in known]
        if missing:
            raise DataError(
                f"source {source}: {MAT} lacks {len(missing)} of the images that {protocol_file(kind)} names "
                f"({some(missing, 5)}): the two files do not belong together"
            )
        splits[split] = items
    return images, Listing(splits, details={"layout": "cuhk-03.mat"})


def _protocol(tree: Tree, source: pathlib.Path, kind: str) -> Protocol:
    """The protocol's file, from the source or from the folder that the source lies in."""
    wanted = protocol_file(kind)
    found = [name for name in tree.names if name.rsplit("/", 1)[-1] == wanted]
    above = source.absolute().parents
    beside = [folder / wanted for folder in above[: 2 if source.is_file() else 1] if (folder / wanted).is_file()]
    try:
        if found:
            return read_protocol(tree.read(found[0]))
        if beside:
            return read_protocol(read_file(beside[0]))
    except DataError as error:
        raise DataError(f"source {source}: {wanted} cannot be used ({error}): download it again") from error
    raise DataError(
        f"source {source} lacks {wanted}: put this file of the new protocol (github.com/zhunzhong07/person-re-ranking) "
        f"beside {MAT}"
    )
