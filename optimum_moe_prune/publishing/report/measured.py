# SPDX-License-Identifier: Apache-2.0
"""The sections about measurements: what was lost, how large the models are, how far the model can be pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ...evaluation.comparison import Comparison, ModelResult
from ...planning.sensitivity import ALL, MethodSensitivity, Sensitivity
from ...storage.values import Json
from . import charts, maps
from .drawing import Gallery, Picture
from .sections import Content, Plans, most_of
from .sizes import Family, Size, where
from .tables import Table, lowest
from .text import MISSING, domain_name, extent, listed, nats, nbytes, number, perplexity

_DOMAINS = 12  # of one figure
_MOST_DOMAINS = 3 * _DOMAINS  # that are all shown; of more, those that cost the most


def quality(comparison: Comparison | None, gallery: Gallery) -> Content | None:
    """Perplexity by domain before and after, and tasks."""
    if comparison is None:
        return None
    models, tasks = charts.judged(comparison), comparison.parts()[2]
    every = charts.domains_of(comparison) if models else []
    domains = _shown(every, {d: _most_lost(models, d) for d in every})
    figures = [
        gallery.draw(
            f"perplexity-{n}",
            _quality_alt(comparison, some),
            charts.perplexities,
            comparison,
            some,
            tables=charts.perplexities_tables(comparison, some),
        )
        for n, some in enumerate(_parts(domains), 1)
    ]
    if not figures and len(tasks) < 2:
        return None
    shown = [result for model in models.values() for result in model.evaluation.domains.values()]
    rest = charts.perplexities_tables(comparison, every) if len(domains) < len(every) else []
    return {
        "figures": figures,
        "some": (len(domains), len(every)) if rest else None,
        "rest": rest,
        "tables": _further(comparison, every),
        "tasks": Table.of("Results of tasks, ± one standard error", _filled(tasks), words=(0, 1)),
        "compared": bool(charts.before(comparison)),
        "reference": comparison.reference,
        "intervals": any(result.lost_interval is not None for result in shown),
        "infinite": any(math.isinf(result.perplexity) for result in shown),
    }


def _quality_alt(comparison: Comparison, domains: Sequence[str]) -> str:
    words = []
    for name, model in charts.judged(comparison).items():
        found = model.evaluation.domains
        each = ", ".join(f"{domain_name(d)} {perplexity(found[d].perplexity)}" for d in domains if d in found)
        words.append(f"{name}: {each}")
    return f"Perplexity by domain. {'; '.join(words)}"


def _most_lost(models: Mapping[str, ModelResult], domain: str) -> float:
    """What the worst of the models lost on a domain, or its perplexity where nothing is compared."""
    results = [m.evaluation.domains[domain] for m in models.values() if domain in m.evaluation.domains]
    return max((r.perplexity if r.lost is None else r.lost for r in results), default=-math.inf)


def _shown(domains: Sequence[str], costs: Mapping[str, float]) -> list[str]:
    """The domains that figures show, all of them or those that cost the most, in the order given."""
    if len(domains) <= _MOST_DOMAINS:
        return list(domains)
    chosen = most_of({d: costs[d] for d in domains if d != ALL}, 2 * _DOMAINS)
    return [d for d in domains if d in chosen or d == ALL]


def _further(comparison: Comparison, domains: Sequence[str]) -> list[Table]:
    """What was measured by domain and no figure shows: models across, in the order of the legend."""
    models = charts.judged(comparison)
    found = [[m.evaluation.domains.get(d) for m in models.values()] for d in domains]
    size = [next((r for r in row if r is not None), None) for row in found]
    counts = [(f"{r.samples:,}", f"{r.tokens:,}") if r else (MISSING, MISSING) for r in size]
    kinds: list[tuple[str, list[list[float | None]], Callable[[float | None], str], int]] = [
        (
            "KL divergence from the reference, nats per token",
            [[None if r is None else r.kl_divergence for r in row] for row in found],
            nats,
            1,
        ),
        (
            "Share of tokens with the same most likely next token",
            [[None if r is None else r.top1_agreement for r in row] for row in found],
            lambda share: MISSING if share is None else f"{share:.1%}",
            -1,
        ),
    ]
    tables = []
    for caption, values, words, worse in kinds:
        if all(value is None for row in values for value in row):
            continue
        rows = [[domain_name(d), *c, *map(words, row)] for d, c, row in zip(domains, counts, values, strict=True)]
        best = lowest([[None if v is None else worse * v for v in row] for row in values], 3)
        tables.append(Table(caption, ["domain", "samples", "tokens", *models], rows, best=best))
    if not tables and domains:
        rows = [[domain_name(d), *c] for d, c in zip(domains, counts, strict=True)]
        tables.append(Table("Held-out text", ["domain", "samples", "tokens"], rows))
    return tables


def _parts(domains: Sequence[str]) -> list[list[str]]:
    return [list(domains[start : start + _DOMAINS]) for start in range(0, len(domains), _DOMAINS)]


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows with a sign where nothing is."""
    return [[cell or MISSING for cell in row] for row in rows]


# ------------------------------------------------------------------------------------------- sizes


def sizes(comparison: Comparison | None, plans: Plans, family: Family | None) -> Content | None:
    """Experts, parameters and bytes of the plans; size, memory and speed of the evaluated models."""
    evaluated = _evaluated(comparison)
    if not plans and evaluated is None:
        return None
    known = {name: family.pruned(plan) for name, plan in plans.items()} if family else {}
    missing = [name for name in plans if known.get(name) is None]
    runs = [] if comparison is None else [model.generation for model in comparison.models.values()]
    prompts = {run.prompt_tokens for run in runs if run is not None}
    return {
        "plans": _plan_sizes(plans, family, known) if plans else None,
        "evaluated": evaluated,
        "prompts": ", ".join(map(str, sorted(prompts))),
        "missing": listed(missing) if missing else None,
        "where": where(plans[name] for name in missing),
    }


def _plan_sizes(plans: Plans, family: Family | None, known: Mapping[str, Size | None]) -> Table:
    first = {name: plan.without_heads for name, plan in plans.items()}
    shape = next(iter(first.values()))
    same = len({tuple(sorted(plan.original_num_experts.items())) for plan in first.values()}) == 1
    whole = family.whole if family is not None and same else None
    before = [f"{sum(shape.original_num_experts.values()):,}", extent(shape.original_num_experts.values()), MISSING]
    columns = [["method", "experts", "in a layer", "experts removed"], [MISSING, *before]] if same else []
    columns = columns or [["method", "experts", "in a layer", "experts removed"]]
    for plan in first.values():
        kept, total = sum(plan.num_experts.values()), sum(plan.original_num_experts.values())
        removed = f"{total - kept:,} ({plan.sparsity:.1%})"
        columns.append([plan.method, f"{kept:,}", extent(plan.num_experts.values()), removed])
    if any(known.values()):
        columns[0] += ["parameters", "parameters left", "weights", "weights left"]
        sizes = [*([whole] if same else []), *(known[name] for name in plans)]
        for column, size in zip(columns[1:], sizes, strict=True):
            column += _in_words(size, whole)
    rows = [list(row) for row in zip(*columns, strict=True)]
    if whole is not None and whole.parameters is None and any(known.values()):
        rows = [row for row in rows if not row[0].startswith("parameters")]
    return Table("What the plans leave", ["plan", *(["original"] if same else []), *plans], rows)


def _in_words(size: Size | None, whole: Size | None) -> list[str]:
    if size is None:
        return [MISSING] * 4
    parameters, share = MISSING, MISSING
    if size.parameters is not None:
        parameters = f"{size.parameters:,}"
        share = f"{size.parameters / whole.parameters:.1%}" if whole and whole.parameters else MISSING
    return [parameters, share, nbytes(size.nbytes), f"{size.nbytes / whole.nbytes:.1%}" if whole else MISSING]


def _evaluated(comparison: Comparison | None) -> Table | None:
    """Size, speed and memory of the evaluated models, which stand in the order of every legend."""
    rows = [] if comparison is None else comparison.parts()[1]
    if comparison is None or len(rows) < 2:
        return None
    before = None if comparison.reference is None else comparison.models[comparison.reference].parameters
    counts = [comparison.models[row[0]].parameters for row in rows[1:] if row[0] in comparison.models]
    lines = [list(line) for line in zip(*_filled(rows), strict=True)]
    if before and len(counts) == len(rows) - 1:
        lines.append(["parameters left", *(f"{count / before:.0%}" if count else MISSING for count in counts)])
    return Table("Size and speed of the evaluated models", ["model", *lines[0][1:]], lines[1:])


# ------------------------------------------------------------------------------------------- sensitivities


def sensitivity(measured: Sensitivity | None, gallery: Gallery) -> Content | None:
    """What it costs to prune each layer, and the whole model."""
    if measured is None:
        return None
    points = [(method, point) for method, found in measured.methods.items() for point in found.model]
    layered = {name: m for name, m in measured.methods.items() if any(layer.kl for layer in m.layers.values())}
    costs = [kl for found in layered.values() for layer in found.layers.values() for kl in layer.kl.values()]
    dearest: dict[str, float] = {}
    for kl in [*(p.kl for _, p in points), *costs]:
        for domain, cost in kl.items():
            dearest[domain] = max(cost, dearest.get(domain, -math.inf))
    every = sorted(d for d in dearest if d != ALL)
    domains = [d for d in _shown(every, dearest) if d != ALL]
    content: Json = {"whole": None, "by_domain": [], "layers": [], "layer_tables": {}}
    content["some"] = (len(domains), len(every)) if len(domains) < len(every) else None
    if points:
        words = "; ".join(f"{m}, {p.allocation}, {p.sparsity:.0%} {number(p.kl[ALL], 2)}" for m, p in points)
        alt = "Divergence against the share of experts removed"

        def draw(name: str, about: str, some: list[str]) -> Picture:
            tables = charts.model_costs_tables(measured, some)
            return gallery.draw(name, f"{alt}{about}.", charts.model_costs, measured, some, tables=tables)

        content["whole"] = draw("model-costs", f". {words}", [ALL])
        content["by_domain"] = [
            draw(f"model-costs-by-domain-{n}", f", for each of the domains {', '.join(some)}", some)
            for n, some in enumerate(_parts(domains) if len(domains) > 1 else [], 1)
        ]
        content["not_positive"] = any(cost <= 0 for _, point in points for cost in point.kl.values())
        content["infinite"] = any(math.isinf(cost) for _, point in points for cost in point.kl.values())
    shown = [maps.cost_map(name, found) for name, found in layered.items()]
    if shown:
        what = "Cost by layer and retained experts"
        content["layers"] = maps.draw_all(gallery, "layer-costs", what, shown, maps.costs, tables=_cost_tables)
        content["dearest"] = [_dearest(name, found) for name, found in layered.items()]
    for name, found in layered.items() if len(every) > 1 else ():
        rows = []
        for n, layer in sorted(found.layers.items()):
            for count, kl in sorted(layer.kl.items(), reverse=True):
                removed = f"{1 - count / layer.original_num_experts:.0%}"
                rows.append([str(n), str(count), removed, *(maps.cost(kl.get(d, math.nan)) for d in [*domains, ALL])])
        head = ["layer", "retained", "removed", *domains, "all domains"]
        caption = f"KL divergence when one layer is pruned by {name}, nats per token"
        content["layer_tables"][name] = Table(caption, head, rows)
    return content


def _cost_tables(page: Sequence[maps.Map]) -> list[Table]:
    return maps.as_tables(page, maps.cost, "experts retained", "nats per token")


def _dearest(name: str, measured: MethodSensitivity) -> str:
    """The layer that costs the most where the fewest experts are retained, in words."""
    fewest = min(count for layer in measured.layers.values() for count in layer.kl)
    costs = {n: layer.kl.get(fewest, {}).get(ALL, -math.inf) for n, layer in sorted(measured.layers.items())}
    layer = max(costs, key=lambda n: costs[n])
    return f"{name}: with {fewest} experts layer {layer} costs the most, {number(costs[layer], 2)} nats"
