# SPDX-License-Identifier: Apache-2.0
"""Scores, sensitivities and evaluations as points and lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...evaluation.comparison import Comparison, ModelResult
from ...evaluation.losses import DomainResult, Interval
from ...planning.sensitivity import ALL, Sensitivity
from ...storage.values import Json
from .data import relative
from .drawing import (
    COLOURS,
    INK,
    MARKERS,
    MOST_VECTORS,
    NARROW,
    RETAINED,
    SMALL,
    WIDTH,
    Span,
    every,
    legend,
    logarithmic,
    sheet,
)
from .tables import Table, lowest
from .text import MISSING, amount, nats, number, perplexity, short
from .text import domain_name as _domain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: Json = {
    "uniform": "-",
    "global": (0, (5, 2)),
    "sensitivity": (0, (1.2, 1.2)),
    "estimated": (0, (4, 1, 1, 1, 1, 1)),
}
_OTHER_DASHES: Any = (0, (5, 1.5, 1, 1.5))


def _look(n: int) -> Json:
    return {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}


# ------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """Scores of the experts of some layers by one method.

    Attributes:
        title: Of their panel.
        method: Whose scores they are.
        values: ``(L, E)``, NaN where there is none. Shown in units of the mean magnitude of the layer.
        kept: 1 where retained, 0 where pruned ``(L, E)``; None where there is no plan.
        layers: Numbers of the layers.
    """

    title: str
    method: str
    values: np.ndarray
    kept: np.ndarray | None
    layers: Sequence[int]


def scores(panels: Sequence[Scores], width: float = WIDTH) -> Figure:
    """Scores below each other on one scale: retained experts on the left of their layer's line, pruned ones right."""
    figure = sheet(0.7 + 2.5 * len(panels), width)
    shown = [relative(panel.values) for panel in panels]
    known = np.concatenate([values[np.isfinite(values)] for values in shown])
    low, high = float(known[known != 0].min(initial=np.inf)), float(known.max(initial=0.0))
    log = low > 0 and 30 * low < high
    bottom = low * (low / high) ** 0.08 if log else -np.inf
    every_axes = figure.subplots(len(panels), 1, squeeze=False, sharey=True)[:, 0]
    for axes, panel, values in zip(every_axes, panels, shown, strict=True):
        _draw_scores(axes, panel, np.maximum(values, bottom), width)
    if log:
        logarithmic(every_axes[0].yaxis, bottom, 1.4 * high)
    handles = {line.get_label(): line for axes in every_axes for line in axes.lines}
    if any(panel.kept is not None for panel in panels):
        legend(figure, list(handles.values()), markerscale=5.5 / _size(panels[0]))
    return figure


def _size(panel: Scores) -> float:
    """Of a mark, in points."""
    return float(np.clip(100 / math.sqrt(panel.values.size), 1.6, 5.5))


def _draw_scores(axes: Axes, panel: Scores, shown: np.ndarray, width: float) -> None:
    known = np.isfinite(shown)
    filled: Json = {"marker": "o", "color": RETAINED, "markeredgewidth": 0}
    crossed: Json = {"marker": "x", "color": COLOURS[1], "markeredgewidth": 0.9}
    groups: list[tuple[np.ndarray, float, str, Json]] = [(known, 0.0, "expert", filled)]
    if (kept := panel.kept) is not None:
        groups = [(known & (kept == 1), -0.17, "retained", filled), (known & (kept == 0), 0.17, "pruned", crossed)]
    for chosen, shift, name, look in groups:
        row, expert = np.nonzero(chosen)
        look |= {"linestyle": "none", "markersize": _size(panel), "label": name}
        axes.plot(row + shift, shown[row, expert], clip_on=False, rasterized=shown.size > MOST_VECTORS, **look)
    axes.set_xlim(-0.6, len(panel.layers) - 0.4)
    ticks = every(panel.layers, int(3.7 * width))
    axes.set_xticks(ticks, [str(panel.layers[t]) for t in ticks])
    axes.grid(axis="y")
    axes.set(xlabel="layer", title=short(panel.title, int(10 * width)))
    axes.set_ylabel(f"{short(panel.method, 20)} score\n(mean of the layer = 1)")


def scores_tables(panels: Sequence[Scores]) -> list[Table]:
    """The same as tables: experts across, pruned ones in brackets."""
    tables = []
    for panel in panels:
        rows = []
        for row, (layer, values) in enumerate(zip(panel.layers, relative(panel.values), strict=True)):
            pruned = np.zeros(len(values)) if panel.kept is None else panel.kept[row] == 0
            texts = [number(float(value)) for value in values]
            rows.append([layer, *(f"({t})" if out else t for t, out in zip(texts, pruned, strict=True))])
        brackets = "" if panel.kept is None else ", pruned experts in brackets"
        caption = f"{panel.title}: {panel.method} scores, mean of the layer = 1{brackets}"
        head = ["layer, expert", *map(str, range(panel.values.shape[1]))]
        tables.append(Table(caption, head, rows, dense=True))
    return tables


# ------------------------------------------------------------------------------------------- sensitivities


@dataclass(frozen=True)
class Line:
    """What whole plans of one method and allocation cost: its look, and cost by sparsity, rising."""

    label: str
    look: Json
    costs: dict[float, float]


def cost_lines(sensitivity: Sensitivity, domain: str) -> list[Line]:
    """The lines of a domain, in the order of methods and, of each, of allocations."""
    lines = []
    for n, (method, found) in enumerate(sensitivity.methods.items()):
        for allocation in dict.fromkeys(point.allocation for point in found.model):
            points = [p for p in found.model if p.allocation == allocation and domain in p.kl]
            look = {**_look(n), "linestyle": _DASHES.get(allocation, _OTHER_DASHES), "markersize": 4.5}
            costs = {p.sparsity: p.kl[domain] for p in sorted(points, key=lambda p: p.sparsity)}
            lines.append(Line(f"{method}, {allocation}", look, costs))
    return lines


def model_costs(sensitivity: Sensitivity, domains: Sequence[str], width: float = WIDTH) -> Figure:
    """Divergence of the pruned model against sparsity: a line for each method and allocation, a panel per domain.

    One domain takes the whole width; several stand side by side, all on one scale.
    """
    columns = min(len(domains), 3 if width > NARROW else 2)
    rows = math.ceil(len(domains) / columns)
    lines = {domain: cost_lines(sensitivity, domain) for domain in domains}
    costs = [cost for found in lines.values() for line in found for cost in line.costs.values()]
    positive = [cost for cost in costs if cost > 0 and math.isfinite(cost)] or [0.1, 1.0]
    span = Span.of(positive, max(positive) > 8 * min(positive))
    if not span.log:
        span = Span(min([0.0, *costs]), 1.08 * max(positive), False)
    figure = sheet(3.6 if columns == 1 else 0.9 + 1.9 * rows, width)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, domain in zip(panels, domains, strict=False):
        for line in lines[domain]:
            points = [(100 * s, span.inside(cost)) for s, cost in line.costs.items() if cost > 0 or not span.log]
            label = ", ".join(short(part) for part in line.label.split(", "))
            axes.plot(*np.reshape(points, (-1, 2)).T, label=label, **line.look)
            for place, cost in line.costs.items():
                if math.isinf(cost):
                    _mark_infinite(axes, 100 * place, span.high, "center", "bottom")
        axes.grid()
        axes.set_title(short(_domain(domain), 26 if columns < 3 else 22))
        axes.tick_params(labelbottom=True)
    for axes in panels[len(domains) :]:
        axes.remove()
    span.limit(panels[0].yaxis)
    figure.supxlabel("experts removed, %", fontsize=SMALL)
    figure.supylabel("KL divergence, nats per token", fontsize=SMALL)
    legend(figure, panels[0].lines[: len(lines[domains[0]])], handlelength=3.5)
    return figure


def model_costs_tables(sensitivity: Sensitivity, domains: Sequence[str]) -> list[Table]:
    """The same as tables: sparsities down, lines across."""
    tables = []
    for domain in domains:
        lines = cost_lines(sensitivity, domain)
        sparsities = sorted({sparsity for line in lines for sparsity in line.costs})
        costs = [[line.costs.get(sparsity) for line in lines] for sparsity in sparsities]
        rows = [[f"{sparsity:.0%}", *map(amount, line)] for sparsity, line in zip(sparsities, costs, strict=True)]
        caption = f"KL divergence, nats per token: {_domain(domain)}"
        tables.append(Table(caption, ["removed", *(line.label for line in lines)], rows, best=lowest(costs)))
    return tables


# ------------------------------------------------------------------------------------------- evaluations


def judged(comparison: Comparison) -> dict[str, ModelResult]:
    """The models that are shown with results by domain: those compared with the reference, or else all."""
    models = comparison.compared or comparison.models
    return {name: model for name, model in models.items() if model.evaluation.domains}


def domains_of(comparison: Comparison) -> list[str]:
    """Domains of any model, ``"all"`` last."""
    names = dict.fromkeys(name for model in comparison.models.values() for name in model.evaluation.domains)
    return sorted(names, key=lambda name: name == ALL)


def before(comparison: Comparison) -> dict[str, float]:
    """Perplexity of the reference by domain, where it is known."""
    results = (item for model in judged(comparison).values() for item in model.evaluation.domains.items())
    return {d: r.reference_perplexity for d, r in results if comparison.compared and r.reference_perplexity}


def _ends(result: DomainResult) -> Interval | None:
    """The interval of a model's perplexity."""
    start, between = result.reference_perplexity, result.perplexity_difference_interval
    return None if start is None or between is None else (start + between[0], start + between[1])


def perplexities(comparison: Comparison, domains: Sequence[str], width: float = WIDTH) -> Figure:
    """Perplexity by domain of every model, and what was lost against the reference, with intervals."""
    models, reference = judged(comparison), before(comparison)
    step = 0.15 * len(models) + 0.16  # inches of a domain: a line for each model
    height, many = step * len(domains), 1 + bool(reference)
    beside = width > NARROW
    figure = sheet(height + 1.0 if beside else many * (height + 0.6) + 0.5, width)
    shape = (1, many) if beside else (many, 1)
    panels = figure.subplots(*shape, squeeze=False, sharey=True).ravel()
    results = [m.evaluation.domains[d] for m in models.values() for d in domains if d in m.evaluation.domains]
    spans = [
        Span.of([*(reference.get(d) for d in domains), *(r.perplexity for r in results), *_flat(map(_ends, results))]),
        Span.of([0.0, *(r.lost for r in results), *_flat(r.lost_interval for r in results)], log=False),
    ]
    handles = []
    if reference:
        look: Json = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "linestyle": "none", "zorder": 4}
        label = f"{short(comparison.reference or 'before', 40)} (reference)"
        rows = [row for row, domain in enumerate(domains) if domain in reference]
        marks = [spans[0].inside(reference[domains[row]]) for row in rows]
        handles += panels[0].plot(marks, rows, markeredgecolor=INK, label=label, clip_on=False, **look)
    for n, (name, model) in enumerate(models.items()):
        shift = (n - (len(models) - 1) / 2) * 0.15 / step
        found = {row + shift: model.evaluation.domains.get(domain) for row, domain in enumerate(domains)}
        look = {**_look(n), "markersize": 5.5, "linestyle": "none", "label": short(name, 40), "clip_on": False}
        there = {y: result for y, result in found.items() if result is not None}
        shown = [spans[0].inside(result.perplexity) for result in there.values()]
        handles += panels[0].plot(shown, list(there), **look)
        for y, result in there.items():
            _draw_result(panels, spans, y, result, look)
    panels[0].set_yticks(range(len(domains)), [short(_domain(d), 26 if beside else 16) for d in domains])
    panels[0].set(ylim=(len(domains) - 0.5, -0.5))
    for axes, span, title in zip(panels, spans, ("perplexity", "lost, nats per token"), strict=False):
        span.limit(axes.xaxis)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(xlabel="lower is better", title=title)
    if reference:
        panels[1].axvline(0, color=INK, linewidth=0.8)
    legend(figure, handles)
    return figure


def _flat(pairs: Iterable[Interval | None]) -> Iterator[float]:
    return (end for pair in pairs if pair is not None for end in pair)


def _draw_result(panels: Any, spans: Sequence[Span], y: float, result: DomainResult, look: Json) -> None:
    """Lines and intervals of a model on a domain; its perplexity is drawn already."""
    start, lost = result.reference_perplexity, result.lost
    if math.isinf(result.perplexity):
        _mark_infinite(panels[0], spans[0].high, y, "right", "center")
    if len(panels) == 1 or start is None or lost is None:
        return
    line = [spans[0].inside(start), spans[0].inside(result.perplexity)]
    panels[0].plot(line, [y, y], color=look["color"], linewidth=0.9, zorder=1)
    panels[1].plot([spans[1].inside(lost)], [y], **look)
    if math.isinf(lost):
        _mark_infinite(panels[1], spans[1].high, y, "right", "center")
    for axes, span, ends in zip(panels, spans, (_ends(result), result.lost_interval), strict=True):
        if ends is None:
            continue
        places = [span.inside(end) for end in ends]
        axes.plot(places, [y, y], color=look["color"], linewidth=1.4, marker="|", markersize=6, clip_on=False)
        for end, place, mark in zip(ends, places, "<>", strict=True):
            if span.is_beyond(end):
                axes.plot([place], [y], marker=mark, color=look["color"], markersize=5, clip_on=False, gid="beyond")


def _mark_infinite(axes: Axes, x: float, y: float, ha: str, va: str) -> None:
    """The sign of infinity inside the edge that a value stands on."""
    where: Json = {"xytext": (-6 if ha == "right" else 0, 4 if va == "bottom" else 0), "textcoords": "offset points"}
    axes.annotate("\N{INFINITY}", (x, y), ha=ha, va=va, fontsize=10, gid="infinite", annotation_clip=False, **where)


def perplexities_tables(comparison: Comparison, domains: Sequence[str]) -> list[Table]:
    """The same as tables: domains down, models across in the order of the legend, intervals in brackets."""
    models, reference = judged(comparison), before(comparison)
    found = {name: [model.evaluation.domains.get(domain) for domain in domains] for name, model in models.items()}
    first = [f"{comparison.reference or 'before'} (reference)"] if reference else []
    kinds: list[tuple[str, list[str], Callable[[DomainResult], tuple[float | None, str]]]] = [
        ("Perplexity", first, lambda r: (r.perplexity, _within(perplexity(r.perplexity), _ends(r), perplexity)))
    ]
    if reference:
        kinds.append(("Lost, nats per token", [], lambda r: (r.lost, _within(nats(r.lost), r.lost_interval, nats))))
    tables = []
    for caption, columns, figures in kinds:
        lines = zip(*found.values(), strict=True)
        cells = [[(None, MISSING) if r is None else figures(r) for r in row] for row in lines]
        rows = [
            [_domain(domain), *(perplexity(reference.get(domain)) for _ in columns), *(text for _, text in row)]
            for domain, row in zip(domains, cells, strict=True)
        ]
        best = lowest([[value for value, _ in row] for row in cells], 1 + len(columns))
        head = ["domain", *columns, *models]
        if any(_ends(r) if caption == "Perplexity" else r.lost_interval for row in found.values() for r in row if r):
            caption += " (95% interval)"
        tables.append(Table(caption, head, rows, best=best))
    return tables


def _within(text: str, ends: Interval | None, words: Callable[[float], str]) -> str:
    return text if ends is None else f"{text} ({words(ends[0])} to {words(ends[1])})"
