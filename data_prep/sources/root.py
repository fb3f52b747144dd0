"""Finds a data set in a folder or a zip: at its top, or in a folder nested in it.

What a list or table names is only ever looked up among the files found here, so it can lead to no other.
"""

import os
import pathlib
from collections.abc import Callable, Iterable, Sequence

from data_prep.sources.base import Tree, some
from data_prep.sources.folder import FolderTree, children, walk
from data_prep.sources.zip import ZipTree
from dmosnet_jax.core.errors import DataError

# A file or folder of the right name that is nested deeper belongs to something else.
_DEPTH = 2


def open_tree(source: str | os.PathLike[str], marks: Sequence[str] = (), other_marks: Sequence[str] = ()) -> Tree:
    """Opens a folder or zip.

    Args:
      source: folder or zip file.
      marks: names of files or folders of which the root has at least one; the root is the source or a folder nested in
        it. Without marks the root is the source. Upper and lower case do not matter.
      other_marks: marks that a message does not name.

    Returns:
      All files below the root, without those that operating systems leave behind.

    Raises:
      DataError: the source is missing or of another kind, is an unsafe zip, holds a link that leads out of it, or has
        no such root, or several.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        root = _find_root(str(path), lambda prefix: children(path, prefix), marks, other_marks)
        tree: Tree = FolderTree(path, walk(path, root))
    else:
        tree = ZipTree(path)
        folders = _zip_folders(tree.names)
        root = _find_root(tree.location, lambda prefix: folders.get(prefix, {}), marks, other_marks)
    tree.narrow(root)
    return tree


def _find_root(
    location: str, children: Callable[[str], dict[str, bool]], marks: Sequence[str], other_marks: Sequence[str]
) -> str:
    """The least deep folder that has one of the marks; `children` gives names below a folder, and which are folders."""
    if not marks:
        return ""
    wanted, level = {mark.lower() for mark in (*marks, *other_marks)}, [""]
    for _ in range(_DEPTH + 1):
        roots = sorted(folder for folder in level if wanted & {name.lower() for name in children(folder)})
        if len(roots) > 1:
            raise DataError(f"source {location} holds several data sets ({', '.join(roots)}): give one of them")
        if roots:
            return roots[0]
        level = [f"{folder}{name}/" for folder in level for name, is_folder in children(folder).items() if is_folder]
    held = some(sorted(children("")), 5) or "nothing"
    raise DataError(
        f"source {location} has no {' or '.join(marks)}; it holds {held}: give the root of the data set or its zip file"
    )


def _zip_folders(names: Iterable[str]) -> dict[str, dict[str, bool]]:
    """For every folder of a zip what `children` gives for one on disk."""
    folders: dict[str, dict[str, bool]] = {"": {}}
    for name in names:
        *parents, file = name.split("/")
        prefix = ""
        for parent in parents:
            folders.setdefault(prefix, {})[parent] = True
            prefix += f"{parent}/"
        folders.setdefault(prefix, {})[file] = False
    return folders
