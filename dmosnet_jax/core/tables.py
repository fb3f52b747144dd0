"""Measurements as aligned text and as CSV."""

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dmosnet_jax.core.files import atomic_write

Row = Mapping[str, Any]


def as_text(rows: Sequence[Row]) -> str:
    """A table with the first row's keys as header, numbers to the right."""
    header = list(rows[0])
    cells = [header, *([cell(row[key]) for key in header] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    right = [all(isinstance(row[key], int | float) or row[key] is None for row in rows) for key in header]
    lines = []
    for line in cells:
        padded = [
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as text: thousands apart, two decimals, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def publish(rows: Sequence[Row], output: str) -> None:
    """Prints the table, and writes it as CSV where `output` is not empty.

    Raises:
        DataError: the file can't be written.
    """
    print(as_text(rows))
    if output:
        write_csv(output, rows)
        print(f"written: {output}")


def write_csv(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Writes the rows with the first row's keys as header; None is an empty field.

    Raises:
        DataError: the file can't be written.
    """
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
