# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints with their model cards, whole or absent."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.layout import Layout, open_layout
from ..checkpoints.source import Source
from ..errors import RequestError, check_type
from ..formats import form_of
from ..names import NOTES_LOGGER
from ..plan import PruningPlan, with_parent
from ..planning.for_target import with_target
from ..statistics.stats import CalibrationStats
from ..surgery.checks import check_plan_for_config
from ..surgery.files import pruned_checkpoint
from ..surgery.saving import saved_model
from ..surgery.substituted import substituted_checkpoint
from .card import write_card
from .facts import CardFacts, to_publish

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(NOTES_LOGGER)

_OF_THE_SOURCE = ("revision", "token", "cache_dir", "trust_remote_code")
_OF_EVERY_FORM = ("overwrite", "max_shard_size")


def apply_anywhere(plan: PruningPlan, source: str | os.PathLike, target: str | os.PathLike, **options: Any) -> Path:
    """Write a pruned copy of what lies at a path, whatever its form (``PruningPlan.apply_to_checkpoint``).

    Raises:
        RequestError: Also if an option is not for the form.
    """
    form = form_of(source)
    if form is not None:
        given = {name: value for name, value in options.items() if value not in (None, False)}
        if idle := sorted(given.keys() - {*_OF_EVERY_FORM, *form.options}):
            raise RequestError(f"{idle[0]} is for transformers checkpoints, and {source} is {form.name}.")
        return form.prepare(plan, source, target, **given).write()
    plan = with_target(plan, options.pop("program", None), options.pop("parallel_size", None))
    card = CardFacts.taken(options)
    read = Source.of(source, **{name: options.pop(name) for name in _OF_THE_SOURCE if name in options})
    check_plan_for_config(plan, read.config)
    return apply_to_checkpoint(plan, open_layout(read), target, card=card, **options)


def apply_to_checkpoint(
    plan: PruningPlan,
    layout: Layout,
    target: str | os.PathLike,
    *,
    card: CardFacts | None = None,
    finish: Callable[[Path], PruningPlan] | None = None,
    substitute: CalibrationStats | None = None,
    **options: Any,
) -> Path:
    """Write a pruned copy of a checkpoint, with its card (``surgery.files.pruned_checkpoint``).

    Args:
        plan: The plan.
        layout: The checkpoint.
        target: The folder to write.
        card: What the card says of the original.
        finish: Called with the folder before it is renamed; changes weights there, and returns the plan that
            remembers it.
        substitute: Statistics with mean outputs: experts that go answer with these
            (``surgery.substituted.substituted_checkpoint``).
        options: Of ``pruned_checkpoint``.
    """
    check_type(substitute, (CalibrationStats, type(None)), "a CalibrationStats (CalibrationStats.load reads a folder)")
    plan = to_publish(with_parent(plan.without_recovery, layout.checkpoint.source.stored_plan()), card)
    if bool(plan.config.get("substitute")) != (substitute is not None):  # the recipe may have been for the other
        if substitute is None:
            logger.warning(
                "the plan was made for experts that answer with a constant (substitute), and here they are removed: "
                "statistics with mean outputs say what they answer with."
            )
        plan = replace(plan, config={**plan.config, "substitute": substitute is not None})
    written = (
        pruned_checkpoint(plan, layout, target, **options)
        if substitute is None
        else substituted_checkpoint(plan, layout, target, substitute, **options)
    )
    with written as folder:
        if finish is not None:
            there = PruningPlan.load(folder)  # with what became of heads
            more = finish(folder).provenance["recovery"]
            replace(there, provenance={**there.provenance, "recovery": more}).save(folder)
        write_card(folder, Path(target).resolve().name)
    return Path(target)


def save_pruned(
    model: PreTrainedModel,
    plan: PruningPlan,
    target: str | os.PathLike,
    *,
    card: CardFacts | None = None,
    **options: Any,
) -> Path:
    """Write a pruned model as a checkpoint, with its card (``surgery.saving.saved_model``)."""
    with saved_model(model, to_publish(plan, card), target, **options) as folder:
        write_card(folder, Path(target).resolve().name)
    return Path(target)
