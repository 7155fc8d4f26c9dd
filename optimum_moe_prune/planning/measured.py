# SPDX-License-Identifier: Apache-2.0
"""Sets of experts by what was measured of them: of one method, or the best of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..methods import get_method
from ..methods.budget import Budget, UniformBudget
from ..methods.registry import statistics_alone
from ..methods.selection import Selection
from ..names import BY_SENSITIVITY
from ..statistics.stats import CalibrationStats
from ..storage.values import Json, Values
from .allocation import allocate, cost_of, costs_of, spread
from .choice import NOT_WHOLE
from .layer_sets import accepted
from .sensitivity import LayerSensitivity, MethodSensitivity, Sensitivity

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig


def selected_by_sensitivity(
    stats: CalibrationStats, config: MoEPrunerConfig, budget: Budget, sensitivity: Sensitivity | None
) -> Selection:
    """The sets of a method for the numbers of experts that measured divergences give: those measured, else chosen now.

    Raises:
        RequestError: If nothing was measured, or it was measured otherwise.
    """
    if sensitivity is None:
        raise RequestError(
            "allocation 'sensitivity' needs what was measured of the model; measure it first (optimum-cli moe-prune "
            "sensitivity), and give the result (--sensitivity FILE)."
        )
    measured = sensitivity.for_recipe(config, stats.model, stats.domain_weights)
    _check_calibration(config, stats, sensitivity)
    method, options = get_method(config.method), config.options()
    allocation = allocate(measured, budget, stats.domain_weights, accepted(config, budget))
    counts, interpolated = allocation.num_experts, allocation.interpolated
    retained = {
        layer: measured.layers[layer].retained.get(count, tuple(range(count))) for layer, count in counts.items()
    }
    findings: Json = {"sum of divergences": round(allocation.divergence, 6)}
    exactly = budget.exactly(counts)
    if interpolated and method.check is not None:
        method.check(exactly, options)
    selection = method.select(stats, exactly, options)
    retained |= {layer: selection.retained[layer] for layer in interpolated}
    notes = selection.notes
    if interpolated:
        findings["layers with interpolated divergences"] = len(interpolated)
        notes += (
            f"the sum of divergences is an estimate: in {len(interpolated)} of {len(counts)} layers the number of "
            "experts lies between measured ones",
        )
    # A set that was measured stays; what is to be said of the one that would be chosen now is not of it.
    ties = {layer: tied for layer, tied in selection.ties.items() if retained[layer] == selection.retained[layer]}
    return Selection(retained, notes=notes, findings=findings, ties=ties)


def _check_calibration(config: MoEPrunerConfig, stats: CalibrationStats, sensitivity: Sensitivity) -> None:
    if sensitivity.provenance.get("calibration") != stats.fingerprint and config.needs_text:
        raise RequestError(
            "the sensitivity was measured with experts chosen by another calibration than these statistics are of; "
            "measure it with the same (sensitivity --stats), or plan with those it was measured with."
        )


# ------------------------------------------------------------------------------------------- the best of several


@dataclass(frozen=True)
class Candidates:
    """Recipes of the methods whose sets are measured.

    Attributes:
        recipes: One of each method.
        left_out: Why others are not, by name.
    """

    recipes: tuple[MoEPrunerConfig, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Measured:
    """What a method that measures chose.

    Attributes:
        selection: The experts.
        candidates: Whose sets it chose from.
        by_layer: The method whose set each layer retains, of the layers that are pruned.
        divergence: The sum of what the layers lose.
        unmeasured: The layers whose set was not measured.
        leading: The recipe whose sets most layers retain, of those there are statistics for.
    """

    selection: Selection
    candidates: Candidates
    by_layer: dict[int, str]
    divergence: float
    unmeasured: tuple[int, ...]
    leading: MoEPrunerConfig

    def to_dict(self) -> Json:
        """As plain JSON values, for provenance."""
        return {
            "candidates": [recipe.method for recipe in self.candidates.recipes],
            "left_out": self.candidates.left_out,
            "by_layer": {str(layer): name for layer, name in sorted(self.by_layer.items())},
            "sum_of_divergences": self.divergence,
            "layers_not_measured": list(self.unmeasured),
        }


def candidates_of(config: MoEPrunerConfig, stats: CalibrationStats) -> Candidates:
    """The methods whose sets can be measured: those that a recipe names, or of those by default the ones there are
    statistics for.

    Raises:
        RequestError: If one that was named lacks statistics, or nothing is left.
    """
    method = get_method(config.method)
    assert method.candidates is not None
    recipes, left_out, first = [], {}, None
    for name in method.candidates(config.options()):
        recipe = of_candidate(config, name)
        try:
            if recipe.needs_text and not stats.samples:
                raise RequestError(f"method {name!r} needs a calibration; give calibration texts.")
            stats.require(recipe.needs, name)
            recipes.append(recipe)
        except RequestError as error:
            if "candidates" in config.method_options:
                raise
            first, left_out[name] = first or error, str(error)
    if not recipes:
        assert first is not None
        raise first
    return Candidates(tuple(recipes), left_out)


def of_candidate(config: MoEPrunerConfig, name: str, options: Json | None = None) -> MoEPrunerConfig:
    """The recipe of a method whose sets are measured for another."""
    return replace(config, method=name, method_options=options or {}, allocation=BY_SENSITIVITY)


def measured_candidates(config: MoEPrunerConfig, sensitivity: Sensitivity) -> Candidates:
    """The methods whose sets were measured: those that a recipe names, or all of them.

    Raises:
        RequestError: If one that is named was not measured, or none was.
    """
    method = get_method(config.method)
    assert method.candidates is not None
    names = list(method.candidates(config.options()))
    known = {name: _options_of(config, name, measured) for name, measured in sensitivity.methods.items()}
    there = [name for name, options in known.items() if options is not None]
    if "candidates" not in config.method_options:
        left_out = {name: "it was not measured" for name in names if name not in there}
        names = [*(name for name in names if name in there), *(name for name in there if name not in names)]
        if not names:
            raise RequestError(
                f"the sensitivity was measured for {', '.join(sorted(sensitivity.methods)) or 'no method'}, and for "
                f"none that {config.method!r} can choose from; measure those (sensitivity --method {config.method})."
            )
        return Candidates(tuple(of_candidate(config, name, known[name]) for name in names), left_out)
    return Candidates(tuple(of_candidate(config, name, known.get(name)) for name in names), {})


def _options_of(config: MoEPrunerConfig, name: str, measured: MethodSensitivity) -> Json | None:
    """The options that a method was measured with; None where it is no candidate, or not known here."""
    try:
        options = dict(measured.config.get("method_options") or {})
        of_candidate(config, name, options)
        return None if get_method(name).measures else options
    except (RequestError, TypeError, ValueError):
        return None


def selected_by_measuring(
    stats: CalibrationStats, config: MoEPrunerConfig, budget: Budget, sensitivity: Sensitivity | None
) -> Measured:
    """The sets of several methods that lose least by what was measured, with exactly the budget.

    Where layers keep the same number, or one each, the best set of that number; else the numbers whose best sets have
    the least sum. A number that was not measured costs what lies on the line between its measured neighbours, and its
    set is the one that the method chooses now.

    Args:
        stats: What the methods choose from.
        config: A recipe of a method that measures.
        budget: What each layer keeps, or all together.
        sensitivity: What was measured.

    Raises:
        RequestError: If nothing was measured, or otherwise than the recipe says, or it says nothing of the budget.
    """
    check_measured(config, sensitivity)
    assert sensitivity is not None
    candidates = measured_candidates(config, sensitivity)
    measured = {}
    for recipe in candidates.recipes:
        measured[recipe.method] = sensitivity.for_recipe(recipe, stats.model, stats.domain_weights)
        _check_calibration(recipe, stats, sensitivity)
    costs, givers = _least(stats, candidates.recipes, measured, budget)
    if isinstance(budget, UniformBudget):
        counts = dict(budget.num_experts)
        for layer, count in counts.items():
            if count not in costs[layer]:
                raise RequestError(
                    f"what was measured of layer {layer} does not speak of {count} experts; measure them (counts)."
                )
        divergence = sum(costs[layer][count] for layer, count in counts.items())
    else:
        counts, divergence = spread(costs, budget.total)
    retained: dict[int, tuple[int, ...]] = {}
    by_layer = {layer: givers[layer][n] for layer, n in counts.items() if n < budget.original[layer]}
    known = {layer: measured[name].layers[layer] for layer, name in by_layer.items()}
    unmeasured = tuple(layer for layer in known if counts[layer] not in known[layer].kl)
    notes: tuple[str, ...] = (NOT_WHOLE,)
    for recipe in candidates.recipes:
        if missing := {layer: counts[layer] for layer in unmeasured if by_layer[layer] == recipe.method}:
            retained |= get_method(recipe.method).select(stats, budget.exactly(missing), recipe.options()).retained
    retained |= {layer: one.retained[counts[layer]] for layer, one in known.items() if layer not in unmeasured}
    retained |= {layer: tuple(range(n)) for layer, n in counts.items() if layer not in by_layer}
    if unmeasured:
        notes += (
            f"the sum of divergences is an estimate: in {len(unmeasured)} of {len(counts)} layers the number of "
            "experts lies between measured ones",
        )
    findings: Json = {"sum of divergences": round(divergence, 6)}
    return Measured(
        Selection(dict(sorted(retained.items())), notes=notes, findings=findings),
        candidates,
        by_layer,
        divergence,
        unmeasured,
        max(
            [recipe for recipe in candidates.recipes if _is_served(recipe, stats)] or candidates.recipes,
            key=lambda recipe: list(by_layer.values()).count(recipe.method),
        ),
    )


def check_measured(
    config: MoEPrunerConfig,
    sensitivity: Sensitivity | None,
    model: Values | None = None,
    domain_weights: Mapping[str, float] | None = None,
) -> None:
    """Raise where what was measured says nothing to a recipe that plans by it.

    Args:
        config: The recipe.
        sensitivity: What was measured.
        model: Facts of the model it is for; where they are not known, they are not compared.
        domain_weights: The share of each domain.

    Raises:
        RequestError: With what to do.
    """
    measures = get_method(config.method).measures
    if measures and sensitivity is None:
        raise RequestError(statistics_alone(config.method))
    if sensitivity is None or model is None or not config.measures:
        return
    for recipe in measured_candidates(config, sensitivity).recipes if measures else (config,):
        sensitivity.for_recipe(recipe, model, domain_weights)


def best_of(config: MoEPrunerConfig, sensitivity: Sensitivity) -> dict[int, LayerSensitivity]:
    """Of all sets that were measured of the candidates those that lose least, by layer and number of experts."""
    weights = sensitivity.domain_weights
    best: dict[int, LayerSensitivity] = {}
    for recipe in measured_candidates(config, sensitivity).recipes:
        for layer, entry in sensitivity.methods[recipe.method].layers.items():
            own = best.setdefault(layer, LayerSensitivity(entry.original_num_experts))
            for count, kl in entry.kl.items():
                if count not in own.kl or cost_of(kl, weights) < cost_of(own.kl[count], weights):
                    own.retained[count], own.kl[count] = entry.retained[count], kl
    return best


def _is_served(recipe: MoEPrunerConfig, stats: CalibrationStats) -> bool:
    """Whether there are the statistics that a method reads."""
    return recipe.needs <= stats.needs and (bool(stats.samples) or not recipe.needs)


def _least(
    stats: CalibrationStats,
    recipes: Sequence[MoEPrunerConfig],
    measured: Mapping[str, MethodSensitivity],
    budget: Budget,
) -> tuple[dict[int, dict[int, float]], dict[int, dict[int, str]]]:
    """For each layer and number of experts the least that any method's set loses, and whose it is."""
    costs: dict[int, dict[int, float]] = {layer: {} for layer in budget.original}
    givers: dict[int, dict[int, str]] = {layer: {} for layer in budget.original}
    for recipe in recipes:
        accepts = accepted(recipe, budget) if _is_served(recipe, stats) else lambda layer, count: False
        for layer in budget.original:
            found = costs_of(measured[recipe.method], budget, layer, stats.domain_weights, accepts)
            for count, cost in found.items():
                if count not in costs[layer] or cost < costs[layer][count]:
                    costs[layer][count], givers[layer][count] = cost, recipe.method
    return costs, givers
