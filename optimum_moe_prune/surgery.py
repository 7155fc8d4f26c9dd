# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a model in memory: check every layer, then change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .architectures import architecture_of
from .architectures.block import fingerprint, moe_blocks
from .collect import check_finite, check_model
from .errors import RequestError
from .plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_plan_for_config(plan: PruningPlan, config: Any) -> None:
    """Raise unless a plan fits a model as far as its config tells, before weights are read.

    Raises:
        RequestError: If it was made for another model, or retains different numbers in different layers.
    """
    spec = architecture_of(config)
    if plan.model_type != spec.model_type:
        raise RequestError(f"this plan is for a {plan.model_type!r} model, and the model is {spec.model_type!r}.")
    expected = {"experts": set(plan.original_num_experts.values()), "top_k": {plan.top_k}}
    found = {"experts": getattr(config, spec.count_key), "top_k": spec.routing(config).top_k}
    for what, value in found.items():
        if expected[what] != {value}:
            counts = ", ".join(map(str, sorted(expected[what])))
            raise RequestError(
                f"this plan is for another model, with {what} {counts}; this model has {value}. A plan is applied to "
                "the model it was made for, before pruning."
            )
    if plan.uniform_num_experts is None:
        raise RequestError(
            f"the plan retains different numbers of experts in different layers ({min(plan.num_experts.values())} to "
            f"{max(plan.num_experts.values())}); a checkpoint with unequal layers cannot be reloaded yet, so every "
            "layer must retain the same number (no skip_layers)."
        )


def check_plan(plan: PruningPlan, model: PreTrainedModel) -> None:
    """Raise unless a plan fits a model, its layers and router weights included.

    Raises:
        RequestError: As :func:`check_plan_for_config`, or if the router weights are others.
    """
    check_plan_for_config(plan, model.config)
    blocks = moe_blocks(model)
    counts = {block.layer: block.num_experts for block in blocks}
    for layer in sorted(set(counts) | set(plan.original_num_experts)):
        expected, found = plan.original_num_experts.get(layer, 0), counts.get(layer, 0)
        if expected != found:
            raise RequestError(
                f"this plan is for another model: layer {layer} has {expected} experts in the plan and {found} in the "
                "model. A plan is applied to the model it was made for, before pruning."
            )
    found_print = fingerprint(blocks)
    if plan.made_for.get("fingerprint", found_print) != found_print:
        raise RequestError(
            "this plan was made for a model with other router weights "
            f"({plan.made_for.get('name_or_path') or 'unnamed'}, fingerprint {plan.made_for['fingerprint'][:12]}; "
            f"this model: {found_print[:12]})."
        )


def apply_plan(plan: PruningPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Remove the experts that a plan does not retain.

    Nothing is changed unless every layer can be. Experts keep their order and are numbered anew; the router's rows,
    the counts that modules remember and the config follow.

    Args:
        plan: The plan.
        model: A causal language model with real parameters, the one the plan was made for.

    Returns:
        The same model.

    Raises:
        RequestError: If the plan does not fit the model, or the model cannot be changed.
        RunError: If a parameter holds NaN or infinity.
    """
    check_model(model)
    check_plan(plan, model)
    check_finite(model)
    blocks = moe_blocks(model)
    spec = blocks[0].spec
    for block in blocks:
        block.retain(plan.retained[block.layer])
    count = plan.uniform_num_experts
    setattr(model.config, spec.count_key, count)
    for name in spec.model_counts:
        setattr(model, name, count)
    return model
