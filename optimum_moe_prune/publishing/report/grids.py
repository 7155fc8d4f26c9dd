# SPDX-License-Identifier: Apache-2.0
"""Maps with layers down and few columns: domains, or numbers of retained experts. Darker is more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import TALLEST, TEXT, TINY, WIDTH, Sheet, bar_of_colours, label_map, paint, write_in_cells
from .data import Reduced
from .measured import ALL, LayerCurves
from .words import SMALL, fitting, number, short, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BETWEEN, _SCALE, _TITLE = 0.05, 0.75, 0.2


@dataclass(frozen=True)
class _Grid:
    """One map: its title, rows, columns, values, and a row of means below."""

    name: str
    layers: Sequence[int]
    columns: list[str]
    values: np.ndarray
    mean: np.ndarray | None = None


def coverage(names: Sequence[str], tables: Sequence[np.ndarray], reduced: Reduced) -> Figure:
    """Share of each domain's routing that went to experts a plan retains, in percent: one map for each plan.

    Args:
        names: Of the plans.
        tables: ``(L, D)`` for each, from 0 to 1.
        reduced: Whose layers and domains these are.
    """
    from matplotlib.colors import Normalize

    columns = [short(domain, 16) for domain in reduced.domains]
    grids = [
        _Grid(name, reduced.layers, columns, 100 * t, 100 * t.mean(axis=0, keepdims=True))
        for name, t in zip(names, tables, strict=True)
    ]
    least = 100 * min(float(np.nanmin(table)) for table in tables)
    step = 10 if least >= 50 else 20
    low = step * math.floor(min(least, 90) / step)
    ticks = [(v, f"{v}%") for v in range(low, 101, step)]
    label = "share of the domain's routing that went to retained experts"
    return _draw(grids, _COVERAGE, Normalize(low, 100), ticks, label, "{:.0f}".format)


def layer_costs(curves: Sequence[LayerCurves], domain: str) -> Figure:
    """Divergence when one layer alone is pruned, by layer and experts retained: one map for each method."""
    from matplotlib.colors import LogNorm

    measured = np.concatenate([found.kl[domain].ravel() for found in curves])
    positive = measured[np.isfinite(measured) & (measured > 0)]
    high = float(positive.max()) if len(positive) else 1.0
    # Four powers of ten are as much as colours tell apart; what is smaller costs nothing.
    low = min(max(float(positive.min()) if len(positive) else 0.1, high / 1e4), high / 2)
    steps = [v for p in range(-12, 6) for v in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if low <= v <= high]
    if len(steps) > 7:
        steps = [v for v in steps if f"{v:e}".startswith("1")]
    ticks = [(v, number(v, 1 if v in steps else 2)) for v in (steps if len(steps) > 1 else (low, high))]
    grids = [
        _Grid(short(found.method), found.layers, list(map(str, found.counts)), found.kl[domain]) for found in curves
    ]
    label = "KL divergence of the model's output, nats per token"
    return _draw(grids, _COSTS, LogNorm(low, high, clip=True), ticks, label, _cost)


def _cost(value: float) -> str:
    """A cost in few characters; the table has more."""
    return number(value, 2) if value >= 0.0995 else f"{value:.3f}" if value >= 0.0005 else "0"


# ------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Kind:
    """What all maps of a kind share: the widest cell in inches, what the columns are, whether there are means."""

    widest: float
    what: str
    means: bool


_COVERAGE, _COSTS = _Kind(0.34, "", True), _Kind(0.33, "retained", False)


class _Shape:
    """The sizes of a map, in inches.

    Attributes:
        left: Beside it, for the numbers of the layers.
        cell: Width and height of a cell.
        upright: Whether the names of the columns run upwards.
        head: Above it, for the title and the columns.
        width: Of all of it.
        height: Of all of it.
    """

    def __init__(self, kind: _Kind, layers: int, columns: Sequence[str]) -> None:
        self.left = max(0.5, text_width([kind.what]) + 0.1)
        self.cell = min(kind.widest, (WIDTH - self.left - 0.1) / len(columns)), min(0.2, max(5.2 / layers, 0.05))
        longest = text_width(columns)
        self.upright = longest > self.cell[0] - 0.03
        self.head = _TITLE + (longest + 0.06 if self.upright else 0.17)
        self.width = self.left + self.cell[0] * len(columns) + _BETWEEN
        self.height = self.head + self.cell[1] * layers + (0.25 if kind.means else 0.0) + 0.22

    @property
    def per_row(self) -> int:
        """How many stand side by side."""
        return max(1, int((WIDTH + _BETWEEN) / self.width))

    @property
    def per_figure(self) -> int:
        """How many fit on a page."""
        return self.per_row * max(1, int((TALLEST - _SCALE) / self.height))


def coverage_pages(names: Sequence[str], reduced: Reduced) -> list[list[str]]:
    """Names of the plans that each figure of :func:`coverage` shows, all of them in turn."""
    many = _Shape(_COVERAGE, len(reduced.layers), [short(domain, 16) for domain in reduced.domains]).per_figure
    return [list(names[start : start + many]) for start in range(0, len(names), many)]


def cost_pages(curves: Sequence[LayerCurves]) -> list[list[LayerCurves]]:
    """The curves that each figure of :func:`layer_costs` shows, all of them in turn."""
    many = _shape(_COSTS, [_Grid("", c.layers, list(map(str, c.counts)), c.kl[ALL]) for c in curves]).per_figure
    return [list(curves[start : start + many]) for start in range(0, len(curves), many)]


def _shape(kind: _Kind, grids: Sequence[_Grid]) -> _Shape:
    """A shape that holds each of some maps."""
    return _Shape(kind, max(len(g.layers) for g in grids), max((g.columns for g in grids), key=len))


def _draw(
    grids: Sequence[_Grid],
    kind: _Kind,
    norm: Any,
    ticks: Sequence[tuple[float, str]],
    label: str,
    words: Callable[[float], str],
) -> Figure:
    """Maps side by side as far as they fit, on one scale, with the values written in where there is room."""
    shape = _shape(kind, grids)
    width, height = shape.cell
    sheet = Sheet(_SCALE + math.ceil(len(grids) / shape.per_row) * shape.height)
    image: Any = None
    for place, grid in enumerate(grids):
        row, column = divmod(place, shape.per_row)
        left, top = column * shape.width + shape.left, _SCALE + row * shape.height
        size = len(grid.columns) * width, len(grid.layers) * height
        sheet.text(left, top, fitting(grid.name, max(size[0], 1.0), TEXT, bold=True), fontweight="bold")
        axes = sheet.axes(left, top + shape.head, *size)
        image = paint(axes, grid.values, shape.cell, norm=norm)
        label_map(axes, shape.cell, grid.layers, grid.columns, kind.what, shape.upright)
        _write(axes, image, grid.values, shape.cell, words)
        if grid.mean is not None:
            below = sheet.axes(left, top + shape.head + size[1] + 0.07, size[0], 0.18)
            image = paint(below, grid.mean, (width, 0.18), norm=norm)
            below.set_axis_off()
            look: dict[str, Any] = {"ha": "right", "va": "center_baseline", "fontsize": SMALL}
            below.annotate("mean", (0, 0.5), (-3, 0), "axes fraction", "offset points", **look)
            _write(below, image, grid.mean, (width, 0.18), words)
    bar_of_colours(sheet, image, (shape.left, 0.26, 3.4, 0.12), label, ticks)
    return sheet.figure


def _write(
    axes: Axes, image: Any, values: np.ndarray, cell: tuple[float, float], words: Callable[[float], str]
) -> None:
    """Write the values into their cells, if there is room."""
    size = TINY if cell[1] > 0.15 else TINY - 0.5
    room = cell[0] - text_width([words(float(v)) for v in values[np.isfinite(values)]], size)
    if cell[1] >= 0.13 and room > 0.01:
        write_in_cells(axes, image, values, words, size)
