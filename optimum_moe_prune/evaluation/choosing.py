# SPDX-License-Identifier: Apache-2.0
"""From statistics to a plan: measure where a recipe's allocation asks for it, and choose."""

from __future__ import annotations

from collections.abc import Mapping

from ..calibration.calibrate import Model
from ..calibration.samples import CalibrationSet
from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..methods import get_method
from ..models.memory import Compute
from ..names import BY_SENSITIVITY
from ..plan import PruningPlan
from ..planning.build import build_plan, say_notes
from ..planning.sensitivity import Sensitivity
from ..processes import shared
from ..statistics.progressive import PROGRESSIVE
from ..statistics.stats import CalibrationStats
from ..storage.workspace import Workspace
from .best import choose_by_measuring
from .measure_sensitivity import measure_sensitivity


@shared
def choose_experts(
    model: Model,
    recipe: MoEPrunerConfig,
    stats: CalibrationStats,
    samples: CalibrationSet | None = None,
    sensitivity: Sensitivity | None = None,
    *,
    domain_weights: Mapping[str, float] | None = None,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> tuple[PruningPlan, Sensitivity | None]:
    """Choose the experts that a recipe retains of a model.

    Args:
        model: As for :func:`~optimum_moe_prune.calibration.calibrate.calibrate`.
        recipe: Method, budget and calibration.
        stats: Statistics of the model.
        samples: To measure on, for ``allocation="sensitivity"``, unless there is a sensitivity; and for methods that
            measure.
        sensitivity: What was measured before.
        domain_weights: A share for each domain of the calibration; by default every token counts once.
        compute: How a checkpoint is run.
        workspace: Where unfinished work on a checkpoint is kept.

    Returns:
        The plan, and the sensitivity it was planned with where the recipe asks for one.

    Raises:
        RequestError: If the recipe needs texts and there are none, or the budget cannot be kept to.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    if get_method(recipe.method).measures:
        if samples is not None:
            plans, sensitivity = choose_by_measuring(
                model,
                [recipe],
                stats,
                samples,
                sensitivity,
                domain_weights=domain_weights,
                compute=compute,
                workspace=workspace,
            )
            say_notes(plans[0])
            return plans[0], sensitivity
    else:
        sensitivity = sensitivity_for(
            model,
            recipe,
            stats,
            samples,
            sensitivity,
            domain_weights=domain_weights,
            compute=compute,
            workspace=workspace,
        )
    plan = compute.together.from_main(lambda: build_plan(stats, recipe, domain_weights, sensitivity))
    return plan, sensitivity


def sensitivity_for(
    model: Model,
    recipe: MoEPrunerConfig,
    stats: CalibrationStats,
    samples: CalibrationSet | None = None,
    sensitivity: Sensitivity | None = None,
    *,
    domain_weights: Mapping[str, float] | None = None,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> Sensitivity | None:
    """What was measured before, or is measured now where a recipe's allocation asks for it.

    Args:
        model: As for :func:`choose_experts`, as all else.
        recipe: Likewise.
        stats: Likewise.
        samples: Likewise.
        sensitivity: Likewise.
        domain_weights: Likewise.
        compute: Likewise.
        workspace: Likewise.

    Raises:
        RequestError: If the recipe needs texts and there are none.
    """
    chosen = PROGRESSIVE in stats.provenance  # then statistics say how many each layer keeps
    if recipe.allocates != BY_SENSITIVITY or sensitivity is not None or chosen:
        return sensitivity
    if samples is None:
        raise RequestError(
            "allocation 'sensitivity' needs texts to measure on; pass calibration=texts, or what was measured before "
            "(sensitivity)."
        )
    return measure_sensitivity(
        model,
        samples,
        [recipe],
        stats,
        domain_weights=domain_weights,
        sparsities=(),
        batch_size=recipe.batch_size,
        compute=compute,
        workspace=workspace,
    )
