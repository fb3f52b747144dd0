"""Checks a data set, before it is converted or after.

    python -m data_prep.lint --dataset=market1501 --source=Market-1501-v15.09.15.zip
    python -m data_prep.lint --dataset=market1501 --data_dir=data

print a table of its splits, then errors and warnings: numbers other than the published ones, identities that are in the
training set and in the test set, queries without a match, images of equal content, images that cannot be read, sizes.
The exit status is 1 where there is an error, 0 where there are only warnings, 2 for a bad command.
"""

import dataclasses
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_prep import command, convert
from data_prep.checks import Finding, Rules, check, count_ids
from data_prep.inspection import Contents, Part, inspect
from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.data import records
from dmosnet_jax.data import splits as datasets

_INTERRUPTED = 130
_LUPERSON = "luperson"
# Options of `folder` that decide what there is to check.
_OPTIONS = ("camera_policy", "test_fraction")

# Their own set: importing this module must not add flags to the program that imports it.
_FLAGS = flags.FlagValues()
flags.DEFINE_string("dataset", None, "Name of the data set, as for conversion.", flag_values=_FLAGS)
flags.DEFINE_string("source", None, "The raw data set, as for conversion.", flag_values=_FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of converted data sets.", flag_values=_FLAGS)
flags.DEFINE_bool("images", True, "Read and decode every image.", flag_values=_FLAGS)
flags.DEFINE_enum("camera_policy", None, ["given", "none"], "folder: as for conversion.", flag_values=_FLAGS)
flags.DEFINE_float("test_fraction", None, "folder: as for conversion.", flag_values=_FLAGS)
flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=_FLAGS)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
      title: the data set and its place.
      parts: its splits.
      contents: what the images are, by split; empty where they were not read.
      rules: of the data set.
      findings: errors first.
      notes: what is worth knowing and nothing to worry about.
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
                    f"{count_ids(part.pids, self.rules):,}",
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
    """Checks a raw data set.

    Args:
      dataset: one of `convert.DATASETS`.
      source: as for conversion.
      options: as for conversion.
      images: whether to read and decode every image.

    Returns:
      What was found.

    Raises:
      ConfigError: unknown data set or option.
      DataError: it cannot be opened, or is not laid out as this data set is.
    """
    rules = _rules(dataset)
    title = f"{dataset} in {source}, to be converted"
    if dataset == _LUPERSON:
        convert.check_options(convert.builder_class_of(dataset), options or {})
        return _report(title, [_luperson(source)], rules, images)
    builder_class = convert.builder_class_of(dataset)
    convert.check_options(builder_class, options or {})
    files, listing = builder_class.read_source(source, **(options or {}))
    from data_prep.builder import check_names

    check_names(files.location, listing)
    parts = []
    for split, items in listing.splits.items():
        names = [item.filename for item in items]
        parts.append(
            Part(
                split=split,
                pids=np.array([item.pid for item in items], np.int64),
                camids=np.array([item.camid for item in items], np.int64),
                name=names.__getitem__,
                read=lambda row, names=names: files.read(names[row]),  # type: ignore[misc]
            )
        )
    report = _report(title, parts, rules, images, listing.notes)
    left_out = (f"{listing.junk:,} junk images (identity -1) will be left out",) if listing.junk else ()
    return dataclasses.replace(report, notes=left_out)


def lint_converted(dataset: str, data_dir: str | os.PathLike[str], *, images: bool = True) -> Report:
    """Checks a converted data set.

    Args:
      dataset: its name.
      data_dir: folder of converted data sets.
      images: whether to read and decode every image.

    Returns:
      What was found.

    Raises:
      ConfigError: the name cannot be one of a data set.
      DataError: it is not there, or damaged.
    """
    parts = []
    for name in sorted(datasets.split_names(data_dir, dataset), key=_position):
        split = datasets.load_split(data_dir, dataset, name)
        parts.append(
            Part(
                split=name,
                pids=split.pids,
                camids=split.camids,
                name=lambda row, split=split: split.record(row).filename,  # type: ignore[misc]
                read=lambda row, split=split: split.record(row).image,  # type: ignore[misc]
            )
        )
    rules = _rules(dataset) if dataset in convert.DATASETS else Rules()
    return _report(f"{dataset} in {data_dir}, converted", parts, rules, images)


def _position(split: str) -> tuple[int, str]:
    order = (records.TRAIN, records.VAL, records.TRAINVAL, records.QUERY, records.GALLERY)
    return (order.index(split) if split in order else len(order)), split


def _report(title: str, parts: list[Part], rules: Rules, images: bool, doubts: Sequence[str] = ()) -> Report:
    contents = inspect(parts) if images else {}
    findings = [*check(parts, contents, rules), *(Finding(False, note) for note in doubts)]
    return Report(title, parts, contents, rules, sorted(findings, key=lambda finding: not finding.is_error))


def _rules(dataset: str) -> Rules:
    if dataset not in convert.DATASETS:
        raise ConfigError(f"dataset={dataset} is unknown: use one of {', '.join(convert.DATASETS)}")
    builder_class = convert.builder_class_of(dataset)
    if dataset == _LUPERSON:
        from data_prep.builder import Official
        from data_prep.luperson_source import IMAGES

        return Rules(official={records.TRAIN: Official(IMAGES, None)}, is_labelled=False)
    return Rules(
        official=builder_class.OFFICIAL,
        reserved_ids=builder_class.RESERVED_IDS,
        common_ids=builder_class.COMMON_IDS,
    )


def _luperson(source: str | os.PathLike[str]) -> Part:
    """The images of LUPerson, which nobody has labelled."""
    from data_prep import luperson_source

    found = luperson_source.find(source)
    references, videos = list[str](), list[int]()
    for image in found.images():
        references.append(image.ref)
        videos.append(image.video)
    if not references:
        raise DataError(f"source {source} has no image for {records.TRAIN}: copy the data set again")
    read = luperson_source.reader(found.kind, found.root)
    return Part(
        split=records.TRAIN,
        pids=np.full(len(references), -1),
        camids=np.array(videos),
        name=references.__getitem__,
        read=lambda row: read(references[row]),
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    return command.guarded(_run, argv, interrupted="interrupted")


def _run(argv: Sequence[str]) -> int:
    if command.parse(_FLAGS, argv, __doc__):
        return 0
    if not _FLAGS.dataset:
        raise ConfigError("--dataset is missing; see --help")
    if bool(_FLAGS.source) == bool(_FLAGS.data_dir):
        raise ConfigError("give either --source=PATH, the raw data set, or --data_dir=DIR, the converted ones")
    options = {name: _FLAGS[name].value for name in _OPTIONS if _FLAGS[name].value is not None}
    if _FLAGS.source:
        report = lint_source(_FLAGS.dataset, _FLAGS.source, options=options, images=_FLAGS.images)
    elif options:
        raise ConfigError(f"{', '.join(options)} is for a raw data set: leave it out")
    else:
        report = lint_converted(_FLAGS.dataset, _FLAGS.data_dir, images=_FLAGS.images)
    # LUPerson's file names need not be text.
    print(str(report).encode(errors="backslashreplace").decode())
    return report.exit_status


if __name__ == "__main__":
    # Who reads only the first lines need not hear of it.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Schedulers end jobs with SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv))
