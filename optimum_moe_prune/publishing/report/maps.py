# SPDX-License-Identifier: Apache-2.0
"""Maps with layers down and experts across, one cell each. Darker is more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...plan import PruningPlan
from .canvas import (
    INK,
    MUTED,
    PRUNED,
    RETAINED,
    TALLEST,
    TEXT,
    TINY,
    WIDTH,
    Sheet,
    bar_of_colours,
    label_map,
    paint,
    write_in_cells,
)
from .data import Plans, Reduced, retained_grid
from .words import SMALL, fitting, number, text_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEFT, _TITLE, _NUMBERS, _BELOW = 0.5, 0.2, 0.17, 0.22  # inches: layers left of a map; title, experts above; below


def _row_height(layers: int, most: float, total: float) -> float:
    """The height of a row, in inches: so much at most, and so much for all rows together while they can be told."""
    return min(most, max(total / layers, 0.03))


# ------------------------------------------------------------------------------------------- retained experts


def pages(plans: Plans) -> list[list[str]]:
    """Names of the plans that each figure of :func:`retained` shows: as many as fit on a page, all of them in turn."""
    per_row, _, height = _retained_shape(plans)
    per_figure = per_row * max(1, int(TALLEST / height))
    names = list(plans)
    return [names[start : start + per_figure] for start in range(0, len(names), per_figure)]


def _retained_shape(plans: Plans) -> tuple[int, float, float]:
    """How many maps stand side by side, the height of their rows, and their own with all around them."""
    experts = max(max(plan.original_num_experts.values()) for plan in plans.values())
    layers = max(len(plan.retained) for plan in plans.values())
    row = _row_height(layers, 0.22, 4.6)
    side_by_side = 3 if experts <= 9 else 2 if experts <= 20 else 1
    return min(len(plans), side_by_side), row, _TITLE + _NUMBERS + layers * row + _BELOW


def retained(plans: Plans) -> Figure:
    """Which experts each plan retains, and beside each map how many of every layer.

    The grid of each map can be read back from its image: 1 retained, 0 pruned, masked where there is no expert.
    """
    from matplotlib.patches import Patch

    per_row, row_height, height = _retained_shape(plans)
    legend, panel = 0.3, WIDTH / per_row
    sheet = Sheet(legend + math.ceil(len(plans) / per_row) * height)
    handles = [Patch(color=RETAINED, label="retained"), Patch(color=PRUNED, label="pruned")]
    sheet.legend(handles, _LEFT, handlelength=1.0, handleheight=1.0)
    for place, (name, plan) in enumerate(plans.items()):
        row, column = divmod(place, per_row)
        _retained_panel(sheet, name, plan, (column * panel + _LEFT, legend + row * height), panel - _LEFT, row_height)
    return sheet.figure


def _retained_panel(
    sheet: Sheet, name: str, plan: PruningPlan, corner: tuple[float, float], width: float, row_height: float
) -> None:
    """One map, in inches: its upper left corner with the title, and the width there is for it and its bars."""
    from matplotlib.colors import ListedColormap

    grid = retained_grid(plan)
    layers, experts = grid.shape
    bars, gap, after = (0.75, 0.1, 0.35) if width > 3 else (0.4, 0.08, 0.3)
    cell = min(0.24, (width - bars - gap - after) / experts), row_height
    left, top = corner[0], corner[1] + _TITLE + _NUMBERS
    sheet.text(left, corner[1], fitting(name, width - 0.2, TEXT, bold=True), fontweight="bold")
    kept = f"{np.nansum(grid):.0f} of {np.isfinite(grid).sum()} experts"
    wide = experts * cell[0] + gap + bars + after - 0.1
    if text_width([name], TEXT, bold=True) + text_width([kept], TINY) + 0.1 < wide:
        sheet.text(left + wide, corner[1] + 0.02, kept, ha="right", fontsize=TINY, color=MUTED)
    axes = sheet.axes(left, top, experts * cell[0], layers * cell[1])
    paint(axes, grid, cell, cmap=ListedColormap([PRUNED, RETAINED]), vmin=0, vmax=1)
    label_map(axes, cell, sorted(plan.retained), experts)

    counts = np.nansum(grid, axis=1)
    beside = sheet.axes(left + experts * cell[0] + gap, top, bars, layers * cell[1], sharey=axes)
    beside.barh(range(layers), counts, height=0.7, color=RETAINED)
    beside.set_xlim(0, experts)
    beside.xaxis.tick_top()
    beside.tick_params(left=False, labelleft=False, length=0, pad=2, labelsize=TINY)
    for side in beside.spines.values():
        side.set_visible(False)
    if cell[1] >= 0.125:
        beside.set_xticks([])
        for row, count in enumerate(counts):
            beside.text(count + 0.03 * experts / bars, row, f"{count:.0f}", va="center_baseline", fontsize=TINY)
    else:
        beside.set_xticks([0, experts // 2, experts])
        beside.grid(axis="x")
        beside.set_axisbelow(True)


# ------------------------------------------------------------------------------------------- by domain

_SCALE = 0.75  # inches for the colours above all maps


def domain_pages(reduced: Reduced) -> list[list[int]]:
    """Positions of the domains that each figure shows: as many as fit on a page, all of them in turn."""
    columns, _, block = _domain_shape(reduced)
    per_figure = columns * max(1, int((TALLEST - _SCALE) / block))
    count = len(reduced.domains)
    return [list(range(start, min(start + per_figure, count))) for start in range(0, count, per_figure)]


def _domain_shape(reduced: Reduced) -> tuple[int, float, float]:
    """How many maps stand side by side, the height of their rows, and their own with all around them."""
    row = _row_height(len(reduced.layers), 0.2, 2.0)
    columns = min(len(reduced.domains), 3 if max(reduced.num_experts) <= 9 else 2)
    return columns, row, _TITLE + _NUMBERS + len(reduced.layers) * row + _BELOW


def routing(reduced: Reduced, positions: Sequence[int]) -> Figure:
    """Share of each domain's routing that goes to each expert, in percent: one map for each domain."""
    assert reduced.routing is not None
    values = 100 * reduced.routing
    top = _largest(values)
    ticks = [(top, f"{number(top, 2)}%")]
    for value in (50.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.0):
        if math.sqrt(value / top) < math.sqrt(ticks[0][0] / top) - 0.12:  # room for the one before
            ticks.insert(0, (value, f"{value:g}%"))
    even = 100 / reduced.num_experts[0] if len(set(reduced.num_experts)) == 1 else None
    label = "share of the domain's routing"
    # Shares are crowded near 0: as in a map of rain, the scale follows their square roots.
    return _by_domain(values, reduced, positions, _Scale(label, top, 0.5, ticks, "{:.0f}", even))


def single_error(reduced: Reduced, positions: Sequence[int]) -> Figure:
    """Relative error of a layer left with one expert, for each domain: one map for each."""
    assert reduced.error is not None
    top = min(_largest(reduced.error), max(2.0, float(np.nanpercentile(reduced.error, 98))))
    step = next(s for s in (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, top) if top / s <= 8)
    ticks = [(v, f"{v:g}") for v in np.arange(0, top * (1 + 1e-9), step).tolist()]
    label = "squared error with this expert alone / squared output of the layer"
    return _by_domain(reduced.error, reduced, positions, _Scale(label, top, 1.0, ticks, "{:.1f}"))


def _largest(values: np.ndarray) -> float:
    return float(np.nanmax(values)) or 1.0


@dataclass(frozen=True)
class _Scale:
    """The colours of maps by domain: their label, end, power and ticks, how values are written, and a mark."""

    label: str
    top: float
    power: float
    ticks: list[tuple[float, str]]
    form: str
    even: float | None = None


def _by_domain(values: np.ndarray, reduced: Reduced, positions: Sequence[int], scale: _Scale) -> Figure:
    """One map ``(L, E)`` for each domain, all on one scale."""
    from matplotlib.colors import PowerNorm

    layers, experts = values.shape[1:]
    columns, row_height, block = _domain_shape(reduced)
    panel = WIDTH / columns
    cell = min(0.3, (panel - _LEFT - 0.1) / experts), row_height
    sheet = Sheet(_SCALE + math.ceil(len(positions) / columns) * block)
    norm = PowerNorm(scale.power, vmin=0, vmax=scale.top, clip=True)
    for place, position in enumerate(positions):
        row, column = divmod(place, columns)
        left, above = column * panel + _LEFT, _SCALE + row * block
        size = experts * cell[0], layers * cell[1]
        tokens = f"{reduced.tokens[position]:,} tokens"
        room = max(size[0], 1.2) - 0.1 - text_width([tokens], TINY)
        name = fitting(reduced.domains[position], room, TEXT, bold=True)
        sheet.text(left, above, name, fontweight="bold")
        sheet.text(left + max(size[0], 1.2), above + 0.02, tokens, ha="right", fontsize=TINY, color=MUTED)
        axes = sheet.axes(left, above + _TITLE + _NUMBERS, *size)
        image = paint(axes, values[position], cell, norm=norm)
        label_map(axes, cell, reduced.layers, experts)
        if cell[0] >= 0.19 and cell[1] >= 0.14:
            write_in_cells(axes, image, values[position], scale.form.format, TINY if cell[0] > 0.25 else TINY - 0.5)
    bar = bar_of_colours(sheet, image, (_LEFT, 0.26, 3.4, 0.12), scale.label, scale.ticks)
    if scale.even is not None:
        above_bar = bar.ax.get_xaxis_transform()
        bar.ax.plot([scale.even], [1.1], "v", color=INK, markersize=4.5, clip_on=False, transform=above_bar)
        words = f"\N{BLACK DOWN-POINTING TRIANGLE} where all experts are used alike: {number(scale.even)}%"
        sheet.text(_LEFT + 3.65, 0.25, words, fontsize=SMALL)
    return sheet.figure
