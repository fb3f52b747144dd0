"""What can be wrong with a data set: labels that contradict each other, images that are damaged or come twice."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.check.images import Contents, Part, duplicates
from data_prep.sources.base import some
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

_TRAINING = (records.TRAIN, records.VAL, records.TRAINVAL)
_TEST = (records.QUERY, records.GALLERY)
# In pixels: nobody can be recognised in a smaller image, and a larger one is no crop of a person.
_SMALL, _LARGE = 16, 2048
_SHOWN = 10


class Finding(NamedTuple):
    """Something that is wrong (an error) or that a user should look at."""

    is_error: bool
    text: str


class Official(NamedTuple):
    """Published size of a split; identities without distractors, None where not published."""

    images: int
    ids: int | None


@dataclasses.dataclass(frozen=True)
class Rules:
    """What holds for a data set.

    Attributes:
      official: published sizes of its splits.
      reserved_ids: whether identity -1 is junk and 0 a distractor, as in Market-1501; elsewhere 0 may be a person.
      common_ids: whether the same number is the same person in training and test set.
      is_labelled: whether identities are known.
    """

    official: Mapping[str, Official] = dataclasses.field(default_factory=dict)
    reserved_ids: bool = False
    common_ids: bool = True
    is_labelled: bool = True


def identities(pids: np.ndarray, rules: Rules) -> set[int]:
    """Identities, without unlabelled images (-1) and distractors."""
    return set(np.unique(pids).tolist()) - ({0, -1} if rules.reserved_ids else {-1})


def check(parts: Sequence[Part], contents: dict[str, Contents], rules: Rules) -> list[Finding]:
    """All findings, in the order of the checks; `contents` is empty where the images were not read."""
    by_split = {part.split: part for part in parts}
    findings = _check_numbers(parts, rules)
    if rules.is_labelled:
        findings += [*check_splits(by_split), *_check_identities(by_split, rules), *_check_queries(by_split)]
    if contents:
        findings += [*_check_labels(parts, contents), *_check_readable(parts, contents), *_check_sizes(parts, contents)]
        findings += _check_duplicates(by_split, contents)
    return findings


def _check_numbers(parts: Sequence[Part], rules: Rules) -> list[Finding]:
    findings = [Finding(True, f"{part.split} is empty") for part in parts if not len(part)]
    for part in parts:
        official = rules.official.get(part.split)
        if official is None:
            continue
        found = (
            ("images", len(part), official.images),
            ("identities", len(identities(part.pids, rules)), official.ids),
        )
        findings += [
            Finding(False, f"{part.split} has {count:,} {what}, the published data set {published:,}")
            for what, count, published in found
            if published is not None and count != published
        ]
    return findings


def check_splits(splits: Collection[str]) -> list[Finding]:
    """Whether a labelled data set can be trained on and evaluated, by the names of the splits that have images."""
    tested = [split for split in _TEST if split in splits]
    trained = [split for split in _TRAINING if split in splits]
    if len(tested) == 1:
        missing = records.GALLERY if records.QUERY in tested else records.QUERY
        return [
            Finding(
                True,
                f"there is {tested[0]} without {missing}: an evaluation needs both (query and bounding_box_test in "
                f"Market-1501's folders): add {missing}, or remove {tested[0]} to train only",
            )
        ]
    if not tested:
        return [Finding(False, "there is no query and no gallery: nothing to evaluate on")]
    if not trained:
        return [Finding(False, "there is no train: nothing to train on")]
    return []


def _check_identities(parts: Mapping[str, Part], rules: Rules) -> list[Finding]:
    findings = []
    for part in parts.values():
        unlabelled = int((part.pids == -1).sum())
        if unlabelled and part.split == records.QUERY:
            findings.append(Finding(True, f"{unlabelled:,} queries have no identity"))
        elif unlabelled:
            findings.append(Finding(False, f"{unlabelled:,} images of {part.split} have no identity"))
    if rules.common_ids:
        trained = set().union(*(identities(parts[split].pids, rules) for split in _TRAINING if split in parts))
        tested = set().union(*(identities(parts[split].pids, rules) for split in _TEST if split in parts))
        both = sorted(trained & tested)
        if both:
            numbers = some([str(pid) for pid in both], _SHOWN)
            text = f"{len(both):,} identities are in the training set and in the test set: {numbers}"
            findings.append(Finding(True, text))
    return findings


def _check_queries(parts: Mapping[str, Part]) -> list[Finding]:
    """A query needs a gallery image of its identity from another camera."""
    if not set(_TEST) <= set(parts):
        return []
    query, gallery = (parts[split] for split in _TEST)
    cameras: dict[int, set[int]] = {}
    pairs = np.unique(np.stack([gallery.pids, gallery.camids], 1).astype(np.int64), axis=0)
    for pid, camid in pairs.tolist():
        cameras.setdefault(pid, set()).add(camid)
    labels = zip(query.pids.tolist(), query.camids.tolist(), strict=True)
    lonely = [row for row, (pid, camid) in enumerate(labels) if not cameras.get(pid, set()) - {camid}]
    if not lonely:
        return []
    names = some([_named(query, row) for row in lonely], _SHOWN)
    text = f"{len(lonely):,} of {len(query):,} queries have no match in the gallery from another camera: {names}"
    return [Finding(len(lonely) == len(query), text)]


def _check_labels(parts: Sequence[Part], contents: Mapping[str, Contents]) -> list[Finding]:
    findings = []
    for part in parts:
        other = contents[part.split].other_labels
        if other:
            listed = some([other[row] for row in sorted(other)], _SHOWN)
            text = (
                f"{len(other):,} of {len(part):,} records of {part.split} have other labels than the index beside "
                f"their shard (remove that file: it is made again from the records): {listed}"
            )
            findings.append(Finding(True, text))
    return findings


def _check_readable(parts: Sequence[Part], contents: Mapping[str, Contents]) -> list[Finding]:
    findings = []
    for part in parts:
        problems = contents[part.split].problems
        if problems:
            listed = some([f"{_named(part, row)} ({problems[row]})" for row in sorted(problems)], _SHOWN)
            findings.append(Finding(True, f"{len(problems):,} images of {part.split} cannot be read: {listed}"))
    return findings


def _named(part: Part, row: int) -> str:
    try:
        return part.name(row)
    except DataError:
        return f"row {row}"


def _check_sizes(parts: Sequence[Part], contents: Mapping[str, Contents]) -> list[Finding]:
    findings = []
    for part in parts:
        content = contents[part.split]
        least, most = np.minimum(content.heights, content.widths), np.maximum(content.heights, content.widths)
        for rows, what in (
            (np.flatnonzero((least > 0) & (least < _SMALL)), f"less than {_SMALL} pixels high or wide"),
            (np.flatnonzero(most > _LARGE), f"more than {_LARGE:,} pixels high or wide"),
            (np.flatnonzero(content.widths > content.heights), "wider than high"),
        ):
            if rows.size:
                names = some([_named(part, int(row)) for row in rows[:3]])
                findings.append(Finding(False, f"{rows.size:,} images of {part.split} are {what}, e.g. {names}"))
    return findings


def _check_duplicates(parts: Mapping[str, Part], contents: dict[str, Contents]) -> list[Finding]:
    """One finding for each kind of equal images, since there may be thousands."""
    kinds: dict[str, list[list[tuple[str, int]]]] = {}
    # Images for multiple queries are other boxes of the queries' own frames, or the same.
    for group in duplicates({split: found for split, found in contents.items() if split != records.MULTI_QUERY}):
        sides = {split in _TRAINING for split, _ in group}
        pids = {int(parts[split].pids[row]) for split, row in group}
        if len(sides) > 1:
            kind = "are in the training set and in the test set"
        elif len(pids) > 1:
            kind = "have different identities"
        elif len({split for split, _ in group}) > 1:
            kind = "are in query and gallery" if False in sides else "are in several splits"
        else:
            kind = "come more than once"
        kinds.setdefault(kind, []).append(group)
    findings = []
    for kind, groups in kinds.items():
        names = " = ".join(f"{split}: {_named(parts[split], row)}" for split, row in _two(groups[0], parts))
        count = sum(map(len, groups))
        findings.append(Finding(False, f"{count:,} images, {len(groups):,} by content, {kind}, e.g. {names}"))
    return findings


def _two(group: Sequence[tuple[str, int]], parts: Mapping[str, Part]) -> tuple[tuple[str, int], tuple[str, int]]:
    """The first image of a group, and the one whose split and identity differ most from its own."""
    split, row = group[0]

    def difference(other: tuple[str, int]) -> tuple[bool, bool, bool]:
        sides = (split in _TRAINING) != (other[0] in _TRAINING)
        return sides, bool(parts[other[0]].pids[other[1]] != parts[split].pids[row]), other[0] != split

    return group[0], max(group[1:], key=difference)
