# SPDX-License-Identifier: Apache-2.0
"""Maps with layers down and experts, domains or numbers of experts across. Darker is more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...planning.sensitivity import ALL, MethodSensitivity
from ...storage.values import Json
from .drawing import PRUNED, RETAINED, TINY, WIDTH, Gallery, Picture, every, legend, paint, sheet, write_in_cells
from .text import number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Map:
    """One map ``(rows, columns)``, NaN where there is nothing, and the lengths of bars beside its rows."""

    title: str
    layers: Sequence[int]
    columns: Sequence[str]
    values: np.ndarray
    counts: np.ndarray | None = None


def draw_all(
    gallery: Gallery, name: str, what: str, maps: Sequence[Map], make: Callable[..., Figure], *args: Any
) -> list[Picture]:
    """Pictures of maps, each of as many as fit on a printed page; ``make`` is one of the functions below."""
    many = 6 if max(map(_height, maps)) < 2.6 else 2
    pages = [maps[start : start + many] for start in range(0, len(maps), many)]
    titles = ("; ".join(m.title for m in page) for page in pages)
    alts = [f"{what}: {shown}. The table has the numbers." for shown in titles]
    return [gallery.draw(f"{name}-{n}", alts[n - 1], make, page, *args) for n, page in enumerate(pages, 1)]


def _height(m: Map) -> float:
    """Inches of a map: all rows take little together, as long as they can be told apart."""
    rows = len(m.layers)
    return rows * min(0.2, max((2.4 if m.counts is None else 4.2) / rows, 0.035))


def _draw(maps: Sequence[Map], norm: Any, what: str, words: Callable[[float], str] | None, cmap: Any = None) -> Any:
    """Maps side by side, with the values written in where there is room: the figure, its axes and the last image."""
    columns = max(m.values.shape[1] for m in maps)
    per_row = 3 if columns <= 12 else 1 if columns > 24 and maps[0].counts is not None else 2
    width, height = WIDTH / per_row - 0.6, max(map(_height, maps))
    names = max(len(name) for m in maps for name in m.columns)
    numbered = maps[0].columns[0].isdigit()
    upright = not numbered and 0.07 * names > width / columns
    lines = math.ceil(len(maps) / per_row)
    figure = sheet(0.7 + lines * (height + 0.62 + 0.07 * names * upright))
    panels = figure.subplots(lines, per_row, squeeze=False).ravel()
    for axes, m in zip(panels, maps, strict=False):
        image = paint(axes, m.values, norm, (width, height), cmap)
        rows = every(m.layers, int(height / 0.13))
        axes.set_yticks(rows, [str(m.layers[row]) for row in rows])
        places = every(range(len(m.columns)), int(width / 0.22) if numbered else len(m.columns))
        axes.set_xticks(places, [m.columns[n] for n in places], rotation=90 * upright)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.tick_params(labelsize=TINY)
        axes.set(xlabel=what, ylabel="layer", title=short(m.title, 72 // per_row))
        if m.counts is not None:
            _draw_bars(axes, m.counts, columns, height / len(m.layers) >= 0.125)
        texts = [words(float(v)) for v in m.values[np.isfinite(m.values)]] if words else [""]
        if words and height / len(m.layers) >= 0.14 and width / columns >= 0.055 * max(map(len, texts)) + 0.03:
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


def retained(maps: Sequence[Map]) -> Figure:
    """Which experts are retained (1) and pruned (0), and beside each map how many of every layer."""
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    cmap = ListedColormap([PRUNED, RETAINED]).with_extremes(bad="white")
    figure = _draw(maps, Normalize(0, 1), "expert", None, cmap)[0]
    legend(figure, [Patch(color=RETAINED, label="retained"), Patch(color=PRUNED, label="pruned")], handlelength=1.0)
    return figure


def shares(maps: Sequence[Map], low: float, top: float, label: str, what: str, power: float = 1.0) -> Figure:
    """Percentages or relative errors from ``low`` to ``top`` (what is beyond is as dark), ``what`` across.

    A ``power`` of 0.5 is for values that are crowded near 0: as in a map of rain, the scale follows their roots.
    """
    from matplotlib.colors import PowerNorm

    words = "{:.0f}".format if label.endswith("%") else "{:.1f}".format
    figure, panels, image = _draw(maps, PowerNorm(power, vmin=low, vmax=top, clip=True), what, words)
    beyond = "max" if max(float(np.nanmax(m.values)) for m in maps) > top * (1 + 1e-9) else "neither"
    _scale(figure, panels, image, label, extend=beyond)
    return figure


def _scale(figure: Figure, panels: Sequence[Axes], image: Any, label: str, **options: Any) -> None:
    """A scale of colours above all maps."""
    place: Json = {"location": "top", "anchor": (0.0, 0.0), "shrink": 0.5, "aspect": 30, "format": "%g"}
    bar = figure.colorbar(image, ax=panels, **place, **options)
    bar.set_label(label, loc="left")
    bar.outline.set_visible(False)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=TINY, length=2, pad=1.5)


def cost_map(title: str, measured: MethodSensitivity) -> Map:
    """What it costs to prune each layer alone, by experts retained; NaN where it was not measured."""
    layers = sorted(measured.layers)
    counts = sorted({count for layer in measured.layers.values() for count in layer.kl}, reverse=True)
    costs = [[measured.layers[n].kl.get(count, {}).get(ALL, math.nan) for count in counts] for n in layers]
    return Map(title, layers, list(map(str, counts)), np.array(costs))


def costs(maps: Sequence[Map]) -> Figure:
    """Divergence when one layer alone is pruned, by layer and experts retained."""
    from matplotlib.colors import LogNorm

    values = np.concatenate([m.values.ravel() for m in maps])
    positive = values[values > 0]
    high = float(positive.max()) if len(positive) else 1.0
    # Four powers of ten are as much as colours tell apart; what is smaller costs nothing.
    low = min(max(float(positive.min(initial=high)), high / 1e4), high / 10)
    figure, panels, image = _draw(maps, LogNorm(low, high, clip=True), "experts retained", _cost)
    _scale(figure, panels, image, "KL(original || pruned) of the next token, nats per token")
    return figure


def _cost(value: float) -> str:
    """A cost in few characters; the table has more."""
    return number(value, 2) if value >= 0.0995 else f"{value:.3f}" if value >= 0.0005 else "0"
