# SPDX-License-Identifier: Apache-2.0
"""Tables as the page shows them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; without a head, facts in two columns.

    Columns of ``words`` are set to the left; the others are numbers, set to the right.

    Attributes:
        caption: What it holds.
        head: Titles of the columns.
        rows: Cells.
        words: Columns of words.
        best: Cells ``(row, column)`` in bold.
        dense: Set close, for tables of many short numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: Collection[int] = (0,)
    best: Collection[tuple[int, int]] = ()
    dense: bool = False

    @classmethod
    def of(cls, caption: str, rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> Table | None:
        """From rows whose first is the head; None if there are no others."""
        return cls(caption, rows[0], rows[1:], words) if len(rows) > 1 else None

    @property
    def cells(self) -> int:
        """How many it has."""
        return sum(map(len, self.rows))


MOST_CELLS = 40_000
"""Cells of the tables below one picture: more are read by nobody, and make the page slow."""


def readable(tables: Sequence[Table]) -> tuple[Table, ...]:
    """Tables that say the same as a picture, or none where they are too large."""
    return tuple(tables) if sum(table.cells for table in tables) <= MOST_CELLS else ()


def lowest(rows: Sequence[Sequence[float | None]], skip: int = 1) -> list[tuple[int, int]]:
    """Places of the lowest number of each row, where there are several to choose from; ``skip`` columns stand before.

    Equal numbers are all the lowest.
    """
    places = []
    for row, values in enumerate(rows):
        known = [value for value in values if value is not None]
        if len(known) > 1 and min(known) < max(known):
            places += [(row, skip + n) for n, value in enumerate(values) if value == min(known)]
    return places
