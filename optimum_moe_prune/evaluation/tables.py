# SPDX-License-Identifier: Apache-2.0
"""Tables of text, for terminals and in Markdown, in which the best of a row can stand out."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import one_line

_LINE = 100  # characters of words below tables
_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Table:
    """Rows of text, the head first.

    Attributes:
        rows: Of equal length.
        best: Row and column of the cells that stand out.
    """

    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    def __bool__(self) -> bool:
        return len(self.rows) > 1

    def text(self, bold: bool = False, width: int | None = None) -> str:
        """For a terminal; wider tables are continued below, the first column repeated.

        Args:
            bold: Whether the best is printed bold.
            width: Characters in a line.
        """
        parts = []
        for columns in self._folded(width):
            rows = [[row[i] for i in columns] for row in self.rows]
            marks = {(r, columns.index(c)) for r, c in self.best if c in columns} if bold else set()
            parts.append("\n".join(aligned(rows, marks)))
        return "\n\n".join(parts)

    def markdown(self) -> str:
        """In Markdown, the best in bold."""
        return markdown_table(self.rows, self.best)

    def transposed(self) -> Table:
        """With its columns as rows."""
        rows = [list(row) for row in zip(*self.rows, strict=True)]
        return Table(rows, frozenset((column, row) for row, column in self.best))

    def _folded(self, width: int | None) -> list[list[int]]:
        """The columns of each part that fits."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        parts: list[list[int]] = [[0]]
        used = widths[0]
        for column, more in enumerate(widths[1:], 1):
            if width is not None and used + 2 + more > width and len(parts[-1]) > 1:
                parts.append([0])
                used = widths[0]
            parts[-1].append(column)
            used += 2 + more
        return parts


def best_of(
    rows: Sequence[Sequence[str]], number: Callable[[str], float], which: Callable[[Iterable[float]], float] = min
) -> frozenset[tuple[int, int]]:
    """The cells of a table whose number, as it is shown, is the best of its row; none where all are alike.

    Args:
        rows: The head first; the first column is no number, and what ``number`` cannot read is none.
        number: Reads a cell; ValueError where it is none.
        which: ``min`` or ``max``.
    """
    found = set()
    for place, row in enumerate(rows[1:], 1):
        numbers = {}
        for column, cell in enumerate(row[1:], 1):
            try:
                numbers[column] = number(cell)
            except ValueError:
                continue
        if len(set(numbers.values())) > 1:
            best = which(numbers.values())
            found |= {(place, column) for column, value in numbers.items() if value == best}
    return frozenset(found)


def aligned(rows: Sequence[Sequence[str]], bold: Iterable[tuple[int, int]] = ()) -> list[str]:
    """A table as lines of text: the first column to the left, the others to the right.

    Args:
        rows: The head first.
        bold: Row and column of cells printed bold.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marked = set(bold)

    def cell(text: str, row: int, column: int) -> str:
        padding = " " * (widths[column] - len(text))
        shown = f"{_BOLD}{text}{_PLAIN}" if (row, column) in marked else text
        return shown + padding if column == 0 else padding + shown

    return ["  ".join(cell(text, r, c) for c, text in enumerate(row)).rstrip() for r, row in enumerate(rows)]


def filled(words: str, width: int | None = None) -> str:
    """Words below a table, in lines of no more characters than fit; a factor (x 1.35) stays in one."""
    lines = min(width or _LINE, _LINE)
    parts = (textwrap.fill(line.replace("x ", "x\0"), lines) for line in words.splitlines())
    return "\n".join(parts).replace("\0", " ")


def markdown_table(rows: list[list[str]], bold: Iterable[tuple[int, int]] = ()) -> str:
    """A table of text in Markdown: the first column to the left, the others to the right."""
    marked = set(bold)
    lines = [
        "| " + " | ".join(f"**{_cell(c)}**" if (r, i) in marked else _cell(c) for i, c in enumerate(row)) + " |"
        for r, row in enumerate(rows)
    ]
    rule = "|" + "|".join("---" if i == 0 else "--:" for i in range(len(rows[0]))) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(text: str) -> str:
    plain = one_line(text).replace("\\", "\\\\").replace("<", "&lt;")
    return plain.replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")
