# SPDX-License-Identifier: Apache-2.0
"""What of a recipe follows from the model: how the budget is spread where nobody said it, and what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..architectures.spec import MoESpec
from ..checkpoints.layout import Layout
from ..compat import ModelConfig
from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..methods import get_method
from ..models.blocks import moe_blocks
from ..names import PRUNE, UNIFORM
from ..plan import PruningPlan
from ..planning.fit import Fit, fitted, with_fit
from ..planning.for_target import Served, recipe_for_target, unequal
from ..planning.heads import way_with_heads
from ..targets.table import get_target
from .checks import check_found, check_request, check_unequal
from .heads import check_way

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Settled:
    """A recipe as it is for a model.

    Attributes:
        recipe: The recipe.
        fit: How the model fits, where that was asked for.
        notes: What is to be said of it.
    """

    recipe: MoEPrunerConfig
    fit: Fit | None = None
    notes: tuple[str, ...] = ()

    def remembered(self, plan: PruningPlan) -> PruningPlan:
        """A plan that remembers what followed from the model."""
        plan = with_fit(plan, self.fit)
        if not self.notes:
            return plan
        notes = [*plan.provenance.get("notes", []), *self.notes]
        return replace(plan, provenance={**plan.provenance, "notes": notes})


def settled(
    config: MoEPrunerConfig,
    model: PreTrainedModel | Layout | None,
    standalone: bool = False,
    mtp: str | None = None,
) -> Settled:
    """A recipe with what follows from the model, and from the program that is to open the output.

    A method that measures spreads the budget as the layers need it, and where they have to keep the same number of
    experts, evenly; unless the recipe says which.

    Args:
        config: The recipe.
        model: The model, in memory or as files; None where it is not known.
        standalone: Whether a modelling file is asked for.
        mtp: What becomes of heads, in place of what the recipe says.

    Raises:
        RequestError: As :func:`~optimum_moe_prune.planning.fit.fitted` and
            :func:`~optimum_moe_prune.planning.for_target.recipe_for_target`.
    """
    notes: list[str] = []
    if model is not None and _is_open(config):
        if (why := _refusal(config, model, standalone, mtp)) is not None:
            config = replace(config, allocation=UNIFORM)
            notes.append(f"every layer keeps the same number of experts: {why}")
    if model is not None and config.target is not None:
        config, more = recipe_for_target(config, *_facts(model))
        notes += more
    recipe, fit = fitted(config, model)
    if model is not None and fit is not None:  # only now its numbers are known
        notes += recipe_for_target(recipe, *_facts(model))[1]
    return Settled(recipe, fit, tuple(notes))


def _facts(model: PreTrainedModel | Layout) -> tuple[MoESpec, ModelConfig, dict[int, int]]:
    """Architecture, config and numbers of experts of a model."""
    if isinstance(model, Layout):
        return model.spec, model.config, dict(model.num_experts)
    blocks = moe_blocks(model)
    return blocks[0].spec, model.config, {block.layer: block.num_experts for block in blocks}


def asks_model(config: MoEPrunerConfig, is_there: bool) -> bool:
    """Whether a recipe has to be settled with the model, or, where it is there, can be."""
    return config.fit is not None or config.target is not None or (is_there and _is_open(config))


def _is_open(config: MoEPrunerConfig) -> bool:
    """Whether the model says how the budget is spread."""
    return config.allocation is None and config.total_experts is None and get_method(config.method).measures


def _refusal(
    config: MoEPrunerConfig, model: PreTrainedModel | Layout, standalone: bool, mtp: str | None
) -> str | None:
    """Why the layers of a model cannot keep different numbers of experts; None where they can."""
    if config.substitute:  # every count stays
        return None
    if config.target is not None:
        spec, model_config, counts = _facts(model)
        why = Served(get_target(config.target), spec, model_config).refusal(unequal(counts))
        if why is not None:
            return why
    try:
        if isinstance(model, Layout):
            way = way_with_heads(mtp or config.mtp, False)
            if way == PRUNE and model.heads:
                return "its head for further tokens is pruned as a layer is"
            check_request(model, False, standalone, way)
            counts = dict(model.num_experts)
            counts[max(counts)] -= model.spec.routing(model.config).groups
            check_way(model, counts, mtp or config.mtp)
        else:
            blocks = moe_blocks(model)
            check_found(blocks[0].spec, False)
            check_unequal(blocks[0].spec, model.config, {block.layer: block.num_experts for block in blocks})
    except RequestError as error:
        return str(error).partition(". ")[0].rstrip(".")
    return None
