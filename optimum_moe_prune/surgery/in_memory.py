# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a model in memory: check every layer, then change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..architectures.structure import owner, structure_of
from ..architectures.table import architecture_of
from ..models.blocks import moe_blocks
from ..models.checks import check_finite, usable_model
from ..models.wrappers import forget_compiled
from ..plan import PruningPlan
from .checks import check_plan, check_unequal
from .config_json import write_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_plan(plan: PruningPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Remove the experts that a plan does not retain.

    Nothing is changed unless every layer can be. Experts keep their order and are numbered anew; the router's rows,
    the counts that modules remember and the config follow.

    Args:
        plan: The plan.
        model: A causal language model with real parameters, the one the plan was made for; it may be compiled, or in
            a ``DataParallel``.

    Returns:
        The same model, as it was given.

    Raises:
        RequestError: If the plan does not fit the model, or the model cannot be changed.
        RunError: If a parameter holds NaN or infinity.
    """
    given, model = model, usable_model(model, to_change=True)
    plan = plan.without_heads  # transformers loads none with a model
    check_plan(plan, model)
    if plan.uniform_num_experts is None:
        check_unequal(architecture_of(model.config), model.config, plan.without_heads.original_num_experts)
    check_finite(model)
    blocks = moe_blocks(model)
    spec = blocks[0].spec
    counts = structure_of(model, spec).counts
    with torch.inference_mode(False):  # whatever mode the caller is in, parameters are such that gradients can flow to
        for block in blocks:
            block.retain(plan.retained[block.layer])
    write_counts(spec, model.config, plan.num_experts)
    if plan.uniform_num_experts is not None:
        for path in counts:
            module, name = owner(model, path)
            setattr(module, name, plan.uniform_num_experts)
    forget_compiled(given)
    return given
