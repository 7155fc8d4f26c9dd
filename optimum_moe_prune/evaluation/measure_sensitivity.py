# SPDX-License-Identifier: Apache-2.0
"""Measure how far a model can be pruned, and where (``sensitivity``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..architectures.fingerprint import same_routers
from ..architectures.routers import RoutingRule
from ..calibration.calibrate import Model, layout_of, statistics_for
from ..calibration.samples import CalibrationSet
from ..calibration.shares import check_same_samples
from ..checkpoints.layout import Layout, identity
from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..methods import get_method
from ..methods.limits import MOST_COUNTS, most_counts
from ..models.blocks import fingerprint, moe_blocks
from ..models.checks import usable_model
from ..models.layerwise import LayerByLayer
from ..models.memory import Compute, begun_with, open_runner
from ..planning.measured import best_of, candidates_of
from ..planning.sensitivity import MethodSensitivity, ModelSensitivity, Sensitivity, decisive
from ..processes import shared
from ..processes.folders import own_folder
from ..progress import working
from ..provenance import versions
from ..statistics.progressive import check_unpruned
from ..statistics.samples import check_domain_weights
from ..statistics.stats import CalibrationStats
from ..storage.growing import unfinished
from ..storage.values import Json, Values
from ..storage.workspace import Workspace
from .halves import halves
from .measuring import Divergences, Subject, measured_layers, sensitivity_of
from .sensitivity_sets import SPARSITIES, check_grid, layer_sets, whole_plans


@shared
def measure_sensitivity(
    model: Model,
    samples: CalibrationSet,
    recipes: Sequence[MoEPrunerConfig],
    stats: CalibrationStats | None = None,
    *,
    domain_weights: Mapping[str, float] | None = None,
    counts: Sequence[int] | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    batch_size: int = 8,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> Sensitivity:
    """Measure how much is lost when methods prune each layer alone, and whole models over sparsities.

    Args:
        model: The unpruned model, or the folder, Hub id or ``Source`` of one.
        samples: Of which the first recipe's ``sensitivity_samples`` are measured on. Without ``stats`` the model is
            calibrated on all of them first.
        recipes: A recipe for each method; their budgets and allocations are not used. For one that measures itself
            (``auto``) the methods it chooses from are measured.
        stats: Of the same model, from which the methods choose experts.
        domain_weights: A share for each domain in choosing experts.
        counts: Numbers of experts to measure in each layer; by default all from ``top_k`` up, or twelve of them.
        sparsities: Of whole models, for each allocation a method takes; none for layers alone.
        batch_size: Samples in a forward pass.
        compute: How a checkpoint is run; of a model in memory, in which precision (as for ``calibrate``).
        workspace: Where unfinished work on a checkpoint is kept, and continued by a later call for the same.

    Returns:
        The sensitivity. Whole models by ``allocation="sensitivity"`` are measured as well.

    Raises:
        RequestError: If the statistics are of another model, lack what a method needs, or no number can be measured.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    processes = compute.together
    layout = layout_of(model)
    meant = usable_model(model if layout is None else layout)
    num_experts, rule = experts_of(meant)
    if domain_weights is not None:
        check_domain_weights(samples.samples if stats is None else stats.samples, domain_weights)
    names = [recipe.method for recipe in recipes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RequestError(f"several recipes are for method {min(twice)!r}; a sensitivity holds one of each method.")
    for recipe in recipes:
        check_grid(recipe, num_experts, rule, counts)
    if stats is None:
        stats = statistics_for(recipes, meant, samples, compute, workspace.part("calibration"))
    check_unpruned(stats.provenance, "a sensitivity")
    check_same_samples(processes, samples)
    several = [recipe for recipe in recipes if get_method(recipe.method).measures]
    number = recipes[0].sensitivity_samples
    measured_on = halves(samples, number).choosing if several else samples.take(number)
    asked = _asked(recipes, domain_weights, counts, sparsities)
    subject = opened(meant, stats, batch_size, compute, workspace, ("layers", "models"), asked)
    return _measured(Divergences(subject, measured_on), stats, recipes, domain_weights, counts, sparsities)


def experts_of(model: Model) -> tuple[dict[int, int], RoutingRule]:
    """The experts of each MoE layer of a model in memory or of a layout, and how its routers choose."""
    if isinstance(model, Layout):
        return model.num_experts, model.spec.routing(model.config)
    blocks = moe_blocks(model)
    return {block.layer: block.num_experts for block in blocks}, blocks[0].rule


def opened(
    model: Model,
    stats: CalibrationStats,
    batch_size: int,
    compute: Compute,
    workspace: Workspace,
    parts: Sequence[str],
    asked: Values,
) -> Subject:
    """Open a model to measure plans on it.

    Args:
        model: In memory, or a layout.
        stats: Of the same model.
        batch_size: Samples in a forward pass.
        compute: How a checkpoint is run; of a model in memory, in which precision.
        workspace: Where unfinished work on a checkpoint is kept.
        parts: The names of the measurements that may be kept there.
        asked: What decides which plans are measured, as settings that a person gave.

    Raises:
        RequestError: If the statistics are of another model.
    """
    if not isinstance(model, Layout):
        check_model_of(stats, fingerprint(moe_blocks(model)))
        runner = LayerByLayer(model, dtype=compute.precision_of(model))
        return Subject(runner, batch_size, compute.together)
    check_model_of(stats, model.fingerprints())
    begun = []
    if workspace.folder is not None and not workspace.restart:
        begun = [unfinished(own_folder(compute.together, workspace.folder / part)) for part in parts]
    compute = compute.agreed(model, *begun_with(*begun))
    with working("loading the model", None, did="loaded the model"):
        runner = open_runner(model, compute)
    work = {
        "model": identity(model),
        "dtype": compute.dtype,
        "computing_dtype": compute.computing,
        "device": runner.device.type,
        "stream": runner.streams,
        "versions": versions(),
    }
    asked = {"batches": {"batch_size": batch_size}, "plans": asked, "computing_dtype": {"dtype": compute.dtype}}
    return Subject(runner, batch_size, compute.together, work, asked, workspace)


def check_model_of(stats: CalibrationStats, found: Json) -> None:
    """Raise unless statistics are of the model with these fingerprints.

    Raises:
        RequestError: If they are of another one.
    """
    if not same_routers(stats.model, found):
        raise RequestError(
            f"the statistics are of another model: its routers have the fingerprint {stats.model['fingerprint'][:12]},"
            f" and those of this model {found['fingerprint'][:12]}."
        )


def _asked(
    recipes: Sequence[MoEPrunerConfig],
    domain_weights: Mapping[str, float] | None,
    counts: Sequence[int] | None,
    sparsities: Sequence[float],
) -> Json:
    """What decides which plans are measured, as settings that a person gave."""
    values = [recipe.to_dict() for recipe in recipes]
    names = ("method_options", "protect", "skip_layers", "protect_super_experts", "count_multiple_of", "seed")
    return {
        "method": [recipe.method for recipe in recipes],
        **{name: values[0][name] for name in names},
        "domain_weights": None if domain_weights is None else dict(domain_weights),
        "counts": None if counts is None else list(counts),
        "sparsities": list(sparsities),
    }


def _measured(
    divergences: Divergences,
    stats: CalibrationStats,
    recipes: Sequence[MoEPrunerConfig],
    domain_weights: Mapping[str, float] | None,
    counts: Sequence[int] | None,
    sparsities: Sequence[float],
) -> Sensitivity:
    """Layers alone and whole models, then the whole models that follow from what the layers lose."""
    stats = stats.without_heads  # which take no part in the model's own output
    by_tokens = stats.with_domain_weights(domain_weights)
    chosen = divergences.subject.processes.from_main
    measuring = [recipe for recipe in recipes if get_method(recipe.method).measures]
    alone = {recipe.method: recipe for recipe in recipes if recipe not in measuring}
    for recipe in measuring:  # what it chooses from is measured as well
        alone = {candidate.method: candidate for candidate in candidates_of(recipe, by_tokens).recipes} | alone
    plain = list(alone.values())
    most = most_counts(len(stats.num_experts), len(plain)) if measuring else MOST_COUNTS
    sets = chosen(lambda: {r.method: layer_sets(by_tokens, r, counts, most) for r in plain})
    plans = chosen(lambda: {r.method: whole_plans(stats, r, sparsities, domain_weights) for r in plain})
    each = [{layer: s} for method in sets.values() for layer, by_count in method.items() for s in by_count.values()]
    divergences.add("layers", [*each, *(retained for method in plans.values() for _, _, retained in method)])
    methods = measured_layers(divergences, stats, sets, plain)
    sensitivity = sensitivity_of(divergences, stats, methods, domain_weights)
    every = [*plain, *measuring]
    more = chosen(lambda: [whole_plans(stats, r, sparsities, domain_weights, sensitivity) for r in every])
    for recipe, found in zip(every, more, strict=True):
        plans[recipe.method] = plans.get(recipe.method, []) + found
    divergences.add("models", [retained for method in plans.values() for _, _, retained in method])
    for recipe in every:
        models = tuple(ModelSensitivity(*plan, divergences.kl(plan[2])) for plan in plans[recipe.method])
        layers = methods[recipe.method].layers if recipe in plain else best_of(recipe, sensitivity)
        methods[recipe.method] = MethodSensitivity(decisive(recipe), layers, models)
    return sensitivity
