# SPDX-License-Identifier: Apache-2.0
"""Methods that choose by measuring (``auto``): layers alone, the plan that follows and its alternatives.

Half of the measured samples decide: about the set of each layer, about the numbers of experts, and about which whole
plan is kept. What the plans lose is reported on the other half, which had no part in any choice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from ..calibration.calibrate import Model, layout_of
from ..calibration.samples import CalibrationSet
from ..calibration.shares import check_same_samples
from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..methods import get_method
from ..methods.budget import UniformBudget
from ..methods.limits import most_counts
from ..models.checks import usable_model
from ..models.memory import Compute
from ..names import BY_SENSITIVITY, GLOBAL, UNIFORM
from ..plan import PruningPlan
from ..planning.allocation import cost_of
from ..planning.build import budget_for, protected_experts, quiet_plan
from ..planning.choice import NOT_WHOLE
from ..planning.measured import candidates_of, measured_candidates
from ..planning.sensitivity import ALL, LayerSensitivity, MethodSensitivity, Sensitivity
from ..processes import shared
from ..statistics.samples import check_domain_weights
from ..statistics.stats import CalibrationStats
from ..storage.values import Json
from ..storage.workspace import Workspace
from .halves import Halves, halves
from .measure_sensitivity import opened
from .measuring import Divergences, Sets, measured_layers, sensitivity_of
from .sensitivity_sets import layer_sets, sets_at

logger = logging.getLogger(__name__)

_ROUNDS = 2  # in which numbers of experts are measured that lie between measured ones
_PARTS = ("layers", *(f"between{n}" for n in range(_ROUNDS)), "models")

Weights = Mapping[str, float] | None


@shared
def choose_by_measuring(
    model: Model,
    recipes: Sequence[MoEPrunerConfig],
    stats: CalibrationStats,
    samples: CalibrationSet,
    sensitivity: Sensitivity | None = None,
    *,
    domain_weights: Weights = None,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> tuple[list[PruningPlan], Sensitivity]:
    """Choose the experts that recipes of one method that measures retain.

    Args:
        model: The unpruned model, or the folder, Hub id or ``Source`` of one.
        recipes: Of one method with the same options; their budgets and allocations may differ.
        stats: Of the same model, from which the candidates choose.
        samples: Of these the first recipe's ``sensitivity_samples`` decide, and as many are judged on.
        sensitivity: What was measured of layers before.
        domain_weights: A share for each domain.
        compute: How a checkpoint is run.
        workspace: Where unfinished work on a checkpoint is kept, and continued by a later call for the same.

    Returns:
        A plan for each recipe, and what was measured of the layers.

    Raises:
        RequestError: If the statistics are of another model or lack what a named candidate needs, or a budget cannot
            be kept to.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    layout = layout_of(model)
    meant = usable_model(model if layout is None else layout)
    if domain_weights is not None:
        check_domain_weights(stats.samples, domain_weights)
    check_same_samples(compute.together, samples)
    half = halves(samples, recipes[0].sensitivity_samples)
    subject = opened(meant, stats, recipes[0].batch_size, compute, workspace, _PARTS, _asked(recipes, domain_weights))
    plain = stats.without_heads  # heads take no part in the model's own output
    by_tokens = plain.with_domain_weights(domain_weights)
    alone = Divergences(subject, half.choosing)
    left_out: dict[str, str] = {}
    if sensitivity is None:
        candidates = candidates_of(recipes[0], by_tokens)
        left_out = candidates.left_out
        sensitivity = _of_layers(alone, by_tokens, candidates.recipes, recipes, domain_weights)
    from_main = subject.processes.from_main

    def planned(known: Sensitivity) -> list[PruningPlan]:
        return from_main(lambda: [quiet_plan(stats, recipe, domain_weights, known) for recipe in recipes])

    plans = planned(sensitivity)
    for number in range(_ROUNDS):
        settings = (by_tokens, recipes, sensitivity, plans)
        more = from_main(partial(_between, *settings))
        if not more:
            break
        alone.add(f"between{number}", _each(more))
        sensitivity = _with(sensitivity, alone, by_tokens, more)
        plans = planned(sensitivity)
    given = (sensitivity, domain_weights)
    others = from_main(lambda: [_alternatives(stats, *pair, *given) for pair in zip(recipes, plans, strict=True)])
    whole = Divergences(subject, half.measured)
    whole.add("models", [one.without_heads.retained for found in others for one in found.values()])
    kept = [
        _kept(recipe, plan, found, whole, half, domain_weights, left_out)
        for recipe, plan, found in zip(recipes, plans, others, strict=True)
    ]
    return kept, sensitivity


def _asked(recipes: Sequence[MoEPrunerConfig], domain_weights: Weights) -> Json:
    """What decides which plans are measured, as settings that a person gave."""
    values = recipes[0].to_dict()
    names = [
        *("method", "method_options", "allocation", "num_experts", "sparsity", "total_experts", "protect"),
        *("skip_layers", "protect_super_experts", "count_multiple_of", "seed"),
    ]
    return {
        **{name: values[name] for name in names},
        "domain_weights": None if domain_weights is None else dict(domain_weights),
    }


# ------------------------------------------------------------------------------------------- layers alone


def _of_layers(
    divergences: Divergences,
    stats: CalibrationStats,
    candidates: Sequence[MoEPrunerConfig],
    recipes: Sequence[MoEPrunerConfig],
    domain_weights: Weights,
) -> Sensitivity:
    """What each layer loses alone by the sets of the candidates.

    Args:
        divergences: To measure with.
        stats: With the shares of the domains.
        candidates: Whose sets are measured.
        recipes: What is asked for: where all layers keep the same number in all of them, these numbers are measured.
        domain_weights: The shares.
    """
    counts: set[int] | None = set()
    for recipe in recipes:
        budget = budget_for(recipe, stats.num_experts, stats.routing, protected_experts(stats, recipe)[0])
        if isinstance(budget, UniformBudget) and counts is not None:
            counts |= {n for layer, n in budget.num_experts.items() if n < budget.original[layer]}
        else:
            counts = None
    most = most_counts(len(stats.num_experts), len(candidates))
    asked = None if counts is None else sorted(counts)

    def chosen() -> dict[str, Sets]:
        return {c.method: layer_sets(stats, c, asked, most) for c in candidates}

    sets = divergences.subject.processes.from_main(chosen)
    divergences.add("layers", _each(sets))
    methods = measured_layers(divergences, stats, sets, candidates)
    return sensitivity_of(divergences, stats, methods, domain_weights)


def _each(sets: Mapping[str, Sets]) -> list[dict[int, tuple[int, ...]]]:
    """Plans that prune one layer."""
    methods = chain.from_iterable(method.items() for method in sets.values())
    return [{layer: experts} for layer, by_count in methods for experts in by_count.values()]


def _between(
    stats: CalibrationStats,
    recipes: Sequence[MoEPrunerConfig],
    sensitivity: Sensitivity,
    plans: Sequence[PruningPlan],
) -> dict[str, Sets]:
    """The candidates' sets for the numbers of experts in plans that lie between measured ones."""
    found: dict[str, dict[int, dict[int, tuple[int, ...]]]] = {}
    for plan in plans:
        asked = {layer: plan.num_experts[layer] for layer in plan.provenance["choice"]["layers_not_measured"]}
        for recipe in measured_candidates(recipes[0], sensitivity).recipes if asked else ():
            if recipe.needs <= stats.needs:
                for layer, by_count in sets_at(stats, recipe, asked).items():
                    found.setdefault(recipe.method, {}).setdefault(layer, {}).update(by_count)
    return dict(found)


def _with(
    sensitivity: Sensitivity, divergences: Divergences, stats: CalibrationStats, sets: Mapping[str, Sets]
) -> Sensitivity:
    """A sensitivity with more that was measured."""
    methods = dict(sensitivity.methods)
    for name, by_layer in sets.items():
        layers = dict(methods[name].layers)
        for layer, by_count in by_layer.items():
            kl = {count: divergences.kl({layer: experts}) for count, experts in by_count.items()}
            before = layers.get(layer) or LayerSensitivity(stats.num_experts[layer])
            layers[layer] = replace(before, retained={**before.retained, **by_count}, kl={**before.kl, **kl})
        methods[name] = MethodSensitivity(methods[name].config, layers, methods[name].model)
    return replace(sensitivity, methods=methods)


# ------------------------------------------------------------------------------------------- whole plans


def _alternatives(
    stats: CalibrationStats,
    recipe: MoEPrunerConfig,
    plan: PruningPlan,
    sensitivity: Sensitivity,
    domain_weights: Weights,
) -> dict[str, PruningPlan]:
    """The plan of a recipe, and those of each candidate alone that keep as many experts, by name."""
    unequal = recipe.allocates != UNIFORM
    found = {_name(recipe.method, recipe.allocates): plan}
    asked = [(recipe, UNIFORM)] if unequal else []
    for candidate in measured_candidates(recipe, sensitivity).recipes:
        ways = (BY_SENSITIVITY, UNIFORM, GLOBAL) if unequal else (UNIFORM,)
        asked += [(candidate, way) for way in ways if way in get_method(candidate.method).takes]
    for one, allocation in asked:
        try:
            other = quiet_plan(stats, replace(one, allocation=allocation), domain_weights, sensitivity)
        except RequestError as error:
            logger.debug("%s, %s is no alternative: %s", one.method, allocation, error)
            continue
        if sum(other.without_heads.num_experts.values()) == sum(plan.without_heads.num_experts.values()):
            found.setdefault(_name(one.method, allocation), other)
    return found


def _name(method: str, allocation: str) -> str:
    return f"{method}, {allocation}"


def _kept(
    recipe: MoEPrunerConfig,
    plan: PruningPlan,
    others: Mapping[str, PruningPlan],
    whole: Divergences,
    half: Halves,
    domain_weights: Weights,
    left_out: Mapping[str, str],
) -> PruningPlan:
    """Of a plan and its alternatives the one that loses least, with what was measured of all."""
    choosing = {sample.hash for sample in half.choosing.samples}
    deciding = {name: whole.kl(one.without_heads.retained, choosing) for name, one in others.items()}
    judged = {name: whole.kl(one.without_heads.retained, half.judging) for name, one in others.items()}
    first = next(iter(others))
    best = min(others, key=lambda name: (cost_of(deciding[name], domain_weights), name != first))
    kept = others[best]
    choice: Json = dict(plan.provenance["choice"])
    if best != first:
        method = best.rpartition(", ")[0]
        choice |= {"by_layer": dict.fromkeys(_pruned(kept), method), "sum_of_divergences": None}
        choice["layers_not_measured"] = []
        if "choice" in kept.provenance:  # the same method, with the same number in every layer
            choice |= kept.provenance["choice"]
    tokens = {"choosing": whole.tokens_of(choosing), "judging": whole.tokens_of(half.judging)}
    choice |= {
        "left_out": {**choice["left_out"], **left_out},
        "kept": best,
        "samples": {"choosing": len(half.choosing), "judging": len(half.judging)},
        "tokens_by_domain": tokens,
        "judged_without": list(half.alone),
        "measured": {
            name: {"choosing": deciding[name], "judging": judged[name] or None, "sparsity": others[name].sparsity}
            for name in sorted(others, key=lambda name: cost_of(deciding[name], domain_weights))
        },
    }
    notes = [note for note in kept.provenance["notes"] if note != NOT_WHOLE]
    notes += [f"{name} is no candidate: {why.rstrip('.')}" for name, why in choice["left_out"].items()]
    if half.alone:
        notes.append(
            f"{', '.join(half.alone)}: one sample each, which decided; what is lost there was not measured on others"
        )
    findings: Json = dict(kept.provenance["findings"])
    if judged[best]:
        findings["nats lost per token, on samples that had no part in the choice"] = round(judged[best][ALL], 4)
    provenance: Json = {**kept.provenance, "notes": notes, "findings": findings, "choice": choice}
    if "sensitivity" in plan.provenance:
        provenance["sensitivity"] = plan.provenance["sensitivity"]
    return replace(kept, method=recipe.method, config=plan.config, provenance=provenance)


def _pruned(plan: PruningPlan) -> list[str]:
    """The layers that lose experts."""
    own = plan.without_heads
    return [str(layer) for layer, count in own.num_experts.items() if count < own.original_num_experts[layer]]
