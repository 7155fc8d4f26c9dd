# SPDX-License-Identifier: Apache-2.0
"""The sections about why plans are as they are: Mosaic's clusters and Pathfinder's paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...errors import RequestError
from ...plan import PruningPlan
from ...statistics.stats import CalibrationStats
from . import graphs
from .drawing import Gallery
from .explain import PATH_METHODS, MosaicLayer, Recipe, mosaic_layers, path_graph, recipe_of
from .sections import Content, Plans
from .tables import Table
from .text import MISSING, listed, spans

_OPEN_LAYERS = 8  # so many layers are shown open
_MOST_CELLS = 60_000  # of the tables below all trees of a plan


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
    is_open = len(recipe.budget.original) <= _OPEN_LAYERS
    cells = sum(layer.vectors.size + 4 * layer.merges for layer in found)
    head = ["layer", "retained", "generalists", "domains", "silhouette", "largest domain", "experts in each cluster"]
    return {
        "different": spans(layer.layer for layer in found if not layer.agrees),
        "arbitrary": spans(layer.layer for layer in found if layer.arbitrary),
        "no_tree": spans(layer.layer for layer in found if layer.merges and not layer.has_tree),
        "trees": any(layer.has_tree for layer in found),
        "quality": f"{min(quality):.2f} to {max(quality):.2f}" if quality else None,
        "table": Table(f"Clusters by layer: {name}", head, rows, words=(0, 2, 6)),
        "layers": [
            _cluster_layer(layer, n, gallery, is_open, cells <= _MOST_CELLS)
            for layer in found
            if layer.clusters is not None
        ],
        "open": is_open,
    }


def _runs(sizes: Sequence[int]) -> str:
    """Falling sizes as text: ``4, 2, 3 x 1``."""
    counts = {size: sizes.count(size) for size in sizes}
    return listed(f"{many} \N{MULTIPLICATION SIGN} {size}" if many > 1 else size for size, many in counts.items())


def _cluster_layer(found: MosaicLayer, n: int, gallery: Gallery, is_open: bool, whole: bool) -> Content:
    assert found.clusters is not None
    count, experts = len(found.members), found.clusters.experts
    tree = "tree of" if found.has_tree else "the"
    alt = (
        f"Layer {found.layer}: {tree} {len(experts)} experts in {count} clusters, whose representatives are "
        f"{listed(found.representatives)}. The table below has the members."
    )
    score = dict(zip(experts, found.clusters.scores.tolist(), strict=True))
    rows = [
        [first, f"{score[first]:.2f}", listed(f"{e} ({score[e]:.2f})" for e in members if e != first)]
        for first, members in found.members.items()
    ]
    head = ["retained", "variability, bits", "pruned experts of its cluster (variability)"]
    what = f", generalist{'s' * (len(found.generalists) > 1)} {listed(found.generalists)}" if found.generalists else ""
    tables = graphs.clusters_tables(found) if whole else []
    name = f"mosaic-{n}-layer-{found.layer:02d}"
    # Of many layers that are looked at one by one, a drawing for small screens would double the page for little.
    return {
        "summary": f"Layer {found.layer}: {count} cluster{'s' * (count > 1)}{what}",
        "figure": gallery.draw(name, alt, graphs.clusters, found, tables=tables, both=is_open),
        "ties": None if found.has_tree or not found.merges else (found.tied, found.merges),
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
        "figure": gallery.draw(
            f"paths-{n}", alt, graphs.paths, plan, graph, samples, tables=graphs.paths_tables(plan, graph)
        ),
        "best": "best path" if graph.paths_per_sample == 1 else f"{graph.paths_per_sample} best paths",
        "trimmed": graph.trimmed,
        "most_edges": graphs.MOST_EDGES if any((edge > 0).sum() > graphs.MOST_EDGES for edge in graph.edges) else None,
        "counts": (len(on_paths), both, sum(plan.num_experts.values())),
        "table": Table(f"Experts on the best paths by layer: {name}", head, rows, words=(0, 3)),
    }
