"""Tables that fit a terminal, and say everything where their reader is a program."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence

import click

from .rendering import table

#: The fewest characters that a name is cut to, for a table to fit a terminal.
LEAST_OF_A_NAME = 12


def fitted_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, names: Sequence[int]
) -> Iterator[str]:
    """The lines of a table, its head in bold; in a terminal no wider than that, if possible.

    :param names: the columns that may be cut; what stands in the others is a number or short.
    """
    if sys.stdout.isatty():
        rows = _fitted(heads, rows, names, shutil.get_terminal_size().columns)

    heads, *rows = _aligned([heads, *rows], names)
    head, *lines = table(heads, rows)
    yield click.style(head, bold=True)
    yield from lines


def span(seconds: float | None) -> str:
    """A time as it is said: in the largest unit of which there are two."""
    if seconds is None:
        return "-"

    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"

    return f"{seconds:.0f} s"


def _aligned(lines: Sequence[Sequence[str]], names: Sequence[int]) -> list[list[str]]:
    """Lines whose numbers stand with their last digits one under the other."""
    widths = _widths(lines)
    return [
        [
            cell if column in names else cell.rjust(widths[column])
            for column, cell in enumerate(line)
        ]
        for line in lines
    ]


def _fitted(
    heads: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[int], most: int
) -> list[list[str]]:
    """Rows whose names are cut, the longest first, until the table fits."""
    widths = _widths([heads, *rows])

    while sum(widths) + 2 * (len(widths) - 1) > most:
        longest = max(names, key=widths.__getitem__)

        if widths[longest] <= LEAST_OF_A_NAME:
            break

        widths[longest] -= 1

    return [[_cut(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _cut(text: str, most: int) -> str:
    """The text without its middle: names differ at their ends."""
    if len(text) <= most:
        return text

    tail = (most - 3) // 2
    return f"{text[: most - 3 - tail]}...{text[-tail:]}"
