# SPDX-License-Identifier: Apache-2.0
"""What the page begins and ends with: the facts at a glance, and what everything was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...plan import PruningPlan
from ...statistics.stats import CalibrationStats
from .data import Plans
from .measured import ALL, Evaluation, Judged, Sensitivity
from .page import Html, Section, details, element, join, table
from .words import NOTHING, model_name, number, plain, span, spans


def overview(
    stats: CalibrationStats | None, plans: Plans, sensitivity: Sensitivity | None, evaluation: Evaluation | None
) -> list[Html]:
    """The facts at the beginning of the page."""
    rows: list[list[str]] = []
    first = next(iter(plans.values()), None)
    facts: Mapping[str, Any] = {}
    if stats is not None:
        facts = stats.model
        rows.append(["shape", _shape(stats.num_experts, facts["top_k"], facts.get("dense_layers"))])
    elif first is not None:
        facts = first.made_for
        rows.append(["shape", _shape(first.original_num_experts, first.top_k, facts.get("dense_layers"))])
    elif sensitivity is not None:
        facts = sensitivity.model
    if name := model_name(facts):
        rows.insert(0, ["model", name])
    if stats is not None and stats.samples:
        rows.append(["calibration", f"{len(stats.samples):,} samples, {_tokens(stats.domains)}"])
    if sensitivity is not None and sensitivity.tokens:
        rows.append(["sensitivity", _tokens(sensitivity.tokens)])
    for name, plan in plans.items():
        kept, every = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
        counts = span(plan.num_experts.values())
        rows.append(["plan", f"{name}: {kept:,} of {every:,} experts retained, {counts} in a layer"])
    if evaluation is not None:
        rows += [["result", words] for words in map(_verdict, evaluation.others) if words]
    return [table([], rows, caption="At a glance")] if rows else []


def _shape(num_experts: Mapping[int, int], top_k: int, dense: Any) -> str:
    words = f"{len(num_experts)} MoE layers of {span(num_experts.values())} experts, of which each token uses {top_k}"
    layers = [layer for layer in dense if isinstance(layer, int)] if isinstance(dense, list) else []
    return f"{words}; layers without experts: {spans(sorted(layers))}" if layers else words


def _tokens(domains: Mapping[str, int]) -> str:
    return f"{sum(domains.values()):,} tokens ({', '.join(f'{domain} {n:,}' for domain, n in domains.items())})"


def _verdict(model: Judged) -> str | None:
    """What a model lost on all domains, and on which the most."""
    words = []
    whole = model.domains.get(ALL, {})
    if "reference_perplexity" in whole:
        words.append(f"perplexity {number(whole['perplexity'])}, before {number(whole['reference_perplexity'])}")
    lost = {domain: figures["lost"] for domain, figures in model.domains.items() if "lost" in figures}
    if domain := max(lost.keys() - {ALL}, key=lambda name: (lost[name], name), default=None):
        words.append(f"the most lost on {domain}, {lost[domain]:.3f} nats per token")
    return f"{model.label}: {'; '.join(words)}" if words else None


def origin_section(stats: CalibrationStats | None, plans: Plans) -> Section:
    """What everything was made from."""
    section = Section("origin", "Where this comes from")
    if stats is not None:
        rows: list[list[Any]] = [
            ["model type", stats.model.get("model_type")],
            ["router weights, sha256", element("code", stats.model.get("fingerprint"))],
            ["revision", stats.model.get("revision") or NOTHING],
            ["samples, sha256", element("code", stats.fingerprint)],
            ["gathered", ", ".join(sorted(map(str, stats.needs))) or "nothing"],
            ["tokens kept for statistics per token", f"{len(stats.token_sample):,}"],
            *([key.replace("_", " "), _value(value)] for key, value in sorted(stats.provenance.items())),
        ]
        section.add(table([], rows, caption="Statistics"))
    for name, plan in plans.items():
        section.add(_plan(name, plan))
    return section


def _plan(name: str, plan: PruningPlan) -> Html:
    """When a plan was made, what was found on the way, and its recipe."""
    found = plan.provenance.get("findings") or {}
    rows = [["made", _value(plan.provenance.get("made"))]]
    rows += [[str(key).replace("_", " "), _value(value)] for key, value in found.items()]
    recipe = json.dumps(plan.config, indent=2, ensure_ascii=False, default=str)
    lines = [Html("&#160;" * (len(line) - len(line.lstrip()))) + join([line.strip()]) for line in recipe.splitlines()]
    return details(
        f"How {name} was made",
        table([], rows, caption=f"Findings: {name}"),
        element("pre", element("code", Html("\n".join(lines)))),
    )


def _value(value: Any) -> str:
    """A value out of a file, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items()) or NOTHING
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value)) or NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOTHING if value is None else plain(value)
