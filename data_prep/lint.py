"""Checks a data set, before it is converted or after.

    python -m data_prep.lint --dataset=market1501 --source=Market-1501-v15.09.15.zip
    python -m data_prep.lint --dataset=market1501 --data_dir=data

print a table of its splits, then errors and warnings: numbers other than the published ones, identities that are in the
training set and in the test set, queries without a match, images of equal content, images that cannot be read, sizes.
Of a converted data set every record's labels are compared with the index beside its shard. The exit status is 1 where
there is an error, 0 where there are only warnings, 2 for a bad command.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_prep import command, convert
from data_prep.check.images import Contents, OtherLabelsError, Part, inspect
from data_prep.check.rules import Finding, Rules, check, identities
from dmosnet_jax.core.command import guarded
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records, splits
from dmosnet_jax.data.splits import Split

# Options of `folder` that decide what there is to check.
_OPTIONS = ("camera_policy", "test_fraction")

_FLAGS = command.own_flags()
flags.DEFINE_string("dataset", None, "Name of the data set, as for conversion.", _FLAGS)
flags.DEFINE_string("source", None, "The raw data set, as for conversion.", _FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of converted data sets.", _FLAGS)
flags.DEFINE_bool("images", True, "Read every image or record, and decode it.", _FLAGS)
flags.DEFINE_enum("camera_policy", None, ["given", "none"], "folder: as for conversion.", _FLAGS)
flags.DEFINE_float("test_fraction", None, "folder: as for conversion.", flag_values=_FLAGS)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      title: the data set and where it is.
      parts: its splits.
      contents: what the images are, by split; empty where they were not read.
      rules: of the data set.
      findings: errors first.
      notes: facts that are no findings.
    """

    title: str
    parts: list[Part]
    contents: dict[str, Contents]
    rules: Rules
    findings: list[Finding]
    notes: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        """1 where there is an error."""
        return int(any(finding.is_error for finding in self.findings))

    def __str__(self) -> str:
        rows = [["split", "images", "published", "identities", "published", "cameras", "height", "width", "bytes"]]
        for part in self.parts:
            official = self.rules.official.get(part.split)
            rows.append(
                [
                    part.split,
                    f"{len(part):,}",
                    f"{official.images:,}" if official else "",
                    f"{len(identities(part.pids, self.rules)):,}",
                    f"{official.ids:,}" if official and official.ids is not None else "",
                    f"{len(np.unique(part.camids)):,}",
                    *_sizes(self.contents.get(part.split)),
                ]
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:], strict=True))]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"  {note}" for note in self.notes]
        lines += [f"{'error' if finding.is_error else 'warning'}: {finding.text}" for finding in self.findings]
        errors = sum(finding.is_error for finding in self.findings)
        counts = ((errors, "error"), (len(self.findings) - errors, "warning"))
        lines.append(", ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts))
        return "\n".join(lines)


def _sizes(contents: Contents | None) -> list[str]:
    """Heights, widths and bytes from the least to the most."""
    cells = []
    for values in (contents.heights, contents.widths, contents.sizes) if contents else ():
        seen = values[values > 0]
        cells.append(f"{seen.min():,} to {seen.max():,}" if seen.size else "")
    return cells or ["", "", ""]


def lint_source(
    dataset: str, source: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None, images: bool = True
) -> Report:
    """Checks a raw data set, given as for `convert.convert`; `images` says whether to read and decode every image.

    Raises:
      ConfigError: unknown data set or option.
      DataError: it cannot be opened, or is not laid out as this data set is.
    """
    convert.check_dataset(dataset)
    builder_class = convert.builder_class_of(dataset)
    convert.check_options(dataset, options or {})
    files, listing = builder_class.read_source(source, **(options or {}))
    from data_prep.builders.base import check_listing, left_out

    check_listing(files, listing)
    whole = builder_class.IS_WHOLE
    warnings = (*listing.notes, *left_out(files, listing, is_whole=whole, within=True))
    title = f"{dataset} in {source}, to be converted"
    report = _report(title, listing.parts(files), builder_class.RULES, images, warnings)
    junk = (f"{listing.junk:,} junk images (identity -1) will be left out",) if listing.junk else ()
    return dataclasses.replace(report, notes=(*junk, *left_out(files, listing, is_whole=whole, within=False)))


def lint_converted(dataset: str, data_dir: str | os.PathLike[str], *, images: bool = True) -> Report:
    """Checks a converted data set; `images` says whether to read and decode every image.

    Raises:
      ConfigError: the name cannot be one of a data set.
      DataError: it is not there, or damaged.
    """
    names = sorted(splits.split_names(data_dir, dataset), key=_position)
    parts = [_converted(splits.load_split(data_dir, dataset, name)) for name in names]
    rules = convert.builder_class_of(dataset).RULES if dataset in convert.DATASETS else Rules()
    return _report(f"{dataset} in {data_dir}, converted", parts, rules, images)


def _where(split: Split, row: int) -> str:
    path, number, offset = split.source.locate(row)
    return f"{path}: record {number} at byte {offset}"


def _converted(split: Split) -> Part:
    def record(row: int) -> records.Record:
        try:
            return records.parse(split.source[row])
        except DataError as error:
            raise DataError(f"{_where(split, row)}: {error}") from error

    def read(row: int) -> bytes:
        found = record(row)
        index = int(split.pids[row]), int(split.camids[row])
        if (found.pid, found.camid) != index:
            raise OtherLabelsError(
                f"{_where(split, row)}: pid {found.pid} and camid {found.camid}, in the index {index[0]} and {index[1]}"
            )
        return found.image

    return Part(split.split, split.pids, split.camids, lambda row: record(row).filename, read)


def _position(split: str) -> tuple[int, str]:
    order = (records.TRAIN, records.VAL, records.TRAINVAL, records.QUERY, records.GALLERY, records.MULTI_QUERY)
    return (order.index(split) if split in order else len(order)), split


def _report(title: str, parts: list[Part], rules: Rules, images: bool, warnings: Sequence[str] = ()) -> Report:
    contents = inspect(parts) if images else {}
    findings = [*check(parts, contents, rules), *(Finding(False, note) for note in warnings)]
    return Report(title, parts, contents, rules, sorted(findings, key=lambda finding: not finding.is_error))


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    if command.parse(_FLAGS, argv, __doc__):
        return 0
    if not _FLAGS.dataset:
        raise ConfigError("--dataset is missing; see --help")
    if bool(_FLAGS.source) == bool(_FLAGS.data_dir):
        raise ConfigError("give either --source=PATH, the raw data set, or --data_dir=DIR, the converted ones")
    options = command.given(_FLAGS, _OPTIONS)
    if _FLAGS.source:
        report = lint_source(_FLAGS.dataset, _FLAGS.source, options=options, images=_FLAGS.images)
    elif options:
        raise ConfigError(f"{', '.join(options)} is for a raw data set: leave it out")
    else:
        report = lint_converted(_FLAGS.dataset, _FLAGS.data_dir, images=_FLAGS.images)
    print(report)
    return report.exit_status


def start() -> None:
    """Runs this command as the program."""
    command.start(main)


if __name__ == "__main__":
    start()
