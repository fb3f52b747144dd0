"""What can be wrong with a data set: labels that contradict each other, images that are damaged or come twice."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data_prep.inspection import Contents, Part, duplicates
from data_prep.raw import some
from dmosnet_jax.core.errors import DataError
from dmosnet_jax.data import records

if TYPE_CHECKING:
    from data_prep.builder import Official

_TRAINING = (records.TRAIN, records.VAL, records.TRAINVAL)
_TEST = (records.QUERY, records.GALLERY)
# A person of whom less is to be seen cannot be recognised; a crop that is larger is none.
_SMALL, _LARGE = 16, 2048
_SHOWN = 10


class Finding(NamedTuple):
    """Something that is wrong (an error) or that a user should look at."""

    is_error: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Rules:
    """What holds for a data set, see `builder.ReidBuilder`.

    Attributes:
      official: published numbers.
      reserved_ids: -1 is junk and 0 a distractor.
      common_ids: the same number is the same person in training and test set.
      is_labelled: identities are known.
    """

    official: "Mapping[str, Official]" = dataclasses.field(default_factory=dict)
    reserved_ids: bool = False
    common_ids: bool = True
    is_labelled: bool = True


def count_ids(pids: np.ndarray, rules: Rules) -> int:
    """Identities, without distractors and unlabelled images."""
    return len(_ids(pids, rules))


def _ids(pids: np.ndarray, rules: Rules) -> set[int]:
    return set(np.unique(pids).tolist()) - ({0, -1} if rules.reserved_ids else {-1})


def check(parts: Sequence[Part], contents: dict[str, Contents], rules: Rules) -> list[Finding]:
    """All findings.

    Args:
      parts: the splits.
      contents: what their images are; empty where they were not read.
      rules: of the data set.

    Returns:
      Errors and warnings, in the order of the checks.
    """
    by_split = {part.split: part for part in parts}
    findings = _check_numbers(parts, rules)
    if rules.is_labelled:
        findings += [*_check_splits(by_split), *_check_identities(by_split, rules), *_check_queries(by_split)]
    if contents:
        findings += [*_check_readable(parts, contents), *_check_sizes(parts, contents)]
        findings += _check_duplicates(by_split, contents)
    return findings


def _check_numbers(parts: Sequence[Part], rules: Rules) -> list[Finding]:
    findings = [Finding(True, f"{part.split} is empty") for part in parts if not len(part)]
    for part in parts:
        official = rules.official.get(part.split)
        if official is None:
            continue
        found = (("images", len(part), official.images), ("identities", count_ids(part.pids, rules), official.ids))
        findings += [
            Finding(False, f"{part.split} has {count:,} {what}, the published data set {published:,}")
            for what, count, published in found
            if published is not None and count != published
        ]
    return findings


def _check_splits(parts: Mapping[str, Part]) -> list[Finding]:
    present = [split for split in _TEST if split in parts]
    if not present:
        return [Finding(False, "there is no query and no gallery: nothing to evaluate on")]
    if len(present) == 1:
        return [Finding(True, f"there is {present[0]} without {(set(_TEST) - set(present)).pop()}")]
    if not any(split in parts for split in _TRAINING):
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
        trained = set().union(*(_ids(parts[split].pids, rules) for split in _TRAINING if split in parts))
        tested = set().union(*(_ids(parts[split].pids, rules) for split in _TEST if split in parts))
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
    names = some([query.name(row) for row in lonely[:_SHOWN]], _SHOWN)
    more = f" and {len(lonely) - _SHOWN:,} more" if len(lonely) > _SHOWN else ""
    text = f"{len(lonely):,} of {len(query):,} queries have no match in the gallery from another camera: {names}{more}"
    return [Finding(len(lonely) == len(query), text)]


def _check_readable(parts: Sequence[Part], contents: Mapping[str, Contents]) -> list[Finding]:
    findings = []
    for part in parts:
        problems = contents[part.split].problems
        if problems:
            listed = [f"{_named(part, row)} ({problems[row]})" for row in sorted(problems)[:_SHOWN]]
            more = f" and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
            text = f"{len(problems):,} images of {part.split} cannot be read: {'; '.join(listed)}{more}"
            findings.append(Finding(True, text))
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
    for group in duplicates(contents):
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
    """The first image of a group, and the one of the others that differs most from it in what is known of it."""
    split, row = group[0]

    def difference(other: tuple[str, int]) -> tuple[bool, bool, bool]:
        sides = (split in _TRAINING) != (other[0] in _TRAINING)
        return sides, bool(parts[other[0]].pids[other[1]] != parts[split].pids[row]), other[0] != split

    return group[0], max(group[1:], key=difference)
