# SPDX-License-Identifier: Apache-2.0
"""Calibrate by a progressive recipe: what has to be known of the unpruned model first, then layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..calibration.calibrate import Model, calibrate, layers_of, layout_of, rule_of, statistics_for
from ..calibration.samples import CalibrationSet
from ..config import MoEPrunerConfig
from ..methods import get_method
from ..models.checks import usable_model
from ..models.memory import Compute
from ..names import UNIFORM
from ..planning.build import budget_for, protected_experts, quiet_plan
from ..planning.progressive import ProgressiveChoice, needs_unpruned, settled_budget
from ..planning.sensitivity import Sensitivity
from ..processes import shared
from ..statistics.stats import CalibrationStats
from ..storage.workspace import Workspace
from .choosing import sensitivity_for


def statistics_to_plan(
    recipe: MoEPrunerConfig,
    model: Model,
    samples: CalibrationSet | None,
    sensitivity: Sensitivity | None = None,
    domain_weights: Mapping[str, float] | None = None,
    *,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> tuple[CalibrationStats, Sensitivity | None]:
    """The statistics that a recipe plans with, gathered its way; arguments and answer as of the progressive one."""
    if recipe.progressive and recipe.needs_text and samples is not None:
        given = (recipe, model, samples, sensitivity, domain_weights)
        return calibrate_progressively(*given, compute=compute, workspace=workspace)
    return statistics_for([recipe], model, samples, compute, workspace.part("calibration")), sensitivity


@shared
def calibrate_progressively(
    recipe: MoEPrunerConfig,
    model: Model,
    samples: CalibrationSet,
    sensitivity: Sensitivity | None = None,
    domain_weights: Mapping[str, float] | None = None,
    *,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> tuple[CalibrationStats, Sensitivity | None]:
    """Gather statistics of each layer on what the pruned layers before it leave, and choose its experts from them.

    Args:
        recipe: Method, budget and calibration.
        model: As for :func:`~optimum_moe_prune.calibration.calibrate.calibrate`.
        samples: The calibration.
        sensitivity: What was measured of the unpruned model, for ``allocation="sensitivity"``; by default it is
            measured on the samples.
        domain_weights: A share for each domain of the calibration; by default every token counts once.
        compute: How a checkpoint is run.
        workspace: Where unfinished work on a checkpoint is kept.

    Returns:
        The statistics, from which this recipe alone plans; and the sensitivity, where the recipe asks for one.

    Raises:
        RequestError: If the budget cannot be kept to, or the model cannot be run one layer at a time.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    layout = layout_of(model)
    model = usable_model(model) if layout is None else layout
    protect: Mapping[int, Iterable[int]] = recipe.protect
    planned, unpruned, notes = None, None, []
    if needs_unpruned(recipe):
        plain = replace(recipe, progressive=False)
        unpruned = statistics_for([plain], model, samples, compute, workspace.part("calibration"))
        protect, said = protected_experts(unpruned, plain)
        notes += [said] if said else []
        if recipe.allocates != UNIFORM:
            sensitivity = sensitivity_for(
                model,
                plain,
                unpruned,
                samples,
                sensitivity,
                domain_weights=domain_weights,
                compute=compute,
                workspace=workspace.part("sensitivity"),
            )
            planned = compute.together.from_main(lambda: quiet_plan(unpruned, plain, domain_weights, sensitivity))
            notes.append("progressive: how many experts each layer keeps follows from the unpruned model")
        if not get_method(recipe.method).by_layer:
            notes.append(
                "progressive: the method looks at all layers at once; when it chooses in one of them, the layers "
                "before it are pruned, and those after it are not yet"
            )
    budget = settled_budget(budget_for(recipe, layers_of(model), rule_of(model), protect), planned)
    stats = calibrate(
        model,
        samples,
        [recipe],
        batch_size=recipe.batch_size,
        max_tokens=recipe.max_tokens,
        seed=recipe.seed,
        compute=compute,
        workspace=workspace.part("progressive"),
        choice=ProgressiveChoice(recipe, budget, domain_weights, unpruned, tuple(notes)),
    )
    return stats, sensitivity
