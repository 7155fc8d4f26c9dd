# SPDX-License-Identifier: Apache-2.0
"""Whether a plan and a model belong together, before anything is changed."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..architectures.fingerprint import same_routers
from ..architectures.spec import MoESpec
from ..architectures.table import architecture_for, architecture_of
from ..checkpoints.layout import Layout
from ..compat import ModelConfig, build_on_meta, text_config
from ..errors import RequestError
from ..methods.budget import Budget, UniformBudget
from ..methods.limits import check_retained
from ..models.blocks import fingerprint, moe_blocks
from ..plan import PruningPlan
from ..planning.heads import way_with_heads
from ..storage.folders import check_space
from ..storage.values import Json
from .config_json import source_config, write_counts
from .heads import check_heads, check_way
from .standalone import standalone_class
from .substitutable import check_substitution

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHEN = "A plan is applied to the model it was made for, before pruning."


def check_plan_for_config(plan: PruningPlan, config: ModelConfig) -> None:
    """Raise unless a plan fits a model as far as its config tells, before weights are read.

    Raises:
        RequestError: If it was made for another model, or retains what its routers cannot work with.
    """
    spec = architecture_of(config)
    if plan.model_type != spec.model_type:
        raise RequestError(f"this plan is for a {plan.model_type!r} model, and the model is {spec.model_type!r}.")
    rule = spec.routing(config)
    if (found := rule.top_k) != plan.top_k:
        raise RequestError(f"this plan is for another model, with top_k {plan.top_k}; this model has {found}. {_WHEN}")
    for layer, expected in sorted(plan.without_heads.original_num_experts.items()):
        if layer >= text_config(config).num_hidden_layers:
            raise RequestError(
                f"this plan is for another model: it names layer {layer}, and the model has layers 0 to "
                f"{text_config(config).num_hidden_layers - 1}. {_WHEN}"
            )
        if (found := spec.num_experts(config, layer)) != expected:
            raise RequestError(
                f"this plan is for another model, with {expected} experts in layer {layer}; this model has {found}. "
                f"{_WHEN}"
            )
    check_retained(rule, plan.retained, plan.original_num_experts, "the plan")


def check_plan(plan: PruningPlan, model: PreTrainedModel) -> None:
    """Raise unless a plan fits a model, its layers and router weights included.

    Raises:
        RequestError: As :func:`check_plan_for_config`, or if the router weights are others.
    """
    architecture_for(model, model.config)
    check_plan_for_config(plan, model.config)
    blocks = moe_blocks(model)
    counts = {block.layer: block.num_experts for block in blocks}
    for layer in sorted(set(counts) | set(plan.original_num_experts)):
        expected, found = plan.original_num_experts.get(layer, 0), counts.get(layer, 0)
        if expected != found:
            raise RequestError(
                f"this plan is for another model: layer {layer} has {expected} experts in the plan and {found} in the "
                f"model. {_WHEN}"
            )
    check_routers(plan, fingerprint(blocks))


def check_routers(plan: PruningPlan, found: Json) -> None:
    """Raise unless a plan was made for a model with these router weights, perhaps in another precision.

    Args:
        plan: The plan.
        found: The model's fingerprints (``architectures.fingerprint``).

    Raises:
        RequestError: If it was made for others.
    """
    if not same_routers(plan.made_for, found):
        raise RequestError(
            "this plan was made for a model with other router weights "
            f"({plan.made_for.get('name_or_path') or 'unnamed'}, fingerprint {plan.made_for['fingerprint'][:12]}; "
            f"this model: {found['fingerprint'][:12]})."
        )


def check_output(
    layout: Layout,
    budget: Budget,
    output: str | os.PathLike,
    standalone: bool,
    mtp: str | None = None,
    substitute: bool = False,
) -> None:
    """Raise unless the pruned copy of a checkpoint can be written, before it is known which experts go.

    Args:
        layout: The checkpoint.
        budget: How many experts its layers keep.
        output: The folder to write.
        standalone: Whether a modelling file is asked for.
        mtp: What is asked to become of heads for further tokens.
        substitute: Whether experts that go answer with a constant.

    Raises:
        RequestError: As :func:`check_request`, or if the disk has no room for it.
    """
    uniform = isinstance(budget, UniformBudget) and len(set(budget.num_experts.values())) == 1
    if substitute:
        check_substitution(layout, standalone, mtp)
    else:
        check_request(layout, uniform, standalone, way_with_heads(mtp, uniform))
    if isinstance(budget, UniformBudget) and not substitute:
        check_way(layout, {**layout.num_experts, **budget.num_experts}, mtp)
    share = budget.total / sum(layout.num_experts.values())
    check_space(output, int(layout.checkpoint.nbytes - (1 - share) * layout.expert_bytes))


def check_found(spec: MoESpec, uniform: bool) -> None:
    """Refuse unequal layers of a type without a row: whoever opens the files knows nothing of it.

    Raises:
        RequestError: If layers would keep different numbers of experts.
    """
    if spec.found is not None and not uniform:
        raise RequestError(
            f"layers of a {spec.model_type!r} model cannot keep different numbers of experts: what is known of the "
            "type was found by trial, and is not known where the files are opened. Use a uniform allocation, or "
            "register_architecture."
        )


def check_unequal(spec: MoESpec, config: ModelConfig, num_experts: Mapping[int, int]) -> None:
    """Raise unless transformers can build a model of this type whose layers have different numbers of experts.

    Args:
        spec: The architecture.
        config: The model's config.
        num_experts: Experts of its MoE layers.

    Raises:
        RequestError: With what it says.
    """
    if len(num_experts) < 2:
        return
    tried, rule = copy.deepcopy(config), spec.routing(config)
    last = max(num_experts)
    write_counts(spec, tried, {**num_experts, last: num_experts[last] + rule.groups})
    try:
        build_on_meta(tried)
    except Exception as error:  # whatever the model's own code makes of it
        first = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise RequestError(
            f"the layers of a {spec.model_type!r} model have to keep the same number of experts: transformers cannot "
            f"build it otherwise ({first}). Use a uniform allocation."
        ) from error


def check_request(layout: Layout, uniform: bool, standalone: bool, heads: str) -> None:
    """Raise unless a checkpoint can be pruned, as far as can be told before it is known which experts go.

    Args:
        layout: The checkpoint.
        uniform: Whether every layer will keep the same number of experts.
        standalone: Whether a modelling file is asked for.
        heads: What is to become of heads for further tokens.

    Raises:
        RequestError: If it cannot.
    """
    check_found(layout.spec, uniform)
    if not uniform:
        check_unequal(layout.spec, layout.config, layout.num_experts)
    if standalone and not uniform:
        standalone_class(layout.config)
    check_heads(layout, heads, uniform)
    source_config(layout.checkpoint.source)
