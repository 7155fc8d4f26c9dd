# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a model in memory: check every layer, then change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .architectures import MoESpec, architecture_of
from .architectures.block import fingerprint, moe_blocks
from .collect import check_finite, check_model
from .errors import RequestError
from .plan import PruningPlan
from .unequal import without_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_WHEN = "A plan is applied to the model it was made for, before pruning."


def check_plan_for_config(plan: PruningPlan, config: Any) -> None:
    """Raise unless a plan fits a model as far as its config tells, before weights are read.

    Raises:
        RequestError: If it was made for another model.
    """
    spec = architecture_of(config)
    if plan.model_type != spec.model_type:
        raise RequestError(f"this plan is for a {plan.model_type!r} model, and the model is {spec.model_type!r}.")
    if (found := spec.routing(config).top_k) != plan.top_k:
        raise RequestError(f"this plan is for another model, with top_k {plan.top_k}; this model has {found}. {_WHEN}")
    for layer, expected in sorted(plan.original_num_experts.items()):
        if layer >= config.num_hidden_layers:
            raise RequestError(
                f"this plan is for another model: it names layer {layer}, and the model has layers 0 to "
                f"{config.num_hidden_layers - 1}. {_WHEN}"
            )
        if (found := spec.num_experts(config, layer)) != expected:
            raise RequestError(
                f"this plan is for another model, with {expected} experts in layer {layer}; this model has {found}. "
                f"{_WHEN}"
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
                f"model. {_WHEN}"
            )
    check_routers(plan, fingerprint(blocks))


def check_routers(plan: PruningPlan, found: str) -> None:
    """Raise unless a plan was made for a model with these router weights.

    Args:
        plan: The plan.
        found: The model's fingerprint.

    Raises:
        RequestError: If it was made for others.
    """
    if plan.made_for.get("fingerprint", found) != found:
        raise RequestError(
            "this plan was made for a model with other router weights "
            f"({plan.made_for.get('name_or_path') or 'unnamed'}, fingerprint {plan.made_for['fingerprint'][:12]}; "
            f"this model: {found[:12]})."
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
    write_counts(spec, model.config, plan.num_experts)
    if plan.uniform_num_experts is not None:
        for name in spec.model_counts:
            setattr(model, name, plan.uniform_num_experts)
    return model


def write_counts(spec: MoESpec, config: Any, counts: Mapping[int, int]) -> None:
    """Write the numbers of experts of the MoE layers into a config.

    The same in every layer: under the architecture's key, as in any model. Else as ``per_layer_config``, transformers'
    own schema; the number for the whole model stays what it was, so that whoever does not look at the layers meets
    tensors of other shapes and stops. transformers' permission to read it stays unwritten (``unequal``).
    Code that came with the checkpoint (``standalone``) is for the numbers it had, and is no longer named.
    """
    layers = config.to_dict().get("per_layer_config") or {}
    own = {int(layer): dict(values) for layer, values in layers.items()}
    aliases = type(config).attribute_map
    for layer, values in own.items():
        own[layer] = {key: value for key, value in values.items() if aliases.get(key, key) != spec.count_key}
    config.per_layer_config = None
    if len(set(counts.values())) == 1:
        setattr(config, spec.count_key, next(iter(counts.values())))
    else:
        for layer, count in counts.items():
            own.setdefault(layer, {})[spec.count_key] = count
    if any(own.values()):
        config.per_layer_config = own
    if hasattr(config, "auto_map"):
        config.auto_map = without_standalone(config.auto_map)
        if not config.auto_map:
            del config.auto_map


def pruned_config(values: dict[str, Any], before: Any, after: Any, spec: MoESpec) -> dict[str, Any]:
    """A source's own ``config.json`` with what pruning, or a change in memory, made different; all else as it was.

    Args:
        values: The source's, as read.
        before: The config that was made of it.
        after: The pruned model's.
        spec: The architecture.
    """
    values = dict(values)
    was, now = before.to_dict(), after.to_dict()
    aliases = [alias for alias, key in type(after).attribute_map.items() if key == spec.count_key]
    for key in [key for key in (spec.count_key, *aliases) if key in values] or [spec.count_key]:
        values[key] = now[spec.count_key]  # the attribute may not be read where layers have their own
    own = {spec.count_key, "dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures"}
    for name in now.keys() - own:
        if now[name] != was.get(name):
            values[name] = now[name]
    if "per_layer_config" not in now:
        values.pop("per_layer_config", None)
    if auto_map := without_standalone(values.pop("auto_map", {})):
        values["auto_map"] = auto_map
    return values
