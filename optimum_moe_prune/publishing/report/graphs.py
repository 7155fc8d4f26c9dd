# SPDX-License-Identifier: Apache-2.0
"""Mosaic's tree of experts and Pathfinder's graph of the whole network."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...plan import PruningPlan
from .canvas import COLOURS, INK, MUTED, RETAINED, TINY, WIDTH, Sheet, bar_of_colours, count_ticks, paint, ramp
from .explain import MosaicLayer, PathGraph
from .words import SMALL, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAND = "#eef2f6"


def clusters(found: MosaicLayer) -> Figure:
    """The tree of a layer's experts with its cut, and below it where each expert is good.

    Experts stand in the order of the tree's leaves; clusters on bands, every other one tinted; representatives are
    marked. The map below has the domains down: the rank, from 1, of each among the domains of an expert by its error
    (with fewer than 3 domains, where ranks say nothing, the logarithm of the error in standard deviations).
    """
    from scipy.cluster.hierarchy import dendrogram

    tree = dendrogram(found.tree, no_plot=True) if len(found.tree) else {"leaves": [0], "icoord": [], "dcoord": []}
    leaves = tree["leaves"]
    count, domains = len(leaves), found.vectors.shape[1]
    left, head, tall, between = 0.95, 0.1, 1.3, 0.07
    cell = min(0.5, (WIDTH - left - 0.1) / count)
    width, row = cell * count, min(0.17, max(2.6 / domains, 0.04))
    labels = _labels(found, cell)
    beside = WIDTH - left - width > 2.9  # room for the scale on the right
    below = head + tall + between + row * domains
    sheet = Sheet(below + labels.room + (0.1 if beside else 0.62))
    _draw_tree(sheet.axes(left, head, width, tall), found, tree)
    values, ticks, label = _merits(found.vectors)
    axes = sheet.axes(left, head + tall + between, width, row * domains)
    image = paint(axes, values[:, leaves], (cell, row), vmin=ticks[0][0], vmax=ticks[-1][0])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, pad=2)
    some = range(domains) if row >= 0.13 else count_ticks(range(1, domains + 1), row, 0.13)
    axes.set_yticks(list(some), [f"{n + 1}: {found.domain_share[n]:.0%}" for n in some], fontsize=TINY)
    axes.set_xticks([])
    sheet.text(0.12, head + tall / 2, "merge distance", rotation=90, va="center", ha="center", fontsize=SMALL)
    middle = head + tall + between + row * domains / 2
    sheet.text(0.12, middle, "domain", rotation=90, va="center", ha="center", fontsize=SMALL)
    sheet.text(left - 0.06, below + 0.05, "expert", ha="right", fontsize=SMALL)
    written = 0
    for place, leaf in enumerate(leaves):
        expert = found.experts[leaf]
        chosen = expert in found.representatives
        if labels.every or chosen:
            sheet.text(
                left + (place + 0.5) * cell,
                below + 0.05 + labels.line * (written % labels.lines),
                str(expert),
                ha="center",
                fontsize=labels.size,
                rotation=90 if labels.upright else 0,
                fontweight="bold" if chosen else "normal",
                color=INK if chosen else MUTED,
            )
            written += 1
    scale = (left + width + 0.5, middle - 0.06) if beside else (left, below + labels.room + 0.3)
    bar_of_colours(sheet, image, (*scale, 2.0, 0.1), label, ticks)
    return sheet.figure


@dataclass(frozen=True)
class _Labels:
    """How experts are numbered below a tree: all or representatives only, lying or upright, in one or more lines."""

    every: bool
    upright: bool
    size: float
    lines: int
    line: float  # its height in inches

    @property
    def room(self) -> float:
        """The height of all lines in inches."""
        return 0.05 + self.lines * self.line


def _labels(found: MosaicLayer, cell: float) -> _Labels:
    """Labels that do not touch each other on cells of a width in inches."""
    widest = text_width([str(max(found.experts))], 1.0)
    for size in (SMALL, TINY):
        if widest * size + 0.03 <= cell:
            return _Labels(True, False, size, 1, 0.15)
    for size in (TINY, 6.0):
        if 1.15 * size / 72 <= cell:
            return _Labels(True, True, size, 1, widest * size + 0.03)
    size = 5.5
    return _Labels(False, True, size, math.ceil(1.15 * size / 72 / cell), widest * size + 0.03)


def _draw_tree(axes: Axes, found: MosaicLayer, tree: dict[str, Any]) -> None:
    leaves = tree["leaves"]
    heights = found.tree[:, 2] if len(found.tree) else np.zeros(1)
    top, cut = float(heights.max()) or 1.0, found.cut
    lower = cut or 0.0
    # scipy's leaves stand at 5, 15, 25 ...
    for keep, colour, line in ((lambda h: h > lower, "#9a9a9a", 0.9), (lambda h: h <= lower, RETAINED, 1.4)):
        x, y = [], []
        for across, up in zip(tree["icoord"], tree["dcoord"], strict=True):
            if keep(up[1]):
                x += [*((v - 5) / 10 for v in across), np.nan]
                y += [*up, np.nan]
        axes.plot(x, y, color=colour, linewidth=line, solid_capstyle="round")
    label = found.label[leaves]
    starts = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), len(leaves)]
    for n, (begin, end) in enumerate(itertools.pairwise(starts)):
        if n % 2 == 0:
            axes.axvspan(begin - 0.5, end - 0.5, color=_BAND, linewidth=0, zorder=0)
    chosen = [place for place, leaf in enumerate(leaves) if found.experts[leaf] in found.representatives]
    size = 5.5 if len(leaves) <= 64 else 3.5
    axes.plot(chosen, np.zeros(len(chosen)), "v", color=COLOURS[1], markersize=size, clip_on=False, zorder=5)
    if cut is not None:
        axes.axhline(cut, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), gid="cut")
    axes.set_xlim(-0.5, len(leaves) - 0.5)
    axes.set_ylim(0, 1.15 * top)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(axis="y", labelsize=TINY)


def _merits(vectors: np.ndarray) -> tuple[np.ndarray, list[tuple[float, str]], str]:
    """What Ward compares, domains down and experts across ``(K, C)``, its scale and name."""
    from scipy.stats import rankdata

    domains = vectors.shape[1]
    if domains < 3:
        logs = np.log(np.maximum(vectors, np.finfo(np.float64).tiny))
        deviation = logs.std(axis=0)
        values = np.divide(logs - logs.mean(axis=0), deviation, out=np.zeros_like(logs), where=deviation > 0).T
        most = max(1.0, float(np.abs(values).max()))
        ticks = [(-most, f"-{most:.1f}"), (0.0, "mean"), (most, f"+{most:.1f}")]
        return values, ticks, "log error, in standard deviations"
    ticks = [(1.0, "1: smallest error"), (float(domains), f"{domains}: largest")]
    return rankdata(vectors, axis=1).T, ticks, "rank of the domain for the expert"


# ------------------------------------------------------------------------------------------- paths

_EDGES_PER_LAYER = 60  # more are a blot


def drawn_edges(graph: PathGraph) -> tuple[list[np.ndarray], int]:
    """The edges that are drawn, and the paths of each sample they are from: all, or where these are many, the best."""
    used = sum(int((edge > 0).sum()) for edge in graph.edges)
    if graph.paths_per_sample > 1 and used > _EDGES_PER_LAYER * len(graph.edges):
        return graph.best, 1
    return graph.edges, graph.paths_per_sample


def paths(plan: PruningPlan, graph: PathGraph) -> Figure:
    """Layers across, experts down, and the edges of the best paths: the more samples use one, the wider and darker."""
    layers, experts = len(graph.layers), max(map(len, graph.nodes))
    left, right, head, foot, margin = 0.5, 0.12, 0.3, 0.4, 0.15
    across, down = (WIDTH - left - right - 2 * margin) / max(layers - 1, 1), min(0.32, max(5.6 / experts, 0.05))
    sheet = Sheet(head + experts * down + foot)
    axes = sheet.axes(left, head, WIDTH - left - right, experts * down)
    axes.set_xlim(-margin / across, layers - 1 + margin / across)
    axes.set_ylim(experts - 0.5, -0.5)
    handles = _draw_nodes(axes, plan, graph, diameter := 72 * min(0.75 * down, 0.5 * across, 0.22))
    handles += _draw_edges(axes, graph, across)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, pad=3)
    columns = count_ticks(graph.layers, across, 0.2)
    axes.set_xticks(columns, [str(graph.layers[n]) for n in columns])
    rows = [] if diameter >= _NUMBERED else count_ticks(range(experts), down, 0.13)
    axes.set_yticks(rows, list(map(str, rows)))
    axes.set_xlabel("layer", fontsize=SMALL)
    axes.set_ylabel("expert", fontsize=SMALL)
    sheet.legend(handles, left, ncols=len(handles))
    return sheet.figure


_NUMBERED = 12  # points: nodes of this size bear the numbers of their experts


def _draw_nodes(axes: Axes, plan: PruningPlan, graph: PathGraph, diameter: float) -> list[Any]:
    """Experts as disks of a size in points, filled where retained; returns what the legend shows."""
    from matplotlib.lines import Line2D

    every = [(column, e) for column, node in enumerate(graph.nodes) for e in range(len(node))]
    kept = {(column, e) for column, layer in enumerate(graph.layers) for e in plan.retained[layer]}
    looks: dict[str, dict[str, Any]] = {
        "retained": {"markerfacecolor": RETAINED, "markeredgecolor": RETAINED},
        "pruned": {"markerfacecolor": "white", "markeredgecolor": "#8a8a8a"},
    }
    for name, look in looks.items():
        points = [point for point in every if (point in kept) == (name == "retained")]
        axes.plot(
            [column for column, _ in points],
            [expert for _, expert in points],
            "o",
            markersize=diameter if name == "retained" else 0.7 * diameter,
            markeredgewidth=min(0.9, diameter / 6),
            rasterized=len(every) > 1200,
            zorder=3,
            gid=name,
            **look,
        )
    for column, expert in every if diameter >= _NUMBERED else []:
        size, colour = (TINY, "white") if (column, expert) in kept else (TINY - 1, MUTED)
        place: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 4}
        axes.text(column, expert, str(expert), fontsize=size, color=colour, **place)
    return [Line2D([], [], marker="o", linestyle="none", markersize=7, label=n, **look) for n, look in looks.items()]


def _draw_edges(axes: Axes, graph: PathGraph, across: float) -> list[Any]:
    """Lines between layers that stand so many inches apart; returns what the legend shows."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    found = [
        (int(edge[a, b]), ((column, a), (column + 1, b)))
        for column, edge in enumerate(drawn_edges(graph)[0])
        for a, b in np.argwhere(edge > 0).tolist()
    ]
    found.sort()  # the most used on top
    counts = np.array([count for count, _ in found])
    most = int(counts.max(initial=1))
    full = max(most, graph.samples / 4)  # where no two samples agree, all edges are thin and pale
    lines = LineCollection(
        [ends for _, ends in found],
        linewidths=_edge_width(counts / full, across),
        colors=_edge_colours(counts / full),
        rasterized=len(found) > 1200,
        zorder=1,
        gid="edges",
    )
    axes.add_collection(lines, autolim=False)
    handles = []
    for count in sorted({1, -(-most // 2), most}):
        share = np.array([count / full])
        label = f"{count} of {graph.samples} samples" if count == most else str(count)
        look: dict[str, Any] = {"color": _edge_colours(share)[0], "linewidth": float(_edge_width(share, across)[0])}
        handles.append(Line2D([], [], label=label, **look))
    return handles


def _edge_width(share: np.ndarray, across: float) -> np.ndarray:
    """Points; narrower where layers stand close together."""
    return 0.35 + min(3.0, 12 * across) * share


def _edge_colours(share: np.ndarray) -> np.ndarray:
    """Dark for edges of many samples; even the palest are seen on white."""
    return ramp()(0.25 + 0.75 * np.sqrt(share))
