# SPDX-License-Identifier: Apache-2.0
"""Maps with layers down and experts, domains or numbers of experts across. Darker is more."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...planning.sensitivity import ALL, MethodSensitivity
from ...storage.values import Json
from .drawing import (
    COLOURS,
    INK,
    NARROW,
    PRUNED,
    RETAINED,
    TINY,
    WIDTH,
    Gallery,
    Picture,
    every,
    legend,
    paint,
    sheet,
    two_hues,
    write_in_cells,
)
from .tables import Table
from .text import MISSING, number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_NAME = 16  # characters of a column's name in a figure


@dataclass(frozen=True)
class Map:
    """One map ``(rows, columns)``, NaN where there is nothing, and the lengths of bars beside its rows."""

    title: str
    layers: Sequence[int]
    columns: Sequence[str]
    values: np.ndarray
    counts: np.ndarray | None = None


def draw_all(
    gallery: Gallery,
    name: str,
    what: str,
    maps: Sequence[Map],
    make: Callable[..., Figure],
    *args: Any,
    tables: Callable[[Sequence[Map]], Sequence[Table]],
) -> list[Picture]:
    """Pictures of maps, each of as many as fit on a printed page, with their numbers as tables.

    Args:
        gallery: Draws them.
        name: Of their files, before the number of each.
        what: They show, in words.
        maps: The maps.
        make: One of the functions below.
        args: Of that function, after the maps.
        tables: The tables of some of the maps.
    """
    many = 6 if max(map(_height, maps)) < 2.6 else 2
    pages = [maps[start : start + many] for start in range(0, len(maps), many)]
    titles = ("; ".join(m.title for m in page) for page in pages)
    alts = [f"{what}: {shown}." for shown in titles]
    return [
        gallery.draw(f"{name}-{n}", alts[n - 1], make, page, *args, tables=tables(page))
        for n, page in enumerate(pages, 1)
    ]


def as_tables(maps: Sequence[Map], words: Callable[[float], str], across: str, what: str | None = None) -> list[Table]:
    """A table for each map, with the words that stand in its cells where there is room for them.

    Args:
        maps: The maps.
        words: A value as text.
        across: What the columns are.
        what: The values are; by default nothing is added to the titles.
    """
    return [
        Table(
            f"{m.title}: {what}" if what else m.title,
            [f"layer, {across}", *m.columns],
            [
                [layer, *(words(float(value)) if math.isfinite(value) else MISSING for value in row)]
                for layer, row in zip(m.layers, m.values, strict=True)
            ],
            dense=True,
        )
        for m in maps
    ]


def _height(m: Map) -> float:
    """Inches of a map: all rows take little together, as long as they can be told apart."""
    rows = len(m.layers)
    return rows * min(0.2, max((2.4 if m.counts is None else 4.2) / rows, 0.035))


def _draw(
    maps: Sequence[Map], norm: Any, what: str, words: Callable[[float], str] | None, width: float, cmap: Any = None
) -> Any:
    """Maps side by side, with the values written in where there is room: the figure, its axes and the last image."""
    columns = max(m.values.shape[1] for m in maps)
    per_row = 3 if columns <= 12 else 1 if columns > 24 and maps[0].counts is not None else 2
    per_row = per_row if width > NARROW else 1
    across, height = width / per_row - (0.6 if maps[0].counts is None else 1.0), max(map(_height, maps))
    names = max(len(short(name, _NAME)) for m in maps for name in m.columns)
    numbered = maps[0].columns[0].isdigit()
    upright = not numbered and 0.07 * names > across / columns
    lines = math.ceil(len(maps) / per_row)
    figure = sheet(0.7 + lines * (height + 0.62 + 0.07 * names * upright), width)
    panels = figure.subplots(lines, per_row, squeeze=False).ravel()
    for axes, m in zip(panels, maps, strict=False):
        image = paint(axes, m.values, norm, (across, height), cmap)
        rows = every(m.layers, int(height / 0.13))
        axes.set_yticks(rows, [str(m.layers[row]) for row in rows])
        room = across / 0.22 if numbered else across / 0.13 if upright else columns
        places = every(range(len(m.columns)), int(room))
        axes.set_xticks(places, [short(m.columns[n], _NAME) for n in places], rotation=90 * upright)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.tick_params(labelsize=TINY)
        axes.set(xlabel=what, ylabel="layer", title=short(m.title, int(9 * width) // per_row))
        if m.counts is not None:
            _draw_bars(axes, m.counts, columns, height / len(m.layers) >= 0.125)
        texts = [words(float(v)) for v in m.values[np.isfinite(m.values)]] if words else [""]
        if words and height / len(m.layers) >= 0.14 and across / columns >= 0.055 * max(map(len, texts)) + 0.03:
            write_in_cells(axes, image, words, TINY - 0.5)
    for axes in panels[len(maps) :]:
        axes.remove()
    return figure, panels[: len(maps)].tolist(), image


def _draw_bars(axes: Axes, counts: np.ndarray, most: int, written: bool) -> None:
    beside = axes.inset_axes((1.03, 0, 0.28, 1), sharey=axes)
    bars = beside.barh(range(len(counts)), counts, height=0.7, color=RETAINED)
    beside.spines[:].set_visible(False)
    beside.tick_params(left=False, labelleft=False, length=0, pad=2, labelsize=TINY)
    beside.xaxis.tick_top()
    beside.xaxis.set_label_position("top")
    beside.set(xlabel="retained", xlim=(0, 1.4 * most), xticks=[] if written else [0, most])
    if written:
        beside.bar_label(bars, padding=2, fontsize=TINY)


def retained(maps: Sequence[Map], width: float = WIDTH) -> Figure:
    """Which experts are retained (1) and pruned (0), and beside each map how many of every layer."""
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    cmap = ListedColormap([PRUNED, RETAINED]).with_extremes(bad="white")
    figure = _draw(maps, Normalize(0, 1), "expert", None, width, cmap)[0]
    legend(figure, [Patch(color=RETAINED, label="retained"), Patch(color=PRUNED, label="pruned")], handlelength=1.0)
    return figure


def percent(value: float) -> str:
    """A percentage as cells and tables have it."""
    return f"{value:.0f}"


def tenths(value: float) -> str:
    """The same of small ones."""
    return f"{value:.1f}"


def shares(
    maps: Sequence[Map],
    low: float,
    top: float,
    label: str,
    what: str,
    power: float = 1.0,
    mark: tuple[float, str] | None = None,
    words: Callable[[float], str] = percent,
    width: float = WIDTH,
) -> Figure:
    """Percentages from ``low`` to ``top``, which hold all of them, ``what`` across.

    A ``power`` of 0.5 is for values that are crowded near 0: as in a map of rain, the scale follows their roots. A
    ``mark`` is a value that the scale shows by a line, and what it is. ``words`` is a value as text.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.lines import Line2D

    top = max([top, *(float(np.nanmax(m.values)) for m in maps if np.isfinite(m.values).any())])
    figure, panels, image = _draw(maps, PowerNorm(power, vmin=low, vmax=top), what, words, width)
    bar = _scale(figure, panels, image, label, format="%g")
    if mark is not None and low < mark[0] < top:
        bar.ax.axvline(mark[0], color=COLOURS[1], linewidth=1.6, gid="mark")
        legend(figure, [Line2D([], [], color=COLOURS[1], linewidth=1.6, label=mark[1])])
    return figure


def error(value: float) -> str:
    """A relative error as cells and tables have it."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 999.95 else number(value, 2)


NO_OUTPUT = 1.0
"""The relative error of a layer that gives nothing."""


def errors(maps: Sequence[Map], top: float, label: str, width: float = WIDTH) -> Figure:
    """Relative errors from 0 to ``top``, which holds all of them; those above ``NO_OUTPUT`` in another hue.

    Up to there the scale is even, and above it logarithmic: the largest may be many times what matters.
    """
    from matplotlib.colors import FuncNorm
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    top = max([top, 2.0, *(float(np.nanmax(m.values)) for m in maps if np.isfinite(m.values).any())])

    def forward(value: Any) -> Any:
        value = np.asarray(value, dtype=float)
        return np.where(value <= 1, value / 2, 0.5 + 0.5 * np.log(np.maximum(value, 1)) / math.log(top))

    def backward(place: Any) -> Any:
        place = np.asarray(place, dtype=float)
        return np.where(place <= 0.5, 2 * place, np.exp((2 * np.maximum(place, 0.5) - 1) * math.log(top)))

    norm, cmap = FuncNorm((forward, backward), vmin=0.0, vmax=top), two_hues()
    figure, panels, image = _draw(maps, norm, "expert", error, width, cmap)
    steps = [step for step in (2.0, 5.0, 10.0, 100.0, 1e4, 1e6, 1e9) if 1.3 * step < top]
    ticks = [0.0, 0.5, NO_OUTPUT, *(steps if len(steps) < 4 else steps[2:][-3:]), top]
    bar = _scale(figure, panels, image, label, ticks=ticks, format=FuncFormatter(lambda value, _: f"{value:.3g}"))
    bar.ax.axvline(NO_OUTPUT, color=INK, linewidth=1.6, gid="mark")
    named = (0.3, "below 1: better than no output"), (0.75, "above 1: worse than no output")
    legend(figure, [Patch(color=cmap(place), label=name) for place, name in named], handlelength=1.0)
    return figure


def _scale(figure: Figure, panels: Sequence[Axes], image: Any, label: str, **options: Any) -> Any:
    """A scale of colours above all maps."""
    width = figure.get_figwidth()
    place: Json = {"location": "top", "anchor": (0.0, 0.0), "shrink": 0.5 if width > NARROW else 0.95, "aspect": 30}
    bar = figure.colorbar(image, ax=panels, **place, **options)
    bar.set_label("\n".join(textwrap.wrap(label, int(14 * width))), loc="left")
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=TINY, length=2, pad=1.5)
    return bar


def cost_map(title: str, measured: MethodSensitivity) -> Map:
    """What it costs to prune each layer alone, by experts retained; NaN where it was not measured."""
    layers = sorted(measured.layers)
    counts = sorted({count for layer in measured.layers.values() for count in layer.kl}, reverse=True)
    costs = [[measured.layers[n].kl.get(count, {}).get(ALL, math.nan) for count in counts] for n in layers]
    return Map(title, layers, list(map(str, counts)), np.array(costs))


def costs(maps: Sequence[Map], width: float = WIDTH) -> Figure:
    """Divergence when one layer alone is pruned, by layer and experts retained."""
    from matplotlib.colors import LogNorm

    values = np.concatenate([m.values.ravel() for m in maps])
    positive = values[np.isfinite(values) & (values > 0)]
    high = float(positive.max()) if len(positive) else 1.0
    # Four powers of ten are as much as colours tell apart; what is smaller costs nothing.
    low = min(max(float(positive.min(initial=high)), high / 1e4), high / 10)
    figure, panels, image = _draw(maps, LogNorm(low, high, clip=True), "experts retained", cost, width)
    below = bool((values[np.isfinite(values)] < low * (1 - 1e-9)).any())
    label = "KL(original || pruned) of the next token, nats per token"
    if below:
        label += f" (the end: less than {number(low, 2)})"
    _scale(figure, panels, image, label, format="%g", extend="min" if below else "neither")
    return figure


def cost(value: float) -> str:
    """A cost in few characters."""
    return number(value, 2) if value >= 0.0995 else f"{value:.3f}" if value >= 0.0005 else "0"
