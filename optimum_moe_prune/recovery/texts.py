# SPDX-License-Identifier: Apache-2.0
"""Which texts a recovery is done with, and what is refused before any work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ..calibration.samples import CalibrationInput
from ..checkpoints.layout import Layout
from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..plan import PruningPlan
from ..statistics.stats import CalibrationStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def given_texts(
    recipe: MoEPrunerConfig | None,
    plan: PruningPlan | None,
    model: PreTrainedModel | Layout,
    calibration: CalibrationInput | CalibrationStats | None,
    recovery: CalibrationInput | None,
) -> CalibrationInput | None:
    """The texts to recover with, by default those of the calibration; None where nothing is to be recovered.

    Args:
        recipe: What is to be done.
        plan: One that was made before, if any.
        model: The unpruned model.
        calibration: What it is calibrated on.
        recovery: The texts that were named for the recovery.

    Raises:
        RequestError: If there are no texts, or the weights are quantised.
    """
    if recipe is None or not recipe.recover:
        if recovery is not None:
            raise RequestError("recovery= names texts to recover with, and the recipe recovers nothing (recover).")
        return None
    if isinstance(model, Layout) and (model.plain.formats or model.plain.method):
        raise RequestError(
            f"{model.checkpoint.name_or_path} is quantised ({model.plain.method or ', '.join(model.plain.formats)}), "
            "and recovered weights are no numbers of that format: prune it without recover, or recover an "
            "unquantised copy of the model and quantise the result."
        )
    given = calibration if recovery is None else recovery
    if given is None and plan is not None and "recovery" in plan.provenance:
        logger.warning("the plan's cut alone is repeated: recovered weights are not in a plan.")
        return None
    if given is None or isinstance(given, CalibrationStats):
        held = "statistics hold none" if given is not None else "none are given"
        raise RequestError(
            f"recover={','.join(recipe.recover)!r} needs texts, and {held}; pass calibration=texts or recovery=texts."
        )
    return given
