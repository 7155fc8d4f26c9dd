# SPDX-License-Identifier: Apache-2.0
"""Scores, sensitivities, evaluations and sizes as points, lines and bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    RETAINED,
    TALLEST,
    TEXT,
    TINY,
    WIDTH,
    Sheet,
    count_ticks,
    legend_lines,
)
from .data import relative
from .measured import ALL, Evaluation, Judged, ModelCurve
from .words import SMALL, number, short, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: dict[str, Any] = {"uniform": "-", "global": (0, (5, 2)), "sensitivity": (0, (1.2, 1.2))}
_OTHER_DASHES: Any = (0, (5, 1.5, 1, 1.5))


# ------------------------------------------------------------------------------------------- scores


def scores(values: np.ndarray, kept: np.ndarray | None, layers: Sequence[int], label: str) -> Figure:
    """Scores of the experts of each layer, retained ones on the left of the layer's line and pruned ones on the right.

    Args:
        values: ``(L, E)``, NaN where there is none. Shown in units of the mean magnitude of the layer.
        kept: 1 where retained, 0 where pruned ``(L, E)``; None where there is no plan.
        layers: Numbers of the layers.
        label: What the scores are.
    """
    sheet, left, tall = Sheet(3.1), 0.85, 2.3
    axes = sheet.axes(left, 0.34, WIDTH - left - 0.1, tall)
    shown = relative(values)
    there = np.isfinite(shown)
    low, high = float(shown[there & (shown != 0)].min(initial=np.inf)), float(shown[there].max(initial=0.0))
    logarithmic = low > 0 and 30 * low < high
    if logarithmic:
        bottom = low * (low / high) ** 0.08
        shown = np.maximum(shown, bottom)
        _logarithmic(axes, bottom, 1.4 * high)
    size = float(np.clip(100 / math.sqrt(values.size), 1.6, 5.5))
    groups: list[tuple[np.ndarray, float, str, dict[str, Any]]] = [(there, 0.0, "expert", _FILLED)]
    if kept is not None:
        groups = [(there & (kept == 1), -0.17, "retained", _FILLED), (there & (kept == 0), 0.17, "pruned", _CROSSED)]
    for chosen, shift, name, look in groups:
        row, expert = np.nonzero(chosen)
        axes.plot(
            row + shift,
            shown[row, expert],
            linestyle="none",
            markersize=size,
            label=name,
            rasterized=values.size > 1500,
            clip_on=False,
            gid=name,
            **look,
        )
    axes.set_xlim(-0.6, len(layers) - 0.4)
    ticks = count_ticks(layers, (WIDTH - left) / len(layers), 0.2)
    axes.set_xticks(ticks, [str(layers[t]) for t in ticks])
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlabel("layer")
    words = f"{short(label, 20)} score\n(mean of the layer = 1)"
    sheet.text(0.06, 0.34 + tall / 2, words, rotation=90, va="center", multialignment="center")
    if kept is not None:
        sheet.legend(axes.get_legend_handles_labels()[0], left, handletextpad=0.1, markerscale=5.5 / size)
    return sheet.figure


_FILLED: dict[str, Any] = {"marker": "o", "color": RETAINED, "markeredgewidth": 0}
_CROSSED: dict[str, Any] = {"marker": "x", "color": COLOURS[1], "markeredgewidth": 0.9}


def _logarithmic(axes: Axes, low: float, high: float, axis: str = "y") -> None:
    """A logarithmic axis with plain numbers: powers of ten, with 2 and 5 where there are few."""
    from matplotlib.ticker import NullLocator

    axes.set(**{f"{axis}scale": "log", f"{axis}lim": (low, high)})
    decades = math.log10(high / low)
    steps = (1,) if decades > 3 else (1, 2, 5) if decades > 0.5 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [s * 10.0**p for p in powers for s in steps if low <= s * 10.0**p <= high]
    ticks = ticks[:: max(1, len(ticks) // 8)]
    target = axes.yaxis if axis == "y" else axes.xaxis
    target.set_ticks(ticks, [f"{t:g}" if 1e-4 <= t < 1e5 else f"{t:.0e}" for t in ticks])
    target.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------------------- sensitivities


def model_costs(curves: Sequence[ModelCurve], domains: Sequence[str]) -> Figure:
    """Divergence of the pruned model against sparsity: a line for each method and allocation, a panel per domain.

    One domain takes the whole width; several stand three in a row, all on one scale.
    """
    from matplotlib.lines import Line2D

    columns = min(len(domains), 3)
    rows = math.ceil(len(domains) / columns)
    methods = list(dict.fromkeys(curve.method for curve in curves))
    allocations = list(dict.fromkeys(curve.allocation for curve in curves))
    left, gap, foot = 0.7, 0.22, 0.46
    tall, head = (2.9, 0.1) if columns == 1 else (1.6, 0.32)
    width = (WIDTH - left - 0.1 - (columns - 1) * gap) / columns
    handles = [
        Line2D([], [], color=_colour(n), marker=_marker(n), markersize=5, label=short(method))
        for n, method in enumerate(methods)
    ]
    handles += [
        Line2D([], [], color=INK, linestyle=_DASHES.get(a, _OTHER_DASHES), label=f"{short(a)} allocation")
        for a in allocations
    ]
    legend = legend_lines(handles, WIDTH - left)[1]
    sheet = Sheet(legend + rows * (tall + head) + foot + 0.05)
    shown = np.concatenate([c.kl.get(d, np.zeros(0)) for c in curves for d in domains] or [np.zeros(0)])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.1, 1.0)
    logarithmic = high / low > 8
    for place, domain in enumerate(domains):
        row, column = divmod(place, columns)
        axes = sheet.axes(left + column * (width + gap), legend + row * (tall + head) + head, width, tall)
        for curve in curves:
            if domain not in curve.kl:
                continue
            cost = curve.kl[domain]
            seen = np.isfinite(cost) & ((cost > 0) | (not logarithmic))
            n = methods.index(curve.method)
            axes.plot(
                100 * curve.sparsity[seen],
                cost[seen],
                color=_colour(n),
                marker=_marker(n),
                markersize=4.5 if columns == 1 else 3.5,
                linewidth=1.3,
                linestyle=_DASHES.get(curve.allocation, _OTHER_DASHES),
                label=curve.label,
            )
        axes.grid()
        axes.set_axisbelow(True)
        if logarithmic:
            _logarithmic(axes, low / 1.4, high * 1.4)
        else:
            axes.set_ylim(0, high * 1.08)
        every = np.concatenate([100 * curve.sparsity for curve in curves])
        span = max(float(np.ptp(every)), 1.0)
        axes.set_xlim(every.min() - 0.05 * span, every.max() + 0.05 * span)
        axes.locator_params(axis="x", nbins=7 if columns == 1 else 5)
        if columns > 1 or domain != ALL:
            axes.set_title("all domains" if domain == ALL else short(domain, 26))
        if column:
            axes.tick_params(labelleft=False)
        if place + columns >= len(domains):
            axes.set_xlabel("experts removed, %")
        else:
            axes.tick_params(labelbottom=False)
    middle = legend + (rows * (tall + head) + head) / 2
    sheet.text(0.06, middle, "KL divergence, nats per token", rotation=90, va="center", fontsize=TEXT)
    sheet.legend(handles, left)
    return sheet.figure


def _colour(n: int) -> str:
    return COLOURS[n % len(COLOURS)]


def _marker(n: int) -> str:
    return MARKERS[n % len(MARKERS)]


# ------------------------------------------------------------------------------------------- evaluations


def perplexity_pages(evaluation: Evaluation) -> list[list[str]]:
    """The domains that each figure of :func:`perplexities` shows: as many as fit on a page, all of them in turn."""
    domains, many = evaluation.domains, max(1, int((TALLEST - 1) / _step(evaluation)))
    return [domains[start : start + many] for start in range(0, len(domains), many)]


def _step(evaluation: Evaluation) -> float:
    """The height of a domain in inches: a line for each model."""
    return 0.15 * max(1, len(evaluation.others)) + 0.16


def perplexities(evaluation: Evaluation, domains: Sequence[str]) -> Figure:
    """Perplexity by domain of every model, and beside it what was lost against the reference, with intervals."""
    from matplotlib.lines import Line2D

    others, reference = evaluation.others, evaluation.reference
    if not others:
        others, reference = evaluation.models, None
    compared = any("lost" in figures for model in others for figures in model.domains.values())
    names = ["all domains" if d == ALL else short(d, 26) for d in domains]
    left = 0.2 + text_width(names)
    step = _step(evaluation)
    handles = [
        Line2D([], [], color=_colour(n), marker=_marker(n), linestyle="none", markersize=6, label=short(m.label, 40))
        for n, m in enumerate(others)
    ]
    if reference is not None:
        label = f"{short(reference.label, 40)} (reference)"
        handles.insert(0, Line2D([], [], label=label, **_REFERENCE))
    head = legend_lines(handles, WIDTH - left)[1] + 0.3
    tall = step * len(domains)
    sheet = Sheet(head + tall + 0.5)
    gap = 0.35
    wide = (WIDTH - left - 0.15 - gap) * 0.5 if compared else WIDTH - left - 0.15
    first = sheet.axes(left, head, wide, tall)
    second = sheet.axes(left + wide + gap, head, wide, tall) if compared else None
    shifts = (np.arange(len(others)) - (len(others) - 1) / 2) * (0.15 / step)
    for row, domain in enumerate(domains):
        before = None if reference is None else reference.domains.get(domain, {}).get("perplexity")
        for n, model in enumerate(others):
            figures = model.domains.get(domain)
            if figures is None:
                continue
            y, colour = row + shifts[n], _colour(n)
            if before is not None:
                first.plot([before, figures["perplexity"]], [y, y], color=colour, linewidth=0.9, zorder=1)
                if interval := figures.get("perplexity_difference_interval"):
                    _interval(first, before + np.array(interval), y, colour)
            first.plot([figures["perplexity"]], [y], _marker(n), color=colour, markersize=5.5, gid=f"{n}:{domain}")
            if second is not None and "lost" in figures:
                if interval := figures.get("lost_interval"):
                    _interval(second, np.array(interval), y, colour)
                second.plot([figures["lost"]], [y], _marker(n), color=colour, markersize=5.5, gid=f"{n}:{domain}")
        if before is not None:
            ends = [row + shifts[0] - 0.12, row + shifts[-1] + 0.12]
            first.plot([before, before], ends, color=MUTED, linewidth=0.8, zorder=1)
            first.plot([before], [row], gid=f"reference:{domain}", zorder=4, **_REFERENCE)
    first.set_yticks(range(len(domains)), names)
    first.set_title("perplexity")
    every = [f["perplexity"] for m in evaluation.models for f in m.domains.values() if math.isfinite(f["perplexity"])]
    if every and max(every) / min(every) > 5:
        _logarithmic(first, min(every) / 1.15, max(every) * 1.15, "x")
    for axes in (first, second):
        if axes is None:
            continue
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("lower is better", fontsize=SMALL)
        if ALL in domains and len(domains) > 1:
            axes.axhline(len(domains) - 1.5, color=MUTED, linewidth=0.6)
    if second is not None:
        second.set_yticks(range(len(domains)), [])
        second.set_title("lost, nats per token")
        second.axvline(0, color=INK, linewidth=0.8)
    sheet.legend(handles, left)
    return sheet.figure


def _interval(axes: Axes, ends: np.ndarray, y: float, colour: str) -> None:
    axes.plot(ends, [y, y], color=colour, linewidth=1.4, marker="|", markersize=6, gid="interval")


_REFERENCE: dict[str, Any] = {
    "marker": "o",
    "markersize": 6.0,
    "markerfacecolor": "white",
    "markeredgecolor": INK,
    "markeredgewidth": 1.2,
    "linestyle": "none",
}


# ------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Measure:
    """Something that is measured of a model: its name, the value, and units for small and large values."""

    name: str
    of: Callable[[Judged], float | None]
    units: tuple[tuple[float, str], ...]

    def unit(self, values: Iterable[float | None]) -> tuple[float, str]:
        """The unit for some values: the largest that does not exceed the largest of them."""
        top = max(value for value in values if value is not None)
        return next((u for u in self.units if u[0] <= top), self.units[-1])


_BYTES = ((1e9, ", GB"), (1e6, ", MB"))

SIZES = (
    Measure("parameters", lambda m: m.parameters, ((1e9, ", billions"), (1e6, ", millions"), (1.0, ""))),
    Measure("size of the tensors", lambda m: m.bytes, _BYTES),
    Measure("peak memory of generation", lambda m: m.generation.get("peak_memory_bytes"), _BYTES),
    Measure("generation, tokens per second", lambda m: m.generation.get("tokens_per_second"), ((1.0, ""),)),
)


def known_sizes(evaluation: Evaluation) -> list[Measure]:
    """The measures of size and speed that are known of any model."""
    return [measure for measure in SIZES if any(measure.of(model) is not None for model in evaluation.models)]


def sizes(evaluation: Evaluation) -> Figure:
    """Parameters, bytes, memory and speed of every model as bars, the reference hatched."""
    measures, models = known_sizes(evaluation), evaluation.models
    names = [short(model.label, 26) for model in models]
    left, row, head = 0.2 + text_width(names), 0.24, 0.34
    columns = min(len(measures), 2)
    panel, tall = (WIDTH - left - 0.1) / columns, row * len(models)
    sheet = Sheet(math.ceil(len(measures) / columns) * (head + tall) + 0.1)
    for place, measure in enumerate(measures):
        line, column = divmod(place, columns)
        axes = sheet.axes(left + column * panel, line * (head + tall) + head, panel - 0.75, tall)
        values = [measure.of(model) for model in models]
        size, unit = measure.unit(values)
        top = max(value for value in values if value is not None) / size or 1.0
        for y, (model, value) in enumerate(zip(models, values, strict=True)):
            if value is None:
                axes.text(0, y, " not measured", va="center_baseline", fontsize=TINY, color=MUTED)
                continue
            look = _HATCHED if model is evaluation.reference else {"facecolor": RETAINED, "edgecolor": RETAINED}
            axes.barh(y, value / size, height=0.66, linewidth=0.8, **look)
            axes.text(value / size + 0.015 * top, y, number(value / size), va="center_baseline", fontsize=SMALL)
        axes.set_xlim(0, top)
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_yticks(range(len(models)), names if column == 0 else [""] * len(models))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        axes.set_title(measure.name + unit, fontsize=SMALL)
    return sheet.figure


_HATCHED: dict[str, Any] = {"facecolor": "white", "edgecolor": MUTED, "hatch": "////"}
