# SPDX-License-Identifier: Apache-2.0
"""Mosaic's tree of experts and Pathfinder's graph of the whole network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...methods.mosaic import log_errors
from ...plan import PruningPlan
from ...storage.values import Json
from .data import retained_grid
from .drawing import (
    COLOURS,
    INK,
    MOST_VECTORS,
    MUTED,
    RETAINED,
    SMALL,
    TINY,
    WIDTH,
    every,
    legend,
    paint,
    ramp,
    sheet,
    write_in_cells,
)
from .explain import MosaicLayer, PathGraph
from .tables import Table
from .text import MISSING, amount, listed, spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_MOST_LEAVES = 96
"""Leaves of a tree beyond which its lines are drawn as an image: there is one of every layer."""


def clusters(found: MosaicLayer, width: float = WIDTH) -> Figure:
    """The tree of a layer's experts (of a router with groups one for each), its cut, and where each expert is good.

    Experts stand in the order of the tree's leaves; clusters on bands, every other one tinted; representatives are
    marked. Where most distances tie there is no tree, and the bands are numbered. The map below has the domains down:
    the rank, from 1, of each among the domains of an expert by its error (with fewer than 3 domains, where ranks say
    nothing, the logarithm of the error in standard deviations).
    """
    from matplotlib.colors import Normalize

    assert found.clusters is not None
    leaves, joints = _forest(found.clusters.trees)
    domains = len(found.shares)
    width = min(width, 1.6 + max(0.5 * len(leaves), 2.0))
    down = min(0.17 * domains, 2.6) + 0.15
    cell = (width - 1.0) / len(leaves)
    names = _Names.of(found.clusters.experts, 72 * cell)
    figure = sheet((2.5 if found.has_tree else 1.35) + down + names.lines * names.step / 72 - 0.2, width)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.3 if found.has_tree else 0.25, down])
    starts = _draw_bands(above, found, leaves)
    if found.has_tree:
        _draw_tree(above, found, joints)
    else:
        _number_clusters(above, starts, 72 * cell)

    merits = merits_of(found)
    norm = Normalize(min(merits.ticks), max(merits.ticks))
    image = paint(below, merits.values[:, leaves], norm, (cell * len(leaves), down))
    if down / domains >= 0.14 and cell >= 0.055 * len(merits.words(1.5)) + 0.03:
        write_in_cells(below, image, merits.words, TINY - 0.5)
    rows = every(range(1, domains + 1), int(down / 0.13))
    below.set_yticks(rows, [f"{n + 1}: {found.shares[n]:.0%}" for n in rows], fontsize=TINY)
    below.set_ylabel("domain")
    bar = figure.colorbar(image, ax=[above, below], location="bottom", fraction=0.06, aspect=40)
    bar.set_ticks(list(merits.ticks), labels=list(merits.ticks.values()), fontsize=TINY)
    bar.set_label(merits.label if width > 5.5 else merits.label.replace(", ", ",\n"), fontsize=SMALL)
    bar.outline.set_visible(False)
    _number_experts(below, found, leaves, names)
    return figure


def clusters_tables(found: MosaicLayer) -> list[Table]:
    """The same as tables: the experts from left to right, and the joints of the tree from below where there is one."""
    assert found.clusters is not None
    leaves, _ = _forest(found.clusters.trees)
    numbers = {label: n for n, label in enumerate(dict.fromkeys(found.clusters.label[leaves].tolist()), 1)}
    merits, rows = merits_of(found), []
    for leaf in leaves:
        expert = found.clusters.experts[leaf]
        fate = "retained" if expert in found.representatives else "pruned"
        ranks = map(merits.words, merits.values[:, leaf].tolist())
        rows.append([expert, numbers[int(found.clusters.label[leaf])], fate, *ranks])
    domains = [f"domain {n}: {share:.0%}" for n, share in enumerate(found.shares, 1)]
    head = ["expert", "cluster", "it is", *domains]
    tables = [Table(f"Layer {found.layer}, from left to right: {merits.label}", head, rows, words=(0, 2), dense=True)]
    if found.has_tree:
        caption = f"Layer {found.layer}: joints of the tree, from below"
        tables.append(Table(caption, _JOINTS, _joints(found)))
    return tables


_JOINTS = ["joint", "joins", "and", "merge distance"]


def _joints(found: MosaicLayer) -> list[list[str]]:
    assert found.clusters is not None
    rows: list[list[str]] = []
    start = 0
    for tree in found.clusters.trees:
        names = [f"expert {e}" for e in found.clusters.experts[start : start + len(tree) + 1]]
        start += len(tree) + 1
        for a, b, distance, _ in tree.tolist():
            name = f"joint {len(rows) + 1}"
            rows.append([name, names[int(a)], names[int(b)], amount(distance)])
            names.append(name)
    return rows


@dataclass(frozen=True)
class _Names:
    """How the numbers of experts stand below a map: upright where cells are narrow; where these are very narrow, those
    of representatives alone, in as many lines as it takes."""

    every_one: bool
    size: float
    upright: bool
    lines: int
    step: float

    @classmethod
    def of(cls, experts: Sequence[int], cell: float) -> _Names:
        """Below cells that are so many points wide."""
        digits, every_one = len(str(max(experts))), 1.2 * TINY < cell
        size = TINY if every_one else 5.5
        lines = 1 if every_one else math.ceil(1.25 * size / cell)
        return cls(every_one, size, 0.75 * TINY * digits >= cell, lines, 0.85 * size * digits + 2)


def _number_experts(axes: Axes, found: MosaicLayer, leaves: list[int], names: _Names) -> None:
    """Write the experts' numbers below a map, representatives in bold."""
    assert found.clusters is not None
    from matplotlib.transforms import ScaledTranslation

    experts = [found.clusters.experts[leaf] for leaf in leaves]
    inches = axes.figure.dpi_scale_trans
    line = [
        axes.get_xaxis_transform() + ScaledTranslation(0, -(4 + n * names.step) / 72, inches)
        for n in range(names.lines)
    ]
    chosen = set(found.representatives)
    places = [place for place, e in enumerate(experts) if names.every_one or e in chosen]
    # Measuring each number takes long: the room is that of the first and the last, and the longest in the lowest line.
    lowest = range(min(names.lines, len(places)) - 1, len(places), names.lines)
    measured = {0, len(places) - 1, max(lowest, key=lambda n: len(str(experts[places[n]])))}
    look: Json = {"va": "top", "fontsize": names.size, "ha": "center", "rotation": 90 * names.upright, "gid": "expert"}
    for n, place in enumerate(places):
        weight: Json = {"fontweight": "bold"} if experts[place] in chosen else {"color": MUTED}
        transform = line[n % names.lines]
        axes.text(place, 0, str(experts[place]), transform=transform, in_layout=n in measured, **look, **weight)
    axes.set_xticks([])
    look = {"va": "top", "ha": "right", "fontsize": names.size}
    axes.annotate("expert", (0, 0), (-4, -4), xycoords="axes fraction", textcoords="offset points", **look)


def _forest(trees: Sequence[np.ndarray]) -> tuple[list[int], list[np.ndarray]]:
    """The order of the leaves of trees side by side, and their joints as lines ``(4, 2)`` above the leaves' places."""
    from scipy.cluster.hierarchy import dendrogram

    leaves: list[int] = []
    joints = []
    for tree in trees:
        shape = dendrogram(tree, no_plot=True) if len(tree) else {"leaves": [0], "icoord": [], "dcoord": []}
        shapes = zip(shape["icoord"], shape["dcoord"], strict=True)  # scipy's leaves stand at 5, 15, 25 ...
        joints += [np.column_stack([len(leaves) + (np.array(across) - 5) / 10, up]) for across, up in shapes]
        leaves += [len(leaves) + leaf for leaf in shape["leaves"]]
    return leaves, joints


def _draw_bands(axes: Axes, found: MosaicLayer, leaves: list[int]) -> list[int]:
    """Bands of the clusters, and their representatives; returns where the bands begin and the last one ends."""
    assert found.clusters is not None
    label = found.clusters.label[leaves]
    starts = [0, *(np.flatnonzero(np.diff(label)) + 1).tolist(), len(leaves)]
    tinted = [(begin - 0.5, end - begin) for begin, end in list(itertools.pairwise(starts))[::2]]
    # All at once: a patch for each takes a tenth of the time of the whole figure.
    bands = axes.broken_barh(tinted, (0, 1), color="#e4ebf2", linewidth=0, zorder=0)
    bands.set_transform(axes.get_xaxis_transform())
    chosen = [n for n, leaf in enumerate(leaves) if found.clusters.experts[leaf] in found.representatives]
    size = 5.5 if len(leaves) <= 64 else 3.5
    axes.plot(chosen, np.zeros(len(chosen)), "v", color=COLOURS[1], markersize=size, clip_on=False, zorder=5)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    return starts


def _draw_tree(axes: Axes, found: MosaicLayer, joints: list[np.ndarray]) -> None:
    from matplotlib.collections import LineCollection

    assert found.clusters is not None
    heights, cut = np.concatenate(found.clusters.trees)[:, 2], found.cut
    top = float(heights.max(initial=0.0)) or 1.0
    below = [joint[1, 1] <= (cut or 0.0) for joint in joints]
    colours, widths = np.where(below, RETAINED, "#767676").tolist(), np.where(below, 1.4, 0.9)
    lines = LineCollection(joints, colors=colours, linewidths=widths, gid="tree")
    lines.set_rasterized(len(joints) > _MOST_LEAVES)
    axes.add_collection(lines, autolim=False)
    if cut is not None:
        axes.axhline(cut, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), gid="cut")
    axes.set_ylim(0, 1.15 * top)
    axes.set_ylabel("merge distance")
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(axis="y", labelsize=TINY)


def _number_clusters(axes: Axes, starts: list[int], cell: float) -> None:
    """Number the bands in place of a tree above them, those that there is room for; cells are so many points wide."""
    look: Json = {"ha": "center", "va": "center_baseline", "fontsize": TINY, "gid": "band"}
    free = -math.inf
    for n, (begin, end) in enumerate(itertools.pairwise(starts), 1):
        middle, half = (begin + end) / 2 - 0.5, (0.33 * TINY * len(str(n)) + 1) / cell
        if middle - half > free:
            axes.text(middle, 0.62, str(n), **look)
            free = middle + half
    axes.set(ylim=(0, 1), yticks=[])
    axes.set_ylabel("cluster", rotation=0, ha="right", va="center", fontsize=TINY)
    axes.spines["left"].set_visible(False)


@dataclass(frozen=True)
class Merits:
    """What Ward compares, domains down and experts across ``(D, C)``, the ticks of its scale, and its name."""

    values: np.ndarray
    ticks: dict[float, str]
    label: str
    words: Callable[[float], str]


def merits_of(found: MosaicLayer) -> Merits:
    """What was compared in a layer: ranks, or with fewer than 3 domains logarithms of errors."""
    from scipy.stats import rankdata

    domains = found.vectors.shape[1]
    if domains < 3:
        values = log_errors(found.vectors).T
        most = max(1.0, float(np.abs(values).max()))
        ticks = {-most: f"-{most:.1f}", 0.0: "mean", most: f"+{most:.1f}"}
        return Merits(values, ticks, "log error, in standard deviations", "{:+.1f}".format)
    label = "rank of the domain for the expert by its error, 1 = smallest"
    ranks = rankdata(found.vectors, axis=1).T
    return Merits(ranks, {1.0: "1", float(domains): str(domains)}, label, "{:g}".format)


# ------------------------------------------------------------------------------------------- paths

MOST_EDGES = 60
"""Edges between two layers that are drawn: more are a blot."""


def paths(plan: PruningPlan, graph: PathGraph, samples: int, width: float = WIDTH) -> Figure:
    """Layers across, experts down, and the edges of the best paths: the more samples use one, the wider and darker."""
    layers, experts = sorted(plan.retained), max(map(len, graph.nodes))
    across, down = (width - 1.0) / max(len(layers), 2), min(0.32, max(5.6 / experts, 0.05))  # inches between experts
    figure = sheet(0.8 + max(experts * down, 0.6), width)
    axes = figure.subplots()
    handles = _draw_nodes(axes, plan, 72 * min(0.6 * down, 0.5 * across, 0.16))
    handles += _draw_edges(axes, graph, samples, across)
    axes.set(xlim=(-0.5, len(layers) - 0.5), ylim=(experts - 0.5, -0.5), xlabel="layer", ylabel="expert")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=3)
    columns, rows = every(layers, int(3.7 * width)), every(range(experts), int(experts * down / 0.13))
    axes.set_xticks(columns, [str(layers[n]) for n in columns])
    axes.set_yticks(rows)
    legend(figure, handles)
    return figure


def paths_tables(plan: PruningPlan, graph: PathGraph) -> list[Table]:
    """The same as a table: the experts of each layer, and the lines to the next one."""
    layers = sorted(plan.retained)
    rows = []
    for n, layer in enumerate(layers):
        kept = plan.retained[layer]
        out = [e for e in range(plan.original_num_experts[layer]) if e not in set(kept)]
        lines = [f"{a}\N{RIGHTWARDS ARROW}{b} ({count})" for count, a, b in _drawn(graph, n)]
        rows.append([layer, spans(kept), spans(out) or MISSING, listed(lines)])
    head = ["layer", "retained", "pruned", "lines to the next layer: from, to (samples)"]
    return [Table("Experts and the lines between them, those of the most samples first", head, rows, words=range(4))]


def _drawn(graph: PathGraph, column: int) -> list[tuple[int, int, int]]:
    """The edges from a layer to the next that are drawn, with their samples; the most used first."""
    if column >= len(graph.edges):
        return []
    edge = graph.edges[column]
    used = [(int(edge[a, b]), a, b) for a, b in np.argwhere(edge).tolist()]
    return sorted(used, key=lambda e: -e[0])[:MOST_EDGES]


def _draw_nodes(axes: Axes, plan: PruningPlan, diameter: float) -> list[Any]:
    """Experts as disks of a size in points, filled where retained; returns what the legend shows."""
    from matplotlib.lines import Line2D

    grid = retained_grid(plan).T
    handles = []
    for name, value, face in (("retained", 1, RETAINED), ("pruned", 0, "white")):
        expert, column = np.nonzero(grid == value)
        look: Json = {"marker": "o", "linestyle": "none", "markerfacecolor": face, "label": name}
        look |= {"markeredgecolor": RETAINED, "markeredgewidth": min(0.9, diameter / 6)}
        many = grid.size > MOST_VECTORS
        axes.plot(column, expert, markersize=diameter, zorder=3, gid=name, rasterized=many, **look)
        handles.append(Line2D([], [], markersize=7, **look))
    return handles


def _draw_edges(axes: Axes, graph: PathGraph, samples: int, across: float) -> list[Any]:
    """Lines between layers that stand so many inches apart; returns what the legend shows."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    edges = [
        (count, ((column, a), (column + 1, b)))
        for column in range(len(graph.edges))
        for count, a, b in _drawn(graph, column)
    ]
    edges.sort(key=lambda e: e[0])  # the most used on top
    if not edges:
        return []
    most = edges[-1][0]
    full = max(most, samples / 4)  # where no two samples agree, all edges are thin and pale

    def look(counts: Any) -> Json:
        """Narrower where layers stand close together; the palest is still seen on white."""
        share = np.asarray(counts) / full
        return {"linewidth": 0.35 + min(3.0, 12 * across) * share, "color": ramp()(0.25 + 0.75 * np.sqrt(share))}

    lines = LineCollection([ends for _, ends in edges], zorder=1, gid="edges", **look([n for n, _ in edges]))
    lines.set_rasterized(len(edges) > MOST_VECTORS)
    axes.add_collection(lines, autolim=False)
    counts = sorted({1, -(-most // 2), most})
    return [Line2D([], [], label=f"{n} of {samples} samples", **look(n)) for n in counts]
