# SPDX-License-Identifier: Apache-2.0
"""Sections about measurements: what was lost, how large the models are, and how far the model can be pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from . import curves, grids
from .canvas import Gallery
from .data import Plans
from .measured import ALL, Evaluation, Judged, LayerCurves, Sensitivity
from .page import Html, Section, details, element, figure, paragraph, table
from .words import NOTHING, number, span


def _domain(name: str) -> str:
    return "all domains" if name == ALL else name


# ------------------------------------------------------------------------------------------- evaluation


def evaluation_section(evaluation: Evaluation | None, gallery: Gallery) -> Section:
    """Perplexity by domain before and after, tasks, and speed."""
    section = Section("quality", "What was lost")
    if evaluation is None:
        return section
    if evaluation.domains:
        _perplexity_part(section, evaluation, gallery)
    if tasks := _tasks(evaluation):
        section.add(element("h3", "Tasks"), tasks)
    return section


def _perplexity_part(section: Section, evaluation: Evaluation, gallery: Gallery) -> None:
    alt = "Perplexity by domain. " + "; ".join(
        f"{model.label}: " + ", ".join(f"{_domain(d)} {number(f['perplexity'])}" for d, f in model.domains.items())
        for model in evaluation.models
    )
    caption = ["Perplexity of held-out text by domain, lower is better."]
    figures = [f for model in evaluation.others for f in model.domains.values()]
    if any("lost" in f for f in figures):
        caption.append(
            " Lines lead from the reference to the other models. On the right is the same difference as a logarithm: "
            "0.1 nats per token is a perplexity higher by a tenth."
        )
    if any("lost_interval" in f for f in figures):
        caption.append(" Bars are 95% intervals, from resamples of the texts that are the same for both models.")
    for n, domains in enumerate(curves.perplexity_pages(evaluation), 1):
        picture = gallery.draw(f"perplexity-{n}", alt, curves.perplexities, evaluation, domains)
        section.add(figure(picture, *caption))
    for model in evaluation.others or evaluation.models:
        if model.domains:
            section.add(_domain_table(model, evaluation.domains, evaluation.reference))


def _domain_table(model: Judged, domains: Iterable[str], reference: Judged | None) -> Html:
    columns: list[tuple[str, Any]] = [
        ("samples", lambda f: _count(f.get("samples"))),
        ("tokens", lambda f: _count(f.get("tokens"))),
        ("perplexity", lambda f: number(f["perplexity"], 4)),
    ]
    keys = {key for figures in model.domains.values() for key in figures}
    if "reference_perplexity" in keys:
        columns.append(("before", lambda f: _maybe(f.get("reference_perplexity"), 4)))
    if "lost" in keys:
        columns.append(("lost, nats per token", _lost))
    if "kl_divergence" in keys:
        columns.append(("KL divergence, nats", lambda f: _maybe(f.get("kl_divergence"))))
    if "top1_agreement" in keys:
        columns.append(
            ("same next token", lambda f: NOTHING if f.get("top1_agreement") is None else f"{f['top1_agreement']:.1%}")
        )
    rows = [[_domain(d), *(of(model.domains[d]) for _, of in columns)] for d in domains if d in model.domains]
    against = f", against {reference.label}" if reference is not None and model is not reference else ""
    return table(["domain", *(title for title, _ in columns)], rows, caption=f"{model.label}{against}")


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _maybe(value: float | None, digits: int = 3) -> str:
    return NOTHING if value is None else number(value, digits)


def _lost(figures: Mapping[str, Any]) -> str:
    if "lost" not in figures:
        return NOTHING
    if "lost_interval" not in figures:
        return f"{figures['lost']:.3f}"
    low, high = figures["lost_interval"]
    return f"{figures['lost']:.3f} ({low:.3f} to {high:.3f})"


def _tasks(evaluation: Evaluation) -> Html | None:
    """One table of all tasks and metrics, models across."""
    pairs = dict.fromkeys(
        (task, metric)
        for model in evaluation.models
        for task, metrics in model.tasks.items()
        for metric in metrics
        if not metric.endswith("_stderr")
    )
    if not pairs:
        return None
    rows = []
    for task, metric in pairs:
        cells = []
        for model in evaluation.models:
            found = model.tasks.get(task, {})
            error = found.get(f"{metric}_stderr")
            value = found.get(metric)
            cells.append(NOTHING if value is None else f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}"))
        rows.append([task, metric, *cells])
    head = ["task", "metric", *(model.label for model in evaluation.models)]
    return table(head, rows, caption="Results of tasks, ± one standard error", words=(0, 1))


# ------------------------------------------------------------------------------------------- size


def size_section(plans: Plans, evaluation: Evaluation | None, gallery: Gallery) -> Section:
    """Experts, parameters and bytes before and after."""
    section = Section("size", "Memory and parameters")
    if plans:
        rows = []
        for name, plan in plans.items():
            kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
            removed = {n: plan.original_num_experts[n] - kept_ for n, kept_ in plan.num_experts.items()}
            rows.append(
                [name, f"{total:,}", f"{kept:,}", f"{total - kept:,}", f"{plan.sparsity:.1%}", span(removed.values())]
            )
        head = ["plan", "experts before", "after", "removed", "share removed", "removed in a layer"]
        section.add(table(head, rows, caption="Routed experts, of all layers together"))
    if evaluation is None:
        if plans:
            section.add(paragraph("Parameters and bytes come with an evaluation; none was given."))
        return section
    if curves.known_sizes(evaluation):
        rows = [[model.label, *_size_cells(model, evaluation.reference)] for model in evaluation.models]
        columns = ["model", "parameters", "tensors", "peak memory", "prompt", "generation"]
        alt = "Bars of size and speed. " + "; ".join(
            f"{row[0]}: {', '.join(f'{title} {cell}' for title, cell in zip(columns[1:], row[1:], strict=True))}"
            for row in rows
        )
        picture = gallery.draw("sizes", alt, curves.sizes, evaluation)
        section.add(
            figure(
                picture,
                "Less is better for size and memory, more for speed. The reference is hatched. A pruned model runs as "
                "many experts for each token as before: it saves memory, and time only where memory was the limit.",
            ),
            table(columns, rows, caption="Size and speed of the evaluated models"),
        )
    return section


def _size_cells(model: Judged, reference: Judged | None) -> list[str]:
    def share(value: float | None, of: float | None) -> str:
        return "" if value is None or not of or model is reference else f" ({value / of - 1:+.0%})"

    before = reference.parameters if reference is not None else None
    size_before = reference.bytes if reference is not None else None
    run = model.generation
    memory, speed = run.get("peak_memory_bytes"), run.get("tokens_per_second")
    prompt = run.get("prompt_seconds")
    return [
        NOTHING if model.parameters is None else f"{model.parameters:,}{share(model.parameters, before)}",
        NOTHING if model.bytes is None else f"{_bytes(model.bytes)}{share(model.bytes, size_before)}",
        NOTHING if memory is None else _bytes(memory),
        NOTHING if prompt is None else f"{number(prompt)} s" + _of(run.get("prompt_tokens")),
        NOTHING if speed is None else f"{number(speed)} tokens/s",
    ]


def _of(tokens: float | None) -> str:
    return "" if tokens is None else f" for {tokens:.0f} tokens"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


# ------------------------------------------------------------------------------------------- sensitivity


def sensitivity_section(sensitivity: Sensitivity | None, gallery: Gallery) -> Section:
    """How much it costs to prune each layer, and the whole model."""
    section = Section("sensitivity", "How far the model can be pruned")
    if sensitivity is None:
        return section
    section.add(
        paragraph(
            "The cost is the divergence KL(original || pruned) of the predicted next token, in nats per token, "
            "measured on the model itself. 0 is no change; lower is better."
        )
    )
    if sensitivity.curves:
        _model_part(section, sensitivity, gallery)
    if sensitivity.layers:
        _layer_part(section, sensitivity, gallery)
    return section


def _model_part(section: Section, sensitivity: Sensitivity, gallery: Gallery) -> None:
    section.add(element("h3", "The whole model"))
    found = sensitivity.curves
    alt = "Divergence against the share of experts removed. " + "; ".join(
        f"{c.label}: " + ", ".join(f"{s:.0%} {number(v, 2)}" for s, v in zip(c.sparsity, c.kl[ALL], strict=True))
        for c in found
        if ALL in c.kl
    )
    caption = [
        "All domains together. Read from the left how far a line stays low: where it turns up, the model runs out of "
        "experts it can spare. Colours and marks are methods; the line is solid where every layer keeps the same "
        "number of experts, dashed and dotted where layers keep different numbers."
    ]
    if any((cost <= 0).any() for c in found for cost in c.kl.values()):
        caption.append(" Costs of 0 and, by rounding, below have no place on a logarithmic scale.")
    section.add(figure(gallery.draw("model-costs", alt, curves.model_costs, found, [ALL]), *caption))
    domains = [d for d in sensitivity.domains if d != ALL and any(d in c.kl for c in found)]
    if len(domains) > 1:
        for n, start in enumerate(range(0, len(domains), 12), 1):
            some = domains[start : start + 12]
            alt = f"Divergence against the share of experts removed, for each of the domains {', '.join(some)}."
            picture = gallery.draw(f"model-costs-by-domain-{n}", alt, curves.model_costs, found, some)
            section.add(
                figure(picture, "The same by domain, all on one scale: the domains on top of it pay the most.")
            )
    rows = []
    for curve in found:
        for i, sparsity in enumerate(curve.sparsity):
            costs = [number(float(curve.kl[d][i])) if d in curve.kl else NOTHING for d in [ALL, *domains]]
            rows.append([f"{sparsity:.0%}", curve.method, curve.allocation, *costs])
    head = ["removed", "method", "allocation", "all domains", *domains]
    listed = table(head, rows, caption="KL divergence, nats per token", words=(0, 1, 2))
    section.add(details("The same as a table", listed))


def _layer_part(section: Section, sensitivity: Sensitivity, gallery: Gallery) -> None:
    measured = [found for found in sensitivity.layers if np.isfinite(found.kl.get(ALL, np.nan)).any()]
    if not measured:
        return
    section.add(element("h3", "One layer at a time"))
    for n, some in enumerate(grids.cost_pages(measured), 1):
        dearest = f"{'; '.join(map(_dearest, some))}."
        alt = f"Maps of the cost by layer and retained experts. {dearest}"
        section.add(
            figure(
                gallery.draw(f"layer-costs-{n}", alt, grids.layer_costs, some, ALL),
                "What it costs to prune this layer alone, all others left whole, for each number of experts that it "
                "retains. Darker costs more; the scale is logarithmic and ends at a ten-thousandth of the largest "
                "cost. Pale layers can be pruned harder than dark ones. Blank was not measured.",
            ),
            paragraph(dearest),
        )
    for found in measured:
        names = [domain for domain in sensitivity.domains if domain in found.kl]
        rows = []
        for (i, j), cost in np.ndenumerate(found.kl[ALL]):
            if np.isfinite(cost):
                removed = f"{1 - found.counts[j] / found.original[i]:.0%}"
                costs = [number(float(found.kl[domain][i, j])) for domain in names]
                rows.append([found.layers[i], found.counts[j], removed, *costs])
        head = ["layer", "retained", "removed", *map(_domain, names)]
        caption = f"KL divergence when one layer is pruned by {found.method}, nats per token"
        section.add(details(f"The same by domain, as a table: {found.method}", table(head, rows, caption=caption)))


def _dearest(found: LayerCurves) -> str:
    """The layer that costs the most where the fewest experts are retained, in words."""
    costs = found.kl[ALL]
    column = int(np.isfinite(costs).any(axis=0).nonzero()[0][-1])
    row = int(np.nanargmax(costs[:, column]))
    cost = number(float(costs[row, column]), 2)
    return f"{found.method}: with {found.counts[column]} experts layer {found.layers[row]} costs the most, {cost} nats"
