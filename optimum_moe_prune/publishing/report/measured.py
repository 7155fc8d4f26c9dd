# SPDX-License-Identifier: Apache-2.0
"""The sections about measurements: what was lost, how large the models are, how far the model can be pruned.

And what the page begins and ends with: the facts at a glance, and what everything was made from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ...evaluation.comparison import Comparison, ModelResult
from ...planning.sensitivity import ALL, MethodSensitivity, Sensitivity
from ...statistics.stats import CalibrationStats
from ...storage.values import Json, Values
from . import charts, maps
from .drawing import Gallery
from .sections import Content, Plans, Table, in_words
from .text import MISSING, described, extent, listed, model_name, number, spans

_DOMAINS = 12  # of one figure


def _domain(name: str) -> str:
    return "all domains" if name == ALL else name


def quality(comparison: Comparison | None, gallery: Gallery) -> Content | None:
    """Perplexity by domain before and after, and tasks."""
    if comparison is None:
        return None
    tasks = comparison.parts()[2]
    models = charts.judged(comparison)
    words = "; ".join(
        f"{name}: {', '.join(f'{_domain(d)} {number(r.perplexity)}' for d, r in model.evaluation.domains.items())}"
        for name, model in models.items()
    )
    domains = charts.domains_of(comparison) if models else []
    figures = [
        gallery.draw(f"perplexity-{n}", f"Perplexity by domain. {words}", charts.perplexities, comparison, some)
        for n, some in enumerate(_parts(domains), 1)
    ]
    if not figures and len(tasks) < 2:
        return None
    against = f", against {comparison.reference}" if comparison.compared and comparison.reference else ""
    shown = [result for model in models.values() for result in model.evaluation.domains.values()]
    return {
        "figures": figures,
        "tables": [Table.of(f"{name}{against}", model.evaluation.table()) for name, model in models.items()],
        "tasks": Table.of("Results of tasks, ± one standard error", tasks, words=(0, 1)),
        "compared": bool(comparison.compared) and any(result.lost is not None for result in shown),
        "intervals": any(result.lost_interval is not None for result in shown),
    }


def _parts(domains: list[str]) -> list[list[str]]:
    return [domains[start : start + _DOMAINS] for start in range(0, len(domains), _DOMAINS)]


def sizes(comparison: Comparison | None) -> Content | None:
    """Parameters, bytes, memory and speed of the evaluated models."""
    rows = [] if comparison is None else comparison.parts()[1]
    if comparison is None or len(rows) < 2:
        return None
    before = None if comparison.reference is None else comparison.models[comparison.reference].parameters
    counts = [comparison.models[row[0]].parameters for row in rows[1:]]
    left = [f"{count / before:.0%}" if count and before else MISSING for count in counts]
    rows = [[*row, share] for row, share in zip(rows, ["parameters left", *left], strict=True)]
    prompts = {model.generation.prompt_tokens for model in comparison.models.values() if model.generation}
    table = Table.of("Size and speed of the evaluated models", rows)
    return {"table": table, "prompts": ", ".join(map(str, sorted(prompts)))}


def sensitivity(measured: Sensitivity | None, gallery: Gallery) -> Content | None:
    """What it costs to prune each layer, and the whole model."""
    if measured is None:
        return None
    points = [(method, point) for method, found in measured.methods.items() for point in found.model]
    layered = {name: m for name, m in measured.methods.items() if any(layer.kl for layer in m.layers.values())}
    costs = [kl for found in layered.values() for layer in found.layers.values() for kl in layer.kl.values()]
    domains = list(dict.fromkeys(d for kl in [*(p.kl for _, p in points), *costs] for d in kl if d != ALL))
    content: Json = {"whole": None, "by_domain": [], "layers": [], "layer_tables": {}}
    if points:
        words = "; ".join(f"{m}, {p.allocation}, {p.sparsity:.0%} {number(p.kl[ALL], 2)}" for m, p in points)
        alt = "Divergence against the share of experts removed"
        content["whole"] = gallery.draw("model-costs", f"{alt}. {words}.", charts.model_costs, measured, [ALL])
        content["by_domain"] = [
            gallery.draw(
                f"model-costs-by-domain-{n}", f"{alt}, for each of {words}.", charts.model_costs, measured, some
            )
            for n, some in enumerate(_parts(domains) if len(domains) > 1 else [], 1)
            for words in [f"the domains {', '.join(some)}"]
        ]
        rows = [
            [f"{p.sparsity:.0%}", m, p.allocation, *(number(p.kl.get(d)) for d in [ALL, *domains])] for m, p in points
        ]
        head = ["removed", "method", "allocation", "all domains", *domains]
        content["table"] = Table("KL divergence, nats per token", head, rows, words=(0, 1, 2))
        content["not_positive"] = any(cost <= 0 for _, point in points for cost in point.kl.values())
    shown = [maps.cost_map(name, found) for name, found in layered.items()]
    if shown:
        content["layers"] = maps.draw_all(
            gallery, "layer-costs", "Cost by layer and retained experts", shown, maps.costs
        )
        content["dearest"] = [_dearest(name, found) for name, found in layered.items()]
    for name, found in layered.items():
        rows = []
        for n, layer in sorted(found.layers.items()):
            for count, kl in sorted(layer.kl.items(), reverse=True):
                removed = f"{1 - count / layer.original_num_experts:.0%}"
                rows.append([str(n), str(count), removed, *(number(kl.get(d)) for d in [ALL, *domains])])
        head = ["layer", "retained", "removed", "all domains", *domains]
        caption = f"KL divergence when one layer is pruned by {name}, nats per token"
        content["layer_tables"][name] = Table(caption, head, rows)
    return content


def _dearest(name: str, measured: MethodSensitivity) -> str:
    """The layer that costs the most where the fewest experts are retained, in words."""
    fewest = min(count for layer in measured.layers.values() for count in layer.kl)
    costs = {n: layer.kl.get(fewest, {}).get(ALL, -math.inf) for n, layer in sorted(measured.layers.items())}
    layer = max(costs, key=lambda n: costs[n])
    return f"{name}: with {fewest} experts layer {layer} costs the most, {number(costs[layer], 2)} nats"


# ------------------------------------------------------------------------------------------- facts


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
    if comparison is not None:
        rows += [["result", words] for words in (_verdict(*item) for item in comparison.compared.items()) if words]
    return Table("At a glance", [], rows) if rows else None


def _shape(num_experts: Mapping[int, int], top_k: int, dense: Any) -> str:
    words = (
        f"{len(num_experts)} MoE layers of {extent(num_experts.values())} experts, of which each token uses {top_k}"
    )
    layers = sorted(layer for layer in dense if isinstance(layer, int)) if isinstance(dense, list) else []
    return f"{words}; layers without experts: {spans(layers)}" if layers else words


def _tokens(domains: Mapping[str, int]) -> str:
    return f"{sum(domains.values()):,} tokens ({', '.join(f'{domain} {n:,}' for domain, n in domains.items())})"


def _verdict(name: str, model: ModelResult) -> str | None:
    """What a model lost on all domains, and on which the most."""
    words = []
    results = model.evaluation.domains
    if ALL in results and results[ALL].reference_perplexity is not None:
        before = number(results[ALL].reference_perplexity)
        words.append(f"perplexity {number(results[ALL].perplexity)}, before {before}")
    lost = {domain: r.lost for domain, r in results.items() if domain != ALL and r.lost is not None}
    if lost:
        domain = max(lost, key=lambda d: (lost[d], d))
        words.append(f"the most lost on {domain}, {lost[domain]:.3f} nats per token")
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
            *([key.replace("_", " "), described(value)] for key, value in sorted(stats.provenance.items())),
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
