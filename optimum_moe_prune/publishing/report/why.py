# SPDX-License-Identifier: Apache-2.0
"""Sections about how set methods chose: Mosaic's clusters and Pathfinder's paths."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import RequestError
from ...plan import PruningPlan
from ...statistics.stats import CalibrationStats
from . import graphs
from .canvas import Gallery
from .data import Plans
from .explain import PATH_METHODS, MosaicLayer, Recipe, mosaic_layers, path_graph, recipe_of
from .page import Html, Section, details, element, figure, note, paragraph, table
from .words import NOTHING, plain, spans

_OPEN_LAYERS = 8  # so many layers are shown open


def mosaic_section(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> Section:
    """The clusters of every Mosaic plan."""
    section = Section("mosaic", "Mosaic's clusters")
    _each(section, ("mosaic",), _mosaic_part, stats, plans, gallery)
    if section.blocks:
        section.blocks.insert(0, _MOSAIC)
    return section


def paths_section(stats: CalibrationStats | None, plans: Plans, gallery: Gallery) -> Section:
    """The best paths of every Pathfinder plan."""
    section = Section("paths", "Pathfinder's paths")
    _each(section, PATH_METHODS, _paths_part, stats, plans, gallery)
    return section


def _each(
    section: Section,
    methods: tuple[str, ...],
    part: Callable[[Section, str, PruningPlan, Recipe, Gallery, int], None],
    stats: CalibrationStats | None,
    plans: Plans,
    gallery: Gallery,
) -> None:
    """A part for each plan of some methods, or a note why there is none."""
    for n, (name, plan) in enumerate(plans.items(), 1):
        if plan.method not in methods:
            continue
        section.add(element("h3", name))
        if stats is None:
            section.add(note("The statistics that the plan was made from show why it chose so; none were given."))
            continue
        try:
            part(section, name, plan, recipe_of(plan, stats), gallery, n)
        except RequestError as error:
            section.add(note(f"This cannot be shown: {plain(error).rstrip('.')}."))


_MOSAIC = paragraph(
    "In each layer Mosaic first keeps the generalists, the experts that together change the layer's output least. It "
    "sorts the tokens into domains by K-Means on the layer's inputs (these are clusters of tokens, not the domains of "
    "the calibration texts), compares the other experts by the domains they are good at, joins the most similar ones "
    "(Ward) until as many clusters are left as experts are wanted, and keeps of each cluster the expert whose "
    "activation varies most."
)


# ------------------------------------------------------------------------------------------- Mosaic


def _mosaic_part(section: Section, name: str, plan: PruningPlan, recipe: Recipe, gallery: Gallery, n: int) -> None:
    rows, blocks, different, arbitrary, quality = [], [], [], [], []
    open_ = len(recipe.budget.original) <= _OPEN_LAYERS
    for found in mosaic_layers(plan, recipe):
        if not found.agrees:
            different.append(found.layer)
        if found.cut == 0:
            arbitrary.append(found.layer)
        if found.silhouette is not None:
            quality.append(found.silhouette)
        sizes = sorted((len(members) for _, members in found.clusters), reverse=True)
        rows.append(
            [
                found.layer,
                len(found.generalists) + len(found.representatives),
                " ".join(map(str, found.generalists)) or NOTHING,
                len(found.domain_share) or NOTHING,
                NOTHING if found.silhouette is None else f"{found.silhouette:.2f}",
                f"{found.domain_share[0]:.0%}" if len(found.domain_share) else NOTHING,
                _runs(sizes),
            ]
        )
        if found.representatives:
            blocks.append(_mosaic_layer(found, n, gallery, open_))
    if different:
        section.add(
            note(
                "These statistics lead to another choice than the plan holds in layer ",
                spans(different),
                ": the plan was edited, or made from other statistics. What follows is what the statistics say.",
            )
        )
    if arbitrary:
        section.add(
            note(
                "Several experts rank all domains alike, and the cut runs through the midst of them, in layer ",
                spans(arbitrary),
                ": which of these share a cluster is arbitrary there. More domains tell more experts apart (option ",
                element("code", "num_domains"),
                ").",
            )
        )
    head = ["layer", "retained", "generalists", "domains", "silhouette", "largest domain", "experts in each cluster"]
    listed = table(head, rows, caption=f"Clusters by layer: {name}", words=(0, 2, 6))
    here = f" (here {min(quality):.2f} to {max(quality):.2f})" if quality else ""
    section.add(
        listed if open_ else details("Clusters by layer, as a table", listed),
        paragraph(
            f"Layers that keep all their experts are not listed. Silhouette{here}: how distinct the domains are, from "
            "-1 to 1. Near 0 they shade into one another, as the tokens of a language model often do."
        ),
        paragraph(
            "The tree joins experts from below, the more alike the lower; the dashed line is the cut, and bands mark "
            "the clusters it leaves. A triangle and a bold number mark the expert that is retained for its cluster. "
            "The map below the tree shows what was compared: for each expert its domains, ranked by the error of the "
            "layer with this expert alone. Pale: where it is best. Experts of one cluster should look alike. The "
            "percentages are the shares of the domains in the tokens."
        ),
    )
    if open_:
        section.add(*blocks)
    else:
        words = f"All {len(blocks)} layers follow; open one to see it. On paper are those that are open."
        section.add(paragraph(words), element("div", *blocks, class_="layers"))


def _runs(sizes: list[int]) -> str:
    """Sizes, falling, as text: ``4, 2, 3 x 1``."""
    counts = {size: sizes.count(size) for size in dict.fromkeys(sizes)}
    words = [f"{many} \N{MULTIPLICATION SIGN} {size}" if many > 1 else str(size) for size, many in counts.items()]
    return ", ".join(words) or NOTHING


def _mosaic_layer(found: MosaicLayer, n: int, gallery: Gallery, open_: bool) -> Html:
    clusters = sorted(found.clusters, key=lambda cluster: -len(cluster[1]))
    score = dict(zip(found.experts, found.scores.tolist(), strict=True))
    alt = (
        f"Layer {found.layer}: tree of {len(found.experts)} experts, cut into {len(clusters)} clusters, whose "
        f"representatives are {_listed(found.representatives)}. The table below has the members."
    )
    picture = gallery.draw(f"mosaic-{n}-layer-{found.layer:02d}", alt, graphs.clusters, found)
    rows = [
        [representative, f"{score[representative]:.2f}", _others(representative, members, score)]
        for representative, members in clusters
    ]
    head = ["retained", "variability, bits", "pruned experts of its cluster (variability)"]
    listed = table(head, rows, caption=f"Clusters of layer {found.layer}", words=(0, 2))
    what = "generalist" if len(found.generalists) == 1 else "generalists"
    first = f", {what} {_listed(found.generalists)}" if found.generalists else ""
    summary = f"Layer {found.layer}: {len(clusters)} clusters{first}"
    return details(summary, figure(picture), details("The same as a table", listed), open_=open_)


def _listed(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts))


def _others(representative: int, members: tuple[int, ...], score: dict[int, float]) -> str:
    return ", ".join(f"{e} ({score[e]:.2f})" for e in members if e != representative) or NOTHING


# ------------------------------------------------------------------------------------------- Pathfinder


def _paths_part(section: Section, name: str, plan: PruningPlan, recipe: Recipe, gallery: Gallery, n: int) -> None:
    graph = path_graph(plan, recipe)
    grown, shown = graph.paths_per_sample, graphs.drawn_edges(graph)[1]
    on_paths = {(layer, e) for layer, node in zip(graph.layers, graph.nodes, strict=True) for e in node.nonzero()[0]}
    kept = {(layer, e) for layer, experts in plan.retained.items() for e in experts}
    alt = (
        f"{name}: the best paths of {graph.samples} samples through {len(graph.layers)} layers. {len(on_paths)} "
        f"experts are on paths, {len(on_paths & kept)} of them retained."
    )
    picture = gallery.draw(f"paths-{n}", alt, graphs.paths, plan, graph)
    best = "best path" if shown == 1 else f"{shown} best paths"
    caption = [
        "A path is one expert in each MoE layer, layers from left to right. A line joins two experts that follow each "
        f"other on the {best} of a sample; the more samples use it, the wider and darker it is. Filled experts are "
        "retained, hollow ones pruned."
    ]
    if shown < grown:
        caption.append(f" The plan was made from {grown} paths of each sample; their lines would be too many.")
    section.add(figure(picture, *caption))
    section.add(
        paragraph(
            f"{len(on_paths)} experts are on {'the best path' if grown == 1 else f'the {grown} best paths'} of a "
            f"sample; {len(on_paths & kept)} of them are among the {len(kept)} that the plan retains. The others that "
            "it retains are the next best up to the budget, protected, or in layers that keep all."
        )
    )
    if graph.trimmed:
        section.add(
            note("The best paths alone use more experts than the budget holds: those on the fewest paths are pruned.")
        )
    rows = []
    for layer, node in zip(graph.layers, graph.nodes, strict=True):
        order = sorted(range(len(node)), key=lambda e: (-node[e], e))[:5]
        most = ", ".join(f"{e} ({node[e] / max(1, graph.samples):.0%})" for e in order if node[e])
        rows.append([layer, int((node > 0).sum()), len(plan.retained[layer]), most or NOTHING])
    head = ["layer", "experts on paths", "retained", "on the paths of the most samples"]
    listed = table(head, rows, caption=f"Experts on the best paths by layer: {name}", words=(0, 3))
    section.add(details("The same as a table", listed))
