# SPDX-License-Identifier: Apache-2.0
"""What the page begins and ends with: facts at a glance, what to know of them, and what everything was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...evaluation.comparison import Comparison, ModelResult
from ...planning.sensitivity import ALL, Sensitivity
from ...recovery.verdict import recovery_of, sentence_of, table_of
from ...statistics.passages import without_passages
from ...statistics.stats import CalibrationStats
from ...storage.values import Values
from .sections import Content, Plans, in_words
from .tables import Table
from .text import described, extent, listed, model_name, nats, perplexity, spans


def order(comparison: Comparison | None, plans: Plans) -> Comparison | None:
    """Models in the order of every figure and table: the reference, then those called as plans are, then the rest."""
    if comparison is None:
        return None
    names = dict.fromkeys([comparison.reference, *plans, *comparison.models])
    models = {name: comparison.models[name] for name in names if name is not None and name in comparison.models}
    return replace(comparison, models=models)


def verdict(comparison: Comparison | None) -> list[str]:
    """What a comparison says of itself in a sentence, if it does."""
    said: Any = getattr(comparison, "verdict", None)
    said = said() if callable(said) else said
    if isinstance(said, Mapping):
        said = [f"{name}: {words}" for name, words in said.items()]
    return [str(words) for words in ([said] if isinstance(said, str) else said or []) if words]


def remarks(stats: CalibrationStats | None, plans: Plans) -> list[str]:
    """What was noted when statistics and plans were made, that of several plans once."""
    by_note: dict[str, list[str]] = {}
    for name, plan in plans.items():
        for note in plan.notes:
            by_note.setdefault(note, []).append(name)
        if plan.heads:
            kept = ", ".join(
                f"layer {head}: {len(plan.retained[head])} of {plan.original_num_experts[head]} experts"
                for head in plan.heads
            )
            by_note.setdefault(f"heads for further tokens are pruned as well ({kept})", []).append(name)
    found = [f"{', '.join(names)}: {note}" for note, names in by_note.items()]
    noted = None if stats is None else stats.provenance.get("notes")
    return [*(f"calibration: {note}" for note in (noted if isinstance(noted, list) else ())), *found]


def overview(
    stats: CalibrationStats | None, plans: Plans, measured: Sensitivity | None, comparison: Comparison | None
) -> Table | None:
    """The facts at the beginning of the page."""
    rows: list[list[str]] = []
    facts: Values = {} if measured is None else measured.model
    if stats is not None:
        facts = stats.model
        rows.append(["shape", _shape(stats.num_experts, facts["top_k"], facts.get("dense_layers"))])
    elif plans:
        first = next(iter(plans.values()))
        facts = first.made_for
        rows.append(["shape", _shape(first.original_num_experts, first.top_k, facts.get("dense_layers"))])
    if name := model_name(facts):
        rows.insert(0, ["model", name])
    if stats is not None and stats.samples:
        rows.append(["calibration", f"{len(stats.samples):,} samples, {_tokens(stats.domains)}"])
    if measured is not None and measured.tokens_by_domain:
        rows.append(["sensitivity", _tokens(measured.tokens_by_domain)])
    rows += [["plan", f"{name}: {in_words(plan)}"] for name, plan in plans.items()]
    rows += [["recovery", f"{name}: {words}"] for name, words in recoveries(plans).items()]
    if comparison is not None:
        rows += [["result", words] for words in (_result(*item) for item in comparison.compared.items()) if words]
    return Table("At a glance", [], rows) if rows else None


def recoveries(plans: Plans) -> dict[str, str]:
    """What recovery gave back, in a sentence for each plan that had one."""
    found = {name: recovery_of(plan) for name, plan in plans.items()}
    return {name: sentence_of(recovery) for name, recovery in found.items() if recovery is not None}


def recovered(plans: Plans) -> list[Table]:
    """What the cut cost each domain and what is left of it, for each plan that was recovered."""
    found = ((name, recovery_of(plan)) for name, plan in plans.items())
    tables = (
        Table.of(f"{name}: KL from the original on text held back, nats per token", table_of(recovery))
        for name, recovery in found
        if recovery is not None
    )
    return [table for table in tables if table is not None]


def _shape(num_experts: Mapping[int, int], top_k: int, dense: Any) -> str:
    layer = "MoE layer" if len(num_experts) == 1 else "MoE layers"
    words = f"{len(num_experts)} {layer} of {extent(num_experts.values())} experts, of which each token uses {top_k}"
    layers = sorted(layer for layer in dense if isinstance(layer, int)) if isinstance(dense, list) else []
    return f"{words}; layers without experts: {spans(layers)}" if layers else words


def _tokens(domains: Mapping[str, int]) -> str:
    shown = ", ".join(f"{domain} {n:,}" for domain, n in domains.items())
    return f"{sum(domains.values()):,} tokens ({shown if len(domains) <= 24 else f'{len(domains):,} domains'})"


def _result(name: str, model: ModelResult) -> str | None:
    """What a model lost on all domains, and on which the most."""
    words = []
    results = model.evaluation.domains
    if ALL in results and results[ALL].reference_perplexity is not None:
        before = perplexity(results[ALL].reference_perplexity)
        words.append(f"perplexity {perplexity(results[ALL].perplexity)}, before {before}")
    lost = {domain: r.lost for domain, r in results.items() if domain != ALL and r.lost is not None}
    if lost:
        domain = max(lost, key=lambda d: (lost[d], d))
        words.append(f"the most lost on {domain}, {nats(lost[domain])} nats per token")
    return f"{name}: {'; '.join(words)}" if words else None


def origin(stats: CalibrationStats | None, plans: Plans) -> Content | None:
    """What everything was made from."""
    if stats is None and not plans:
        return None
    table = None
    if stats is not None:
        rows = [
            ["model type", described(stats.model.get("model_type"))],
            ["router weights, sha256", described(stats.model.get("fingerprint"))],
            ["revision", described(stats.model.get("revision"))],
            ["samples, sha256", stats.fingerprint],
            ["gathered", listed(sorted(map(str, stats.needs)))],
            ["tokens kept for statistics per token", f"{len(stats.token_sample):,}"],
            *(
                [key.replace("_", " "), described(value)]
                for key, value in sorted(without_passages(stats.provenance).items())
                if key != "notes"
            ),
        ]
        table = Table("Statistics", [], rows)
    recipes = []
    for name, plan in plans.items():
        rows = [["made", described(plan.provenance.get("made"))]]
        findings = plan.provenance.get("findings") or {}
        rows += [[str(key).replace("_", " "), described(value)] for key, value in findings.items()]
        recipe = json.dumps(plan.config, indent=2, ensure_ascii=False, default=str)
        recipes.append({"name": name, "table": Table(f"Findings: {name}", [], rows), "recipe": recipe})
    return {"table": table, "recipes": recipes}
