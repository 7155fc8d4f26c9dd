# SPDX-License-Identifier: Apache-2.0
"""Sections about plans and statistics: what is retained, which domains the experts serve, and the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...methods import get_method, list_methods
from ...plan import PruningPlan
from ...statistics.stats import CalibrationStats
from . import curves, grids, maps
from .canvas import Gallery
from .data import Plans, Reduced, coverage, mismatch, overlap, relative, retained_grid, score_grid
from .page import Html, Section, details, element, figure, items, join, note, paragraph, table
from .words import number, plain, span, spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED = 3  # experts of a domain that tables name


# ------------------------------------------------------------------------------------------- retained experts


def retained_section(plans: Plans, gallery: Gallery) -> Section:
    """Which experts each plan retains."""
    section = Section("retained", "Retained experts")
    if not plans:
        return section
    for n, names in enumerate(maps.pages(plans), 1):
        shown = {name: plans[name] for name in names}
        alt = "; ".join(f"{name}: {_in_words(plan)}" for name, plan in shown.items())
        picture = gallery.draw(f"retained-{n}", f"Maps of the retained experts. {alt}.", maps.retained, shown)
        section.add(
            figure(
                picture,
                "One row for each MoE layer, the first layer on top; one column for each expert, as the original "
                "model numbers it. Dark experts are retained, pale ones pruned; where there is nothing, the layer has "
                "no such expert. The bars count the retained experts of each layer. Experts of different layers have "
                "nothing but the number in common.",
            )
        )
    if methods := sorted({plan.method for plan in plans.values()} & set(list_methods())):
        section.add(items(join([_code(method), ": ", *_method_words(method)]) for method in methods))
    shapes = [plan.original_num_experts for plan in plans.values()]
    if len(plans) > 1 and all(shape == shapes[0] for shape in shapes):
        rows = [[name, *(f"{share:.0%}" for share in line)] for name, line in zip(plans, overlap(plans), strict=True)]
        head = ["of the experts that this plan retains", *plans]
        section.add(table(head, rows, caption="Share that the other plans retain as well"))
    for name, plan in plans.items():
        lines = [
            [layer, f"{len(e)} of {plan.original_num_experts[layer]}", spans(e)]
            for layer, e in sorted(plan.retained.items())
        ]
        caption = f"Retained experts by layer: {name}"
        listed = table(["layer", "retained", "experts"], lines, caption=caption, words=(0, 1, 2))
        section.add(details(f"The same as a table: {name}", listed))
    if remarks := _remarks(plans):
        section.add(paragraph("Noted when the plans were made:"), items(remarks))
    return section


def _remarks(plans: Plans) -> list[str]:
    """What the plans say of themselves, each remark once with the plans it is about."""
    about: dict[str, list[str]] = {}
    for name, plan in plans.items():
        notes = plan.provenance.get("notes")
        for remark in notes if isinstance(notes, list) else []:
            about.setdefault(plain(remark), []).append(name)
    return [f"{remark} ({'; '.join(names)})" if len(names) < len(plans) else remark for remark, names in about.items()]


def _in_words(plan: PruningPlan) -> str:
    kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
    return f"{kept} of {total} experts retained, {span(plan.num_experts.values())} in a layer"


def _method_words(name: str) -> list[str]:
    """What a method does and where it was published, as a link where that is on arXiv."""
    method = get_method(name)
    before, found, after = plain(method.source).partition("arXiv ")
    paper, comma, rest = after.partition(",")
    if not found or not paper.replace(".", "").isdigit():
        return [f"{method.summary} ({method.source})."]
    link = element("a", f"arXiv {paper}", href=f"https://arxiv.org/abs/{paper}")
    return [f"{method.summary} ({before}", link, f"{comma}{rest})."]


# ------------------------------------------------------------------------------------------- domains


def domain_section(stats: CalibrationStats, reduced: Reduced, plans: Plans, gallery: Gallery) -> Section:
    """Which domains each expert serves, and what the plans keep of them."""
    section = Section("domains", "Which domains the experts serve")
    if not reduced.domains:
        return section
    if len(reduced.domains) == 1:
        section.add(note("All samples are of one domain. Calibration texts that name their domains show more."))
    if reduced.routed is not None:
        _routing_part(section, reduced, gallery)
        _coverage_part(section, stats, reduced, plans, gallery)
    if reduced.error is not None:
        _error_part(section, reduced, gallery)
    else:
        section.add(
            note(
                "The error of single experts is not among these statistics; calibrate with ",
                _code("--method all"),
                " to gather it.",
            )
        )
    return section


def _code(text: str) -> Html:
    return element("code", text)


def _pages(
    name: str, what: str, make: Callable[..., Figure], reduced: Reduced, gallery: Gallery, *caption: str
) -> list[Html]:
    """One figure for every dozen domains."""
    found = []
    for n, positions in enumerate(maps.domain_pages(reduced), 1):
        shown = ", ".join(reduced.domains[p] for p in positions)
        alt = f"{what}, a map of layers and experts for each of the domains {shown}. The table below has the numbers."
        found.append(figure(gallery.draw(f"{name}-{n}", alt, make, reduced, positions), *caption))
    return found


def _routing_part(section: Section, reduced: Reduced, gallery: Gallery) -> None:
    section.add(element("h3", "Routing"))
    caption = (
        f"Of the {reduced.top_k} experts that each token of a domain is sent to: the percentage that each expert "
        "receives, so that every row adds up to 100. Darker is more. An expert that is dark in one domain and pale in "
        "the others serves that domain; one that is pale in all is hardly used."
    )
    section.add(*_pages("routing", "Share of the routing", maps.routing, reduced, gallery, caption))
    assert reduced.routing is not None
    listed = _leaders(reduced, -reduced.routing, lambda v: f"{-v:.0%}")
    title = f"The {_NAMED} most used experts of each domain, with their shares of the domain's routing"
    section.add(
        details("The same as a table", table(["layer", *reduced.domains], listed, caption=title, words=_all(reduced)))
    )


def _error_part(section: Section, reduced: Reduced, gallery: Gallery) -> None:
    section.add(element("h3", "Error of single experts"))
    caption = (
        "How far the output of a layer is from what it was when one expert does all the work: the squared difference "
        "over the tokens of the domain, divided by the squared output. 0: the expert alone gives the same output. 1: "
        "no better than no output. Pale experts can stand in for the others on that domain."
    )
    section.add(*_pages("single-error", "Error of each expert alone", maps.single_error, reduced, gallery, caption))
    assert reduced.error is not None
    listed = _leaders(reduced, reduced.error, lambda v: number(v, 2))
    title = f"The {_NAMED} experts with the least error of each domain, and that error"
    section.add(
        details("The same as a table", table(["layer", *reduced.domains], listed, caption=title, words=_all(reduced)))
    )


def _all(reduced: Reduced) -> range:
    return range(len(reduced.domains) + 1)


def _leaders(reduced: Reduced, keys: np.ndarray, words: Callable[[float], str]) -> list[list[str]]:
    """For each layer and domain the experts with the lowest keys, and these in words."""
    rows = []
    for row, layer in enumerate(reduced.layers):
        cells = []
        for table_ in keys:
            line = table_[row, : reduced.num_experts[row]]
            order = np.argsort(line, kind="stable")[:_NAMED]
            cells.append(", ".join(f"{e} ({words(float(line[e]))})" for e in order))
        rows.append([str(layer), *cells])
    return rows


def _coverage_part(
    section: Section, stats: CalibrationStats, reduced: Reduced, plans: Plans, gallery: Gallery
) -> None:
    """How much of each domain's routing the plans keep."""
    tables = {name: coverage(plan, reduced) for name, plan in plans.items() if mismatch(plan, stats) is None}
    kept = {name: t for name, t in tables.items() if t is not None}
    if not kept:
        return
    section.add(element("h3", "What the plans keep of it"))
    for n, names in enumerate(grids.coverage_pages(list(kept), reduced), 1):
        means = "; ".join(f"{name}: {kept[name].mean():.0%} on average" for name in names)
        alt = f"Share of each domain's routing that went to retained experts, by layer. {means}."
        picture = gallery.draw(f"coverage-{n}", alt, grids.coverage, names, [kept[name] for name in names], reduced)
        section.add(
            figure(
                picture,
                "Of the places among a token's experts, how many went in the original model to experts that the plan "
                "retains. Darker is more. Where a domain is paler than the others, it loses more of its experts than "
                "they do. Tokens of pruned experts go to others afterwards, so this is a warning, not a loss.",
            )
        )
    rows = []
    for name, values in kept.items():
        layer, domain = np.unravel_index(int(values.argmin()), values.shape)
        least = f"{values.min():.0%} (layer {reduced.layers[layer]}, {reduced.domains[domain]})"
        rows.append([name, *(f"{v:.1%}" for v in values.mean(axis=0)), least])
    head = ["plan", *reduced.domains, "least in any layer"]
    section.add(table(head, rows, caption="Share of the routing that went to retained experts, mean of the layers"))


# ------------------------------------------------------------------------------------------- scores


def score_section(stats: CalibrationStats | None, reduced: Reduced | None, plans: Plans, gallery: Gallery) -> Section:
    """How the scores are spread, and where each plan cut them; for a plan without scores those of another method."""
    section = Section("scores", "Scores of the experts")
    known = {} if reduced is None else reduced.scores
    stand_in = next(iter(known), None)
    for n, (name, plan) in enumerate(plans.items(), 1):
        values, label = score_grid(plan), plan.method
        words: list[str] = ["The scores that this plan was made by."]
        if values is None:
            if stand_in is None or stats is None or mismatch(plan, stats) is not None:
                continue
            values, label = known[stand_in], stand_in
            words = [
                _code(plan.method),
                " chooses sets of experts and gives no scores, so its choice is shown on those",
            ]
            words += [
                " of ",
                _code(stand_in),
                ". A retained expert far down is one that this score would have pruned.",
            ]
        args = values, retained_grid(plan), sorted(plan.retained), label
        picture = gallery.draw(f"scores-{n}", _score_alt(name, values), curves.scores, *args)
        section.add(element("h3", name), figure(picture, *words))
    if not plans and reduced is not None:
        for name, values in known.items():
            picture = gallery.draw(
                f"scores-{name}", _score_alt(name, values), curves.scores, values, None, reduced.layers, name
            )
            section.add(element("h3", name), figure(picture, *_method_words(name)))
    if section.blocks:
        section.blocks.insert(0, _SCORES)
    return section


_SCORES = paragraph(
    "One mark for each expert; higher is more worth keeping, and 1 is the mean of the layer. Where all marks of a "
    "layer lie close together, no expert stands out; a long tail below is experts that hardly matter. Where the scale "
    "is logarithmic, scores of 0 stand on its lower edge."
)


def _score_alt(name: str, values: np.ndarray) -> str:
    times = relative(values)
    low, high = number(float(np.nanmin(times)), 2), number(float(np.nanmax(times)), 2)
    return f"{name}: scores of the experts by layer, from {low} to {high} times the mean of the layer."
