# SPDX-License-Identifier: Apache-2.0
"""Scores, sensitivities and evaluations as points and lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...evaluation.comparison import Comparison, ModelResult
from ...planning.sensitivity import ALL, Sensitivity
from ...storage.values import Json
from .data import relative
from .drawing import COLOURS, INK, MARKERS, MOST_VECTORS, RETAINED, SMALL, every, legend, logarithmic, sheet
from .text import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DASHES: Json = {"uniform": "-", "global": (0, (5, 2)), "sensitivity": (0, (1.2, 1.2))}
_OTHER_DASHES: Any = (0, (5, 1.5, 1, 1.5))


def _domain(name: str) -> str:
    return "all domains" if name == ALL else short(name, 26)


def _look(n: int) -> Json:
    return {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)]}


# ------------------------------------------------------------------------------------------- scores


def scores(values: np.ndarray, kept: np.ndarray | None, layers: Sequence[int], label: str) -> Figure:
    """Scores of the experts of each layer, retained ones on the left of the layer's line and pruned ones on the right.

    Args:
        values: ``(L, E)``, NaN where there is none. Shown in units of the mean magnitude of the layer.
        kept: 1 where retained, 0 where pruned ``(L, E)``; None where there is no plan.
        layers: Numbers of the layers.
        label: What the scores are.
    """
    figure = sheet(3.1)
    axes = figure.subplots()
    shown = relative(values)
    known = np.isfinite(shown)
    low, high = float(shown[known & (shown != 0)].min(initial=np.inf)), float(shown[known].max(initial=0.0))
    if low > 0 and 30 * low < high:
        bottom = low * (low / high) ** 0.08
        shown = np.maximum(shown, bottom)
        logarithmic(axes.yaxis, bottom, 1.4 * high)
    size = float(np.clip(100 / math.sqrt(values.size), 1.6, 5.5))
    filled: Json = {"marker": "o", "color": RETAINED, "markeredgewidth": 0}
    crossed: Json = {"marker": "x", "color": COLOURS[1], "markeredgewidth": 0.9}
    groups: list[tuple[np.ndarray, float, str, Json]] = [(known, 0.0, "expert", filled)]
    if kept is not None:
        groups = [(known & (kept == 1), -0.17, "retained", filled), (known & (kept == 0), 0.17, "pruned", crossed)]
    for chosen, shift, name, look in groups:
        row, expert = np.nonzero(chosen)
        look |= {"linestyle": "none", "markersize": size, "label": name, "rasterized": values.size > MOST_VECTORS}
        axes.plot(row + shift, shown[row, expert], clip_on=False, **look)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    ticks = every(layers, 30)
    axes.set_xticks(ticks, [str(layers[t]) for t in ticks])
    axes.grid(axis="y")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{short(label, 20)} score\n(mean of the layer = 1)")
    if kept is not None:
        legend(figure, axes.get_legend_handles_labels()[0], markerscale=5.5 / size)
    return figure


# ------------------------------------------------------------------------------------------- sensitivities


def model_costs(sensitivity: Sensitivity, domains: Sequence[str]) -> Figure:
    """Divergence of the pruned model against sparsity: a line for each method and allocation, a panel per domain.

    One domain takes the whole width; several stand three in a row, all on one scale.
    """
    columns = min(len(domains), 3)
    rows = math.ceil(len(domains) / columns)
    points = [p for found in sensitivity.methods.values() for p in found.model]
    shown = [p.kl[d] for p in points for d in domains if p.kl.get(d, 0) > 0] or [0.1, 1.0]
    log = max(shown) > 8 * min(shown)
    figure = sheet(3.6 if columns == 1 else 0.9 + 1.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, domain in zip(panels, domains, strict=False):
        for n, (method, found) in enumerate(sensitivity.methods.items()):
            for allocation in dict.fromkeys(point.allocation for point in found.model):
                line = sorted(
                    (100 * p.sparsity, p.kl[domain])
                    for p in found.model
                    if p.allocation == allocation and domain in p.kl and (p.kl[domain] > 0 or not log)
                )
                look = {**_look(n), "linestyle": _DASHES.get(allocation, _OTHER_DASHES), "markersize": 4.5}
                axes.plot(*np.reshape(line, (-1, 2)).T, label=f"{short(method)}, {short(allocation)}", **look)
        axes.grid()
        axes.set_title(_domain(domain))
        axes.tick_params(labelbottom=True)
    for axes in panels[len(domains) :]:
        axes.remove()
    if log:
        logarithmic(panels[0].yaxis, min(shown) / 1.4, max(shown) * 1.4)
    else:
        panels[0].set_ylim(0, max(shown) * 1.08)
    figure.supxlabel("experts removed, %", fontsize=SMALL)
    figure.supylabel("KL divergence, nats per token", fontsize=SMALL)
    legend(figure, panels[0].lines, handlelength=3.5)
    return figure


# ------------------------------------------------------------------------------------------- evaluations


def judged(comparison: Comparison) -> dict[str, ModelResult]:
    """The models that are shown with results by domain: those compared with the reference, or else all."""
    models = comparison.compared or comparison.models
    return {name: model for name, model in models.items() if model.evaluation.domains}


def domains_of(comparison: Comparison) -> list[str]:
    """Domains of any model, ``"all"`` last."""
    names = dict.fromkeys(name for model in comparison.models.values() for name in model.evaluation.domains)
    return sorted(names, key=lambda name: name == ALL)


def perplexities(comparison: Comparison, domains: Sequence[str]) -> Figure:
    """Perplexity by domain of every model, and beside it what was lost against the reference, with intervals."""
    models = judged(comparison)
    before = {d: r.reference_perplexity for m in models.values() for d, r in m.evaluation.domains.items()}
    compared = bool(comparison.compared) and any(before.values())
    step = 0.15 * len(models) + 0.16  # inches of a domain: a line for each model
    figure = sheet(step * len(domains) + 1.0)
    first, *others = figure.subplots(1, 1 + compared, squeeze=False, sharey=True)[0]
    handles = []
    if compared:
        reference: Json = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "linestyle": "none"}
        label = f"{short(comparison.reference or 'before', 40)} (reference)"
        rows = [row for row, domain in enumerate(domains) if before.get(domain)]
        marks = [before[domains[row]] for row in rows]
        handles += first.plot(marks, rows, zorder=4, markeredgecolor=INK, label=label, **reference)
    for n, (name, model) in enumerate(models.items()):
        shift = (n - (len(models) - 1) / 2) * 0.15 / step
        found = model.evaluation.domains
        results = [(row + shift, found[domain]) for row, domain in enumerate(domains) if domain in found]
        look: Json = {**_look(n), "markersize": 5.5, "linestyle": "none", "label": short(name, 40)}
        handles += first.plot([result.perplexity for _, result in results], [y for y, _ in results], **look)
        for y, result in results if compared else ():
            start, lost = result.reference_perplexity, result.lost
            if start is None or lost is None:
                continue
            first.plot([start, result.perplexity], [y, y], color=look["color"], linewidth=0.9, zorder=1)
            others[0].plot([lost], [y], **look)
            ends: Json = {"color": look["color"], "linewidth": 1.4, "marker": "|", "markersize": 6}
            if between := result.perplexity_difference_interval:
                first.plot([start + between[0], start + between[1]], [y, y], **ends)
            if between := result.lost_interval:
                others[0].plot(between, [y, y], **ends)
    values = [r.perplexity for m in models.values() for r in m.evaluation.domains.values()]
    values += [value for value in before.values() if value]
    if max(values) > 5 * min(values):
        logarithmic(first.xaxis, min(values) / 1.15, max(values) * 1.15)
    first.set_yticks(range(len(domains)), list(map(_domain, domains)))
    first.set(ylim=(len(domains) - 0.5, -0.5), title="perplexity")
    for axes in others:
        axes.set_title("lost, nats per token")
        axes.axvline(0, color=INK, linewidth=0.8)
    for axes in (first, *others):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("lower is better")
    legend(figure, handles)
    return figure
