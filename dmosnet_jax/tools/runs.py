"""One run of a table: where it is, the commands that make it, and how far it has come.

Its folder has `train/` and `score/`, the workdirs of the two commands, `train.log` and `score.log`, what they print,
and `run.json`, the note by which it is known again:

- `settings`: all that decides its result. A folder that was begun with other settings is refused.
- `trained`: whether the training has ended.
- `scored`: the settings of the evaluation whose `score/results.json` is there.
- `seconds`: of training, all attempts together; `devices` and `versions`: on what and by which code.
"""

import dataclasses
import fnmatch
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.files import atomic_write
from dmosnet_jax.data.splits import split_names
from dmosnet_jax.tools.experiments import Row, Table

MAIN = (sys.executable, "-m", "dmosnet_jax.main")
TRAIN, SCORE, NOTE = "train", "score", "run.json"
# Fields of the scoring too; those of it that change no score; those on which no training's result depends.
_SCORING = ("eval.*", "data.threads", "data.workers", "data.cache_mib")
_NO_SCORE = ("eval.batch_size", "eval.report", "eval.rank_lists")
_FREE = (*_SCORING, "data_dir", "train.log_every_steps", "train.checkpoint_every_steps", "train.keep")
_OVERRIDE = re.compile(r"(?:(?P<row>[\w-]+):)?(?P<field>[A-Za-z_][\w.]*)=(?P<value>.*)", re.DOTALL)


class Override(NamedTuple):
    """A field of the config for all rows, or for one."""

    row: str | None
    field: str
    value: str


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        workdir: of the table.
        data_dir: converted data sets.
        weights: folder of weight files, None where none was given.
    """

    workdir: pathlib.Path
    data_dir: str
    weights: pathlib.Path | None


def parse_overrides(texts: Sequence[str], table: Table) -> tuple[Override, ...]:
    """Overrides from `FIELD=VALUE` and `ROW:FIELD=VALUE`.

    Raises:
        ConfigError: another form, or no such row.
    """
    found = []
    for text in texts:
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            raise ConfigError(f"--override={text}: give FIELD=VALUE or ROW:FIELD=VALUE, e.g. train.epochs=2")
        override = Override(match["row"], match["field"].removeprefix("config."), match["value"])
        rows = [row.name for row in table.rows]
        if override.row is not None and override.row not in rows:
            raise ConfigError(f"--override={text}: there is no row {override.row!r}: use one of {', '.join(rows)}")
        if override.field in ("seed", "pretrained", "checkpoint", "dataset"):
            raise ConfigError(f"--override={text}: {override.field} is the table's own: leave it out")
        found.append(override)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Run:
    """A row under one seed.

    Attributes:
        row: of the table.
        seed: of the run.
        places: where things are.
        overrides: the user's, for this row, by field.
        start: the run that it starts from, None where it starts from a file or from scratch.
    """

    row: Row
    seed: int
    places: Places
    overrides: Mapping[str, str]
    start: "Run | None" = None

    @property
    def name(self) -> str:
        """Of the run in messages and as `--only`."""
        return f"{self.row.name}/{self.seed}"

    @property
    def folder(self) -> pathlib.Path:
        """Where it is."""
        return self.places.workdir / self.row.name / f"seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result of the training, as JSON values."""
        fields = {field: str(value) for field, value in ({**self.row.overrides, **self.overrides}).items()}
        start: Any = self.start.settings if self.start else self.row.start
        # A row without a config trains nothing.
        kept = {field: value for field, value in fields.items() if self.row.config and not _matches(field, _FREE)}
        return {"config": self.row.config, "seed": self.seed, "start": start, "overrides": kept}

    @property
    def scoring(self) -> dict[str, str]:
        """Fields of the evaluation that its result depends on."""
        chosen = {field: value for field, value in self.overrides.items() if _matches(field, ("eval.*",))}
        return {field: value for field, value in chosen.items() if field not in _NO_SCORE}

    def train_command(self) -> list[str]:
        """The command that trains, and goes on where it was stopped; empty for a row that is only scored."""
        if not self.row.config:
            return []
        start = self._start()
        fields: dict[str, Any] = {"seed": self.seed, **({"pretrained": start} if start else {}), **self.row.overrides}
        return self._command(self.row.config, TRAIN, {**fields, **self.overrides})

    def score_command(self) -> list[str]:
        """The command that scores the last checkpoint; empty for a row that only prepares others."""
        if not self.row.scored_on:
            return []
        checkpoint = str(self.folder / TRAIN) if self.row.config else self._start()
        chosen = {field: value for field, value in self.overrides.items() if _matches(field, _SCORING)}
        return self._command(f"evaluate.py:{self.row.scored_on}", SCORE, {"checkpoint": checkpoint, **chosen})

    def _command(self, config: str, stage: str, fields: Mapping[str, Any]) -> list[str]:
        given = {"data_dir": self.places.data_dir, **fields}
        return [
            *(*MAIN, f"--config=configs/{config}", f"--workdir={self.folder / stage}"),
            *(f"--config.{field}={value}" for field, value in given.items()),
        ]

    def _start(self) -> str:
        if self.start is not None:
            return str(self.start.folder / TRAIN)
        if not self.row.start:
            return ""
        return str((self.places.weights or pathlib.Path("WEIGHTS")) / self.row.start)

    def check(self) -> None:
        """Looks for what the run needs before it is started.

        Raises:
            ConfigError: the folder of weights was not given.
            DataError: a data set or a file of weights is not there, or the folder has a run of other settings.
        """
        if self.row.start and self.places.weights is None:
            raise ConfigError(f"needs {self.row.start}: give its folder as --weights=DIR")
        if self.row.start and not pathlib.Path(self._start()).is_file():
            raise DataError(f"{self._start()}: no such file: the row starts from it; README.md, Weights, says whence")
        for name in dict.fromkeys((*self.row.trains_on, *filter(None, [self.row.scored_on]))):
            split_names(self.places.data_dir, name)
        note = self.note()
        if note and note["settings"] != self.settings:
            raise DataError(
                f"{self.folder}: is a run of other settings ({_difference(note['settings'], self.settings)}): give "
                "these again, or another --workdir, or remove it"
            )

    def note(self) -> dict[str, Any]:
        """The contents of `run.json`, empty where there is none yet.

        Raises:
            DataError: it is damaged.
        """
        path = self.folder / NOTE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or not {"settings", "trained", "scored", "seconds"} <= found.keys():
                raise ValueError("not a note of a run")
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is damaged ({' '.join(str(error).split())}): remove {self.folder}") from error
        return found

    def write_note(self, note: Mapping[str, Any]) -> None:
        """Writes `run.json`, whole or not at all."""
        with atomic_write(self.folder / NOTE) as part:
            part.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")

    def results(self) -> dict[str, Any] | None:
        """The score, None where there is none yet, or only one by other settings."""
        note = self.note()
        if not note or note["settings"] != self.settings or note["scored"] != self.scoring:
            return None
        try:
            return json.loads((self.folder / SCORE / "results.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None

    @property
    def is_trained(self) -> bool:
        """Whether nothing is left to train."""
        if not self.row.config:
            return True
        note = self.note()
        return bool(note) and note["settings"] == self.settings and note["trained"]

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.is_trained and (not self.row.scored_on or self.results() is not None)

    def status(self) -> str:
        """How far it is, in a few words."""
        note = self.note()
        if note and note["settings"] != self.settings:
            return "has other settings"
        if self.is_done:
            return "done"
        if note and self.row.config and self.is_trained:
            return "trained, not scored"
        return "interrupted" if note else "missing"


def runs_of(table: Table, places: Places, overrides: Sequence[Override]) -> list[Run]:
    """The runs of a table: the first seed of every row, then the second, each after the one that it starts from."""
    found: dict[tuple[str, int], Run] = {}
    for number in range(max(len(row.seeds) for row in table.rows)):
        for row in table.rows:
            if number >= len(row.seeds):
                continue
            seed = row.seeds[number]
            own = {o.field: o.value for one in (False, True) for o in overrides if _is_for(o, row, one)}
            start = found[row.start_row, seed] if row.start_row else None
            found[row.name, seed] = Run(row, seed, places, own, start)
    return list(found.values())


def chosen(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs of some rows (`ROW`, or `ROW/SEED`), and those that they start from; all where none is named.

    Raises:
        ConfigError: there is no such row.
    """
    if not only:
        return list(runs)
    wanted: set[str] = set()
    for name in only:
        matching = [run for run in runs if name in (run.row.name, run.name)]
        if not matching:
            known = ", ".join(dict.fromkeys(run.row.name for run in runs))
            raise ConfigError(f"--only={name}: there is no such row: use one of {known}, or ROW/SEED")
        for run in matching:
            above: Run | None = run
            while above is not None:
                wanted.add(above.name)
                above = above.start
    return [run for run in runs if run.name in wanted]


def _is_for(override: Override, row: Row, one: bool) -> bool:
    """Whether an override is for this row: for it alone, or for all rows."""
    return override.row == row.name if one else override.row is None


def _matches(field: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the settings of two runs."""
    parts = [f"{name} was {before.get(name)!r}" for name in ("config", "seed") if before.get(name) != now[name]]
    first, second = before.get("start"), now["start"]
    if isinstance(first, dict) and isinstance(second, dict):
        parts += [f"in its start: {_difference(first, second)}"] if first != second else []
    elif first != second:
        parts.append("its start was another")
    then, these = before.get("overrides", {}), now["overrides"]
    parts += [
        f"{field} was {then.get(field, 'not set')}, now {these.get(field, 'not set')}"
        for field in sorted({*then, *these})
        if then.get(field) != these.get(field)
    ]
    return "; ".join(parts)
