# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a model in memory: check every layer, then change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .architectures.block import fingerprint, moe_blocks
from .collect import check_model
from .errors import RequestError
from .plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_plan(plan: PruningPlan, model: PreTrainedModel) -> None:
    """Raise unless a plan fits a model.

    Raises:
        RequestError: If it was made for another model, or retains different numbers in different layers.
    """
    blocks = moe_blocks(model)
    model_type = blocks[0].spec.model_type
    if plan.model_type != model_type:
        raise RequestError(f"this plan is for a {plan.model_type!r} model, and the model is {model_type!r}.")
    counts = {block.layer: block.num_experts for block in blocks}
    for layer in sorted(set(counts) | set(plan.original_num_experts)):
        expected, found = plan.original_num_experts.get(layer, 0), counts.get(layer, 0)
        if expected != found:
            raise RequestError(
                f"this plan is for another model: layer {layer} has {expected} experts in the plan and {found} in the model. "
                "A plan is applied to the model it was made for, before pruning."
            )
    made_for = (plan.provenance.get("model") or {}).get("fingerprint")
    if made_for is not None and made_for != (found_print := fingerprint(blocks)):
        name = (plan.provenance.get("model") or {}).get("name_or_path") or "unnamed"
        raise RequestError(
            f"this plan was made for a model with other router weights ({name}, fingerprint {made_for[:12]}; this model: "
            f"{found_print[:12]})."
        )
    if plan.uniform_num_experts is None:
        raise RequestError(
            f"the plan retains different numbers of experts in different layers ({min(plan.num_experts.values())} to "
            f"{max(plan.num_experts.values())}); a checkpoint with unequal layers cannot be reloaded yet, so every layer must "
            "retain the same number (no skip_layers)."
        )


def apply_plan(plan: PruningPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Remove the experts that a plan does not retain.

    Nothing is changed unless every layer can be. Experts keep their order and are numbered anew; the router's rows, the counts
    that modules remember and the config follow.

    Args:
        plan: The plan.
        model: A causal language model with real parameters, the one the plan was made for.

    Returns:
        The same model.

    Raises:
        RequestError: If the plan does not fit the model, or the model cannot be changed.
        RunError: If a parameter holds NaN or infinity.
    """
    check_plan(plan, model)
    check_model(model)
    blocks = moe_blocks(model)
    spec = blocks[0].spec
    for block in blocks:
        block.retain(plan.retained[block.layer])
    count = plan.uniform_num_experts
    setattr(model.config, spec.count_key, count)
    for name in spec.model_counts:
        setattr(model, name, count)
    return model
