# SPDX-License-Identifier: Apache-2.0
"""The sections about plans and statistics: their figures and tables, from which the template makes HTML.

Every function gives what the section of its name shows, as the template reads it, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...methods import get_method, list_methods
from ...plan import PruningPlan
from ...planning import choice
from ...statistics.stats import CalibrationStats
from ...storage.values import Json
from . import charts, maps
from .data import coverage, known_scores, mismatch, overlap, relative, retained_grid, routing_share, score_grid
from .data import single_error as relative_error
from .drawing import Gallery, Picture
from .tables import Table, lowest
from .text import MISSING, extent, listed, number, spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Plans = Mapping[str, PruningPlan]
Content = Json

_NAMED = 3  # experts of a domain that tables name
_DOMAINS = 12  # of which there are maps
_PANELS = 3  # of scores in a picture


def in_words(plan: PruningPlan) -> str:
    """How many experts a plan retains."""
    kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
    removed = f"{total - kept:,} ({plan.sparsity:.1%}) removed"
    return f"{kept:,} of {total:,} experts retained, {extent(plan.num_experts.values())} in a layer; {removed}"


# ------------------------------------------------------------------------------------------- retained experts


def retained(plans: Plans, gallery: Gallery) -> Content | None:
    """Which experts each plan retains."""
    if not plans:
        return None
    shown = []
    for name, plan in plans.items():
        grid = retained_grid(plan)
        shown.append(maps.Map(name, sorted(plan.retained), _numbers(grid), grid, np.nansum(grid, axis=1)))

    def tables(page: Sequence[maps.Map]) -> list[Table]:
        some = {m.title: plans[m.title] for m in page}
        layers = sorted({layer for plan in some.values() for layer in plan.retained})
        rows = [[layer, *(_retained_of(plan, layer) for plan in some.values())] for layer in layers]
        return [Table("Retained experts by layer", ["layer", *some], rows, words=range(len(some) + 1))]

    figures = maps.draw_all(gallery, "retained", "Retained experts by layer", shown, maps.retained, tables=tables)
    shared = None
    if len(plans) > 1 and len({tuple(sorted(p.original_num_experts.items())) for p in plans.values()}) == 1:
        rows = [[name, *(f"{share:.0%}" for share in row)] for name, row in zip(plans, overlap(plans), strict=True)]
        head = ["of the experts that this plan retains", *plans]
        shared = Table("Share that the other plans retain as well", head, rows)
    methods = [get_method(name) for name in dict.fromkeys(p.method for p in plans.values()) if name in list_methods()]
    return {"figures": figures, "shared": shared, "methods": methods, "choices": _choices(plans)}


def _choices(plans: Plans) -> list[Table]:
    """Of plans that were chosen by measuring, what they and the plans beside them lost."""
    found = []
    for name, plan in plans.items():
        if rows := choice.rows(plan):
            caption = f"{name}, and what was measured beside it, on {choice.judged_on(plan)}"
            found.append(Table(caption, rows[0], rows[1:]))
    return found


def _numbers(grid: np.ndarray) -> list[str]:
    """The experts that the columns of a map ``(L, E)`` are."""
    return list(map(str, range(grid.shape[1])))


def _retained_of(plan: PruningPlan, layer: int) -> str:
    experts = plan.retained.get(layer)
    return MISSING if experts is None else f"{len(experts)} of {plan.original_num_experts[layer]}: {spans(experts)}"


# ------------------------------------------------------------------------------------------- domains


def domains(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> Content | None:
    """Which domains each expert serves, and what the plans keep of them."""
    if stats is None or not stats.domains:
        return None
    content: Content = {"only_one": len(stats.domains) == 1, "top_k": stats.model["top_k"], "even": None}
    content |= {"routing": None, "coverage": None, "error": None}
    most = most_of({domain: float(tokens) for domain, tokens in stats.domains.items()}, _DOMAINS)
    content["some"] = None if len(most) == len(stats.domains) else (len(most), len(stats.domains))
    rows = [row for row, domain in enumerate(stats.domains) if domain in most]
    routing, error = routing_share(stats), relative_error(stats)
    if routing is not None:
        counts = set(stats.num_experts.values())
        even = 100 / counts.pop() if len(counts) == 1 else None
        content["even"] = None if even is None else f"{number(even)}%"
        mark = None if even is None else (even, f"used alike: {number(even)}%")
        label, top = "share of the domain's routing, %", 100 * float(np.nanmax(routing)) or 1.0
        words = maps.percent if top >= 20 else maps.tenths
        shown = Shown("routing", "Share of the routing", "% of the domain's routing", words, maps.shares)
        more = 0.0, top, label, "expert", 0.5, mark, words
        figures = _by_domain(shown, 100 * routing, rows, stats, gallery, *more)
        caption = f"The {_NAMED} most used experts of each domain, with their shares of the domain's routing"
        content["routing"] = figures, _leaders(stats, -routing, rows, lambda v: f"{-v:.0%}", caption)
        content["coverage"] = _coverage(stats, routing, plans, gallery)
    if error is not None:
        label = "squared error with this expert alone / squared output of the layer"
        shown = Shown("single-error", "Error of each expert alone", "error of the expert", maps.error, maps.errors)
        top = float(np.nanmax(error[np.isfinite(error)]))
        figures = _by_domain(shown, error, rows, stats, gallery, top, label)
        caption = f"The {_NAMED} experts with the least error of each domain, and that error"
        content["error"] = figures, _leaders(stats, error, rows, maps.error, caption)
    return content


def most_of(values: Mapping[str, float], most: int) -> list[str]:
    """The names of the largest values, at most so many, in the order they are given in."""
    chosen = sorted(values, key=lambda name: -values[name])[:most]
    return [name for name in values if name in chosen]


@dataclass(frozen=True)
class Shown:
    """What maps of every domain show: the name of their files, in words, its unit, a value as text, and who draws."""

    name: str
    what: str
    unit: str
    words: Callable[[float], str]
    make: Callable[..., Figure]


def _by_domain(
    shown: Shown, values: np.ndarray, rows: Sequence[int], stats: CalibrationStats, gallery: Gallery, *args: Any
) -> list[Picture]:
    """Maps of values ``(D, L, E)``, one for each domain of some rows, drawn with ``args``."""
    layers, domains = sorted(stats.layers), list(stats.domains)
    grids = [maps.Map(domains[row], layers, _numbers(values[row]), values[row]) for row in rows]

    def tables(page: Sequence[maps.Map]) -> list[Table]:
        return maps.as_tables(page, shown.words, "expert", shown.unit)

    title = f"{shown.what}, by layer and expert, for each domain"
    return maps.draw_all(gallery, shown.name, title, grids, shown.make, *args, tables=tables)


def _leaders(
    stats: CalibrationStats, keys: np.ndarray, rows: Sequence[int], words: Callable[[float], str], caption: str
) -> Table:
    """For each layer and domain of some rows the experts with the lowest keys ``(D, L, E)``, and these in words."""
    lines = []
    for n, (layer, count) in enumerate(sorted(stats.num_experts.items())):
        values = [keys[row, n, :count] for row in rows]
        firsts = [np.argsort(line, kind="stable")[:_NAMED] for line in values]
        cells = [listed(f"{e} ({words(float(v[e]))})" for e in f) for v, f in zip(values, firsts, strict=True)]
        lines.append([layer, *cells])
    domains = list(stats.domains)
    return Table(caption, ["layer", *(domains[row] for row in rows)], lines, words=range(len(rows) + 1))


def _coverage(
    stats: CalibrationStats, routing: np.ndarray, plans: Plans, gallery: Gallery
) -> tuple[list[Picture], Table] | None:
    """How much of each domain's routing the plans keep."""
    kept = {name: coverage(plan, routing) for name, plan in plans.items() if mismatch(plan, stats) is None}
    if not kept:
        return None
    layers, names = sorted(stats.layers), list(stats.domains)
    worst = np.min([table.min(axis=0) for table in kept.values()], axis=0)
    chosen = most_of(dict(zip(names, -worst, strict=True)), 2 * _DOMAINS)
    columns = [n for n, name in enumerate(names) if name in chosen]
    low = 10 * math.floor(min(100 * float(worst.min()), 90) / 10)
    label = "share of the domain's routing that went to retained experts, %"
    shown = [
        maps.Map(name, layers, [names[n] for n in columns], 100 * table[:, columns]) for name, table in kept.items()
    ]

    def tables(page: Sequence[maps.Map]) -> list[Table]:
        return maps.as_tables(page, maps.percent, "domain", "% of the domain's routing that it keeps")

    what = "Share of each domain's routing that went to retained experts, by layer"
    if len(chosen) < len(names):
        what += f", of the {len(chosen)} domains of which the least is kept in a layer"
    args = maps.shares, low, 100, label, "domain"
    figures = maps.draw_all(gallery, "coverage", what, shown, *args, tables=tables)
    means = [[float(table[:, n].mean()) for table in kept.values()] for n in range(len(names))]
    rows = [[name, *(f"{share:.1%}" for share in line)] for name, line in zip(names, means, strict=True)]
    least = [np.unravel_index(int(table.argmin()), table.shape) for table in kept.values()]
    cells = (
        f"{table.min():.0%} (layer {layers[layer]}, {names[domain]})"
        for table, (layer, domain) in zip(kept.values(), least, strict=True)
    )
    rows.append(["least in any layer", *cells])
    caption = "Share of the routing that went to retained experts, mean of the layers"
    best = lowest([[-share for share in line] for line in means])
    return figures, Table(caption, ["domain", *kept], rows, best=best)


# ------------------------------------------------------------------------------------------- scores


def scores(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> Content | None:
    """How the scores are spread, and where each plan cut them; without plans those that the statistics give."""
    panels, without = [], []
    for name, plan in plans.items():
        values = score_grid(plan)
        if values is None:
            without.append(f"{name} ({plan.method})")
        else:
            title = name if plan.method in name else f"{name}: {plan.method}"
            panels.append(charts.Scores(title, plan.method, values, retained_grid(plan), sorted(plan.retained)))
    known = known_scores(stats) if stats is not None and not plans else {}
    for label, values in known.items():
        panels.append(charts.Scores(label, label, values, None, sorted(stats.layers if stats else ())))
    pages = [panels[start : start + _PANELS] for start in range(0, len(panels), _PANELS)]
    figures = [
        gallery.draw(f"scores-{n}", _scores_alt(page), charts.scores, page, tables=charts.scores_tables(page))
        for n, page in enumerate(pages, 1)
    ]
    if not figures and not without:
        return None
    return {"figures": figures, "without": without, "methods": [get_method(name) for name in known]}


def _scores_alt(panels: Sequence[charts.Scores]) -> str:
    words = []
    for panel in panels:
        times = relative(panel.values)
        low, high = number(float(np.nanmin(times)), 2), number(float(np.nanmax(times)), 2)
        words.append(f"{panel.title}, from {low} to {high} times the mean of the layer")
    return f"Scores of the experts by layer. {'; '.join(words)}."
