# SPDX-License-Identifier: Apache-2.0
"""A recipe and statistics -> a plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..architectures.routers import RoutingRule
from ..errors import RequestError
from ..methods import get_method
from ..methods.budget import Budget, global_budget, rounding_note, uniform_budget
from ..methods.limits import check_retained
from ..methods.selection import Retained, Selection, Ties
from ..names import BY_SENSITIVITY, ESTIMATED, NOTES_LOGGER
from ..plan import PruningPlan
from ..provenance import now, without_folders
from ..statistics import passages
from ..statistics.progressive import PROGRESSIVE
from ..statistics.stats import CalibrationStats
from ..storage.values import Json
from . import notes as said_of
from .estimate import check_estimates, selected_by_estimate
from .heads import selected_in_heads
from .layer_sets import protected_experts
from .measured import selected_by_measuring, selected_by_sensitivity
from .progressive import check_recipe, selected_then
from .sensitivity import Sensitivity

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

logger = logging.getLogger(NOTES_LOGGER)


def budget_for(
    config: MoEPrunerConfig,
    original: Mapping[int, int],
    rule: RoutingRule,
    protect: Mapping[int, Iterable[int]] | None = None,
) -> Budget:
    """The budget that a recipe sets for a model.

    Args:
        config: The recipe.
        original: Experts in each MoE layer.
        rule: How its routers choose.
        protect: In place of the recipe's own.

    Raises:
        RequestError: If the budget cannot be kept to, or the method refuses it.
    """
    config.require_budget()
    if config.fit is not None:
        raise RequestError(
            f"how many experts fit in {config.fit} follows from the model's size; settle it first (planning.fit), or "
            "name a number of experts."
        )
    method = get_method(config.method)
    settings: Json = {
        "num_experts": config.num_experts,
        "sparsity": config.sparsity,
        "protect": {layer: tuple(e) for layer, e in (config.protect if protect is None else protect).items()},
        "skip_layers": config.skip_layers,
        "seed": config.seed,
        "multiple": config.count_multiple_of,
    }
    if config.allocates == "uniform":
        budget: Budget = uniform_budget(original, rule, **settings)
    else:
        budget = global_budget(original, rule, total_experts=config.total_experts, **settings)
    # Where numbers follow from divergences what is refused has none.
    if method.check is not None and config.allocates not in (BY_SENSITIVITY, ESTIMATED):
        method.check(budget, config.options())
    return budget


def build_plan(
    stats: CalibrationStats,
    config: MoEPrunerConfig,
    domain_weights: Mapping[str, float] | None = None,
    sensitivity: Sensitivity | None = None,
) -> PruningPlan:
    """Choose the experts to retain.

    Args:
        stats: What the calibration gathered.
        config: Method and budget.
        domain_weights: A share for each domain of the calibration; by default every token counts once.
        sensitivity: What was measured of the model, for ``allocation="sensitivity"`` and methods that measure.

    Raises:
        RequestError: If the budget cannot be kept to, or the statistics or the sensitivity lack what is needed.
    """
    plan = quiet_plan(stats, config, domain_weights, sensitivity)
    say_notes(plan)
    return plan


def say_notes(plan: PruningPlan) -> None:
    """Say what a person must know of a plan."""
    for note in plan.provenance["notes"]:
        logger.warning("%s: %s", plan.method, note)


def quiet_plan(
    stats: CalibrationStats,
    config: MoEPrunerConfig,
    domain_weights: Mapping[str, float] | None = None,
    sensitivity: Sensitivity | None = None,
) -> PruningPlan:
    """As :func:`build_plan`, its notes in the plan only: for plans that are one of many."""
    if config.needs_text and not stats.samples:
        raise RequestError(f"method {config.method!r} needs a calibration; give calibration texts.")
    if config.allocates == ESTIMATED:
        check_estimates(stats)
    measures = get_method(config.method).measures
    if not measures:  # else what can be served is taken
        stats.require(config.needs, config.method)
    stats = stats.with_domain_weights(domain_weights)
    check_recipe(stats, config, domain_weights)
    calibrated, stats, heads = stats, stats.without_heads, stats.of_heads
    protect, said = protected_experts(stats, config)
    original = stats.num_experts
    budget = budget_for(config, original, stats.routing, protect)
    notes = [rounding_note(budget, config.sparsity), said]
    if dense := stats.model.get("dense_layers"):
        notes.append(f"layers without experts stay as they are: {', '.join(map(str, dense))}")
    if routing := stats.model.get("routing"):
        notes.append(routing)
    if config.progressive and not config.needs_text:
        notes.append("the method reads no text, so that progressive changes nothing")
    choice: Json = {}
    in_heads_by = config
    if measures:
        found = selected_by_measuring(stats, config, budget, sensitivity)
        selection, choice, in_heads_by = found.selection, found.to_dict(), found.leading
    else:
        selection = _selected(stats, config, budget, sensitivity)
    chosen, scores = selection.retained, selection.scores
    retained = {layer: chosen.get(layer, tuple(range(count))) for layer, count in sorted(original.items())}
    in_heads = Selection({}) if heads is None else selected_in_heads(heads, in_heads_by, retained)
    if heads is not None and in_heads.retained:
        retained |= in_heads.retained
        original = {**original, **heads.num_experts}
        scores = scores and {**scores, **(in_heads.scores or {})}
    check_retained(stats.routing, retained, original, f"method {config.method!r}")
    notes.append(_odd_note([(original[layer], len(experts)) for layer, experts in retained.items()]))
    findings, more = _findings(config, calibrated, budget, retained, {**selection.ties, **in_heads.ties})
    provenance: Json = {
        "made": now(),
        "model": without_folders(stats.model),
        "calibration": {
            "fingerprint": stats.fingerprint,
            "samples": len(stats.samples),
            "tokens_by_domain": stats.domains,
            "domain_weights": stats.domain_weights,
            "kept_tokens": len(stats.token_sample),
            passages.KEY: passages.Passages.of([sample.hash for sample in stats.samples]).to_dict(),
            **stats.provenance,  # where they are not of an earlier version, it knows the passages as well
            **({PROGRESSIVE: True} if PROGRESSIVE in stats.provenance else {}),  # how is said by recipe and layers
        },
        "notes": list(dict.fromkeys(filter(None, (*notes, *selection.notes, *in_heads.notes, *more)))),  # each once
        "findings": {**selection.findings, **findings},
    }
    if choice:
        provenance["choice"] = choice
    if sensitivity is not None and (measures or config.allocates == BY_SENSITIVITY):
        provenance["sensitivity"] = {"tokens_by_domain": sensitivity.tokens_by_domain, **sensitivity.provenance}
    return PruningPlan(
        model_type=stats.model["model_type"],
        top_k=stats.model["top_k"],
        method=config.method,
        retained=retained,
        original_num_experts=original,
        scores=None if scores is None else {layer: tuple(map(float, s)) for layer, s in sorted(scores.items())},
        config=config.to_dict(),
        provenance=provenance,
        heads=tuple(sorted(in_heads.retained)),
    )


def _findings(
    config: MoEPrunerConfig, stats: CalibrationStats, budget: Budget, retained: Retained, ties: Ties
) -> said_of.Found:
    """What was found of a choice, and what is to be said of it: of ties, and of the calibration where it was read."""
    layers = set(budget.original) | set(ties)
    findings, notes = said_of.of_ties(ties, len(layers), get_method(config.method).tie_advice)
    if not config.needs_text:
        return findings, notes
    reach, of_reach = said_of.of_reach(stats, retained)
    return {**findings, **reach}, (*notes, *of_reach, *said_of.of_calibration(stats.provenance))


def _odd_note(counts: Sequence[tuple[int, int]]) -> str | None:
    """What is to be said of layers that devices could share evenly before and cannot after.

    Args:
        counts: Experts before and after, of each layer.
    """
    odd = [(before, after) for before, after in counts if before % 2 == 0 and after % 2]
    if not odd:
        return None
    alike = len({after for _, after in odd}) == 1
    what = f"{odd[0][1]} experts" if alike else f"the odd numbers of experts in {len(odd)} layers"
    devices = ", ".join(str(n) for n in (8, 4) if any(before % n == 0 for before, _ in odd))
    return (
        f"{what} cannot be spread evenly over {devices}{' or ' if devices else ''}2 devices; count_multiple_of (2, 4, "
        "8 ...) keeps numbers that can"
    )


def _selected(
    stats: CalibrationStats, config: MoEPrunerConfig, budget: Budget, sensitivity: Sensitivity | None
) -> Selection:
    """What a recipe of one method chooses in the layers of a budget."""
    if PROGRESSIVE in stats.provenance:
        return selected_then(stats, config, budget)
    if config.allocates == BY_SENSITIVITY:
        return selected_by_sensitivity(stats, config, budget, sensitivity)
    if config.allocates == ESTIMATED:
        return selected_by_estimate(stats, config, budget)
    return get_method(config.method).select(stats, budget, config.options())
