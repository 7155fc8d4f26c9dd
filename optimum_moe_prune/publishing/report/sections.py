# SPDX-License-Identifier: Apache-2.0
"""The sections about plans and statistics: their figures and tables, from which the template makes HTML.

Every function gives what the section of its name shows, as the template reads it, or nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import RequestError
from ...methods import get_method, list_methods
from ...plan import PruningPlan
from ...statistics.stats import CalibrationStats
from ...storage.values import Json
from . import charts, graphs, maps
from .data import coverage, known_scores, mismatch, overlap, relative, retained_grid, routing_share, score_grid
from .data import single_error as relative_error
from .drawing import Gallery, Picture
from .explain import PATH_METHODS, MosaicLayer, Recipe, mosaic_layers, path_graph, recipe_of
from .text import MISSING, extent, listed, number, short, spans

Plans = Mapping[str, PruningPlan]
Content = Json

_NAMED = 3  # experts of a domain that tables name
_OPEN_LAYERS = 8  # so many layers are shown open


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; without a head, facts in two columns.

    Columns of ``words`` are set to the left; the others are numbers, set to the right.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: Collection[int] = (0,)

    @classmethod
    def of(cls, caption: str, rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> Table | None:
        """From rows whose first is the head; None if there are no others."""
        return cls(caption, rows[0], rows[1:], words) if len(rows) > 1 else None


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
    figures = maps.draw_all(gallery, "retained", "Retained experts by layer", shown, maps.retained)
    rows = [
        [layer, *(_retained_of(plan, layer) for plan in plans.values())]
        for layer in sorted({layer for plan in plans.values() for layer in plan.retained})
    ]
    table = Table("Retained experts by layer", ["layer", *plans], rows, words=range(len(plans) + 1))
    shared = None
    if len(plans) > 1 and len({tuple(sorted(p.original_num_experts.items())) for p in plans.values()}) == 1:
        rows = [[name, *(f"{share:.0%}" for share in row)] for name, row in zip(plans, overlap(plans), strict=True)]
        head = ["of the experts that this plan retains", *plans]
        shared = Table("Share that the other plans retain as well", head, rows)
    notes = {name: plan.provenance.get("notes") for name, plan in plans.items()}
    remarks = [f"{name}: {note}" for name, found in notes.items() if isinstance(found, list) for note in found]
    methods = [get_method(name) for name in sorted({plan.method for plan in plans.values()} & set(list_methods()))]
    return {"figures": figures, "table": table, "shared": shared, "methods": methods, "remarks": remarks}


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
    routing, error = routing_share(stats), relative_error(stats)
    if routing is not None:
        counts = set(stats.num_experts.values())
        content["even"] = f"{number(100 / counts.pop())}%" if len(counts) == 1 else None
        scale = 0.0, 100 * float(np.nanmax(routing)) or 1.0, "share of the domain's routing, %", "expert", 0.5
        figures = _by_domain("routing", "Share of the routing", 100 * routing, scale, stats, gallery)
        caption = f"The {_NAMED} most used experts of each domain, with their shares of the domain's routing"
        content["routing"] = figures, _leaders(stats, -routing, lambda v: f"{-v:.0%}", caption)
        content["coverage"] = _coverage(stats, routing, plans, gallery)
    if error is not None:
        top = min(float(np.nanmax(error)), max(2.0, float(np.nanpercentile(error, 98)))) or 1.0
        scale = 0.0, top, "squared error with this expert alone / squared output of the layer", "expert", 1.0
        figures = _by_domain("single-error", "Error of each expert alone", error, scale, stats, gallery)
        caption = f"The {_NAMED} experts with the least error of each domain, and that error"
        content["error"] = figures, _leaders(stats, error, lambda v: number(v, 2), caption)
    return content


def _by_domain(
    name: str, what: str, values: np.ndarray, scale: tuple[Any, ...], stats: CalibrationStats, gallery: Gallery
) -> list[Picture]:
    """Maps of values ``(D, L, E)``, one for each domain; ``scale`` as in ``maps.shares``."""
    layers = sorted(stats.layers)
    shown = [maps.Map(d, layers, _numbers(grid), grid) for d, grid in zip(stats.domains, values, strict=True)]
    return maps.draw_all(gallery, name, f"{what}, by layer and expert, for each domain", shown, maps.shares, *scale)


def _leaders(stats: CalibrationStats, keys: np.ndarray, words: Callable[[float], str], caption: str) -> Table:
    """For each layer and domain the experts with the lowest keys ``(D, L, E)``, and these in words."""
    rows = []
    for row, (layer, count) in enumerate(sorted(stats.num_experts.items())):
        lines = [table[row, :count] for table in keys]
        firsts = [np.argsort(line, kind="stable")[:_NAMED] for line in lines]
        cells = [listed(f"{e} ({words(float(line[e]))})" for e in f) for line, f in zip(lines, firsts, strict=True)]
        rows.append([layer, *cells])
    return Table(caption, ["layer", *stats.domains], rows, words=range(len(keys) + 1))


def _coverage(
    stats: CalibrationStats, routing: np.ndarray, plans: Plans, gallery: Gallery
) -> tuple[list[Picture], Table] | None:
    """How much of each domain's routing the plans keep."""
    kept = {name: coverage(plan, routing) for name, plan in plans.items() if mismatch(plan, stats) is None}
    if not kept:
        return None
    layers, names = sorted(stats.layers), list(stats.domains)
    low = 10 * math.floor(min(100 * min(float(table.min()) for table in kept.values()), 90) / 10)
    label = "share of the domain's routing that went to retained experts, %"
    columns = [short(name, 16) for name in names]
    shown = [maps.Map(name, layers, columns, 100 * table) for name, table in kept.items()]
    what = "Share of each domain's routing that went to retained experts, by layer"
    figures = maps.draw_all(gallery, "coverage", what, shown, maps.shares, low, 100, label, "domain")
    rows = []
    for name, table in kept.items():
        layer, domain = np.unravel_index(int(table.argmin()), table.shape)
        worst = f"{table.min():.0%} (layer {layers[layer]}, {names[domain]})"
        rows.append([name, *(f"{share:.1%}" for share in table.mean(axis=0)), worst])
    caption = "Share of the routing that went to retained experts, mean of the layers"
    return figures, Table(caption, ["plan", *names, "least in any layer"], rows)


# ------------------------------------------------------------------------------------------- scores


def scores(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> list[Content]:
    """How the scores are spread, and where each plan cut them; for a plan without scores those of another method."""
    known = {} if stats is None else known_scores(stats)
    stand_in = next(iter(known), None)
    parts: list[Content] = []
    for n, (name, plan) in enumerate(plans.items(), 1):
        values, label = score_grid(plan), plan.method
        if values is None:
            if stand_in is None or stats is None or mismatch(plan, stats) is not None:
                continue
            values, label = known[stand_in], stand_in
        shown = values, retained_grid(plan), sorted(plan.retained), label
        figure = gallery.draw(f"scores-{n}", _score_alt(name, values), charts.scores, *shown)
        parts.append({"name": name, "figure": figure, "method": plan.method, "label": label, "own": bool(plan.scores)})
    for label, values in known.items():
        if plans or stats is None:
            break
        args = values, None, sorted(stats.layers), label
        figure = gallery.draw(f"scores-{label}", _score_alt(label, values), charts.scores, *args)
        parts.append({"name": label, "figure": figure, "about": get_method(label)})
    return parts


def _score_alt(name: str, values: np.ndarray) -> str:
    times = relative(values)
    low, high = number(float(np.nanmin(times)), 2), number(float(np.nanmax(times)), 2)
    return f"{name}: scores of the experts by layer, from {low} to {high} times the mean of the layer."


# ------------------------------------------------------------------------------------------- why plans are as they are


def mosaic(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> list[Content]:
    """The clusters of every Mosaic plan."""
    return _explained(("mosaic",), _clusters, stats, plans, gallery)


def paths(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> list[Content]:
    """The best paths of every Pathfinder plan."""
    return _explained(PATH_METHODS, _paths, stats, plans, gallery)


def _explained(
    methods: tuple[str, ...],
    explain: Callable[[str, PruningPlan, Recipe, Gallery, int], Content],
    stats: CalibrationStats | None,
    plans: Plans,
    gallery: Gallery,
) -> list[Content]:
    """What explains each plan of some methods, or why nothing does."""
    parts: list[Content] = []
    for n, (name, plan) in enumerate(plans.items(), 1):
        if plan.method not in methods:
            continue
        if stats is None:
            problem = "The statistics that the plan was made from show why it chose so; none were given."
            parts.append({"name": name, "problem": problem})
            continue
        try:
            parts.append({"name": name, "problem": None, **explain(name, plan, recipe_of(plan, stats), gallery, n)})
        except RequestError as error:
            parts.append({"name": name, "problem": f"This cannot be shown: {str(error).rstrip('.')}."})
    return parts


def _clusters(name: str, plan: PruningPlan, recipe: Recipe, gallery: Gallery, n: int) -> Content:
    found = list(mosaic_layers(plan, recipe))
    quality = [layer.silhouette for layer in found if layer.silhouette is not None]
    rows = [
        [
            layer.layer,
            len(layer.generalists) + len(layer.representatives),
            listed(layer.generalists),
            len(layer.shares) or MISSING,
            MISSING if layer.silhouette is None else f"{layer.silhouette:.2f}",
            f"{layer.shares[0]:.0%}" if len(layer.shares) else MISSING,
            _runs([len(members) for members in layer.members.values()]),
        ]
        for layer in found
    ]
    head = ["layer", "retained", "generalists", "domains", "silhouette", "largest domain", "experts in each cluster"]
    return {
        "different": spans(layer.layer for layer in found if not layer.agrees),
        "arbitrary": spans(layer.layer for layer in found if layer.cut == 0),
        "quality": f"{min(quality):.2f} to {max(quality):.2f}" if quality else None,
        "table": Table(f"Clusters by layer: {name}", head, rows, words=(0, 2, 6)),
        "layers": [_cluster_layer(layer, n, gallery) for layer in found if layer.clusters is not None],
        "open": len(recipe.budget.original) <= _OPEN_LAYERS,
    }


def _runs(sizes: Sequence[int]) -> str:
    """Falling sizes as text: ``4, 2, 3 x 1``."""
    counts = {size: sizes.count(size) for size in sizes}
    return listed(f"{many} \N{MULTIPLICATION SIGN} {size}" if many > 1 else size for size, many in counts.items())


def _cluster_layer(found: MosaicLayer, n: int, gallery: Gallery) -> Content:
    assert found.clusters is not None
    count, experts = len(found.members), found.clusters.experts
    alt = (
        f"Layer {found.layer}: tree of {len(experts)} experts, cut into {count} clusters, whose representatives are "
        f"{listed(found.representatives)}. The table below has the members."
    )
    score = dict(zip(experts, found.clusters.scores.tolist(), strict=True))
    rows = [
        [first, f"{score[first]:.2f}", listed(f"{e} ({score[e]:.2f})" for e in members if e != first)]
        for first, members in found.members.items()
    ]
    head = ["retained", "variability, bits", "pruned experts of its cluster (variability)"]
    what = f", generalist{'s' * (len(found.generalists) > 1)} {listed(found.generalists)}" if found.generalists else ""
    return {
        "summary": f"Layer {found.layer}: {count} cluster{'s' * (count > 1)}{what}",
        "figure": gallery.draw(f"mosaic-{n}-layer-{found.layer:02d}", alt, graphs.clusters, found),
        "table": Table(f"Clusters of layer {found.layer}", head, rows, words=(0, 2)),
    }


def _paths(name: str, plan: PruningPlan, recipe: Recipe, gallery: Gallery, n: int) -> Content:
    graph, samples = path_graph(plan, recipe), len(recipe.stats.samples)
    layers = list(zip(sorted(plan.retained), graph.nodes, strict=True))
    on_paths = {(layer, e) for layer, node in layers for e in node.nonzero()[0]}
    both = sum((layer, e) in on_paths for layer, experts in plan.retained.items() for e in experts)
    alt = (
        f"{name}: the best paths of {samples} samples through {len(layers)} layers. {len(on_paths)} experts are on "
        f"paths, {both} of them retained."
    )
    rows = []
    for layer, node in layers:
        order = np.argsort(-node, kind="stable")[:5]
        most = listed(f"{e} ({node[e] / max(1, samples):.0%})" for e in order if node[e])
        rows.append([layer, int((node > 0).sum()), len(plan.retained[layer]), most])
    head = ["layer", "experts on paths", "retained", "on the paths of the most samples"]
    return {
        "figure": gallery.draw(f"paths-{n}", alt, graphs.paths, plan, graph, samples),
        "best": "best path" if graph.paths_per_sample == 1 else f"{graph.paths_per_sample} best paths",
        "trimmed": graph.trimmed,
        "most_edges": graphs.MOST_EDGES if any((edge > 0).sum() > graphs.MOST_EDGES for edge in graph.edges) else None,
        "counts": (len(on_paths), both, sum(plan.num_experts.values())),
        "table": Table(f"Experts on the best paths by layer: {name}", head, rows, words=(0, 3)),
    }
