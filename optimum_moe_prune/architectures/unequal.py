# SPDX-License-Identifier: Apache-2.0
"""Layers with different numbers of experts: what transformers' own classes lack for them.

This file also travels inside checkpoints that load with ``trust_remote_code=True``, so it needs nothing of the package
it comes from.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch

FILE_STEM = "modeling_unequal_moe"
"""What this file is called in a checkpoint."""


def count_of_layer(config: Any, count_key: str, layer: int) -> int:
    """Routed experts of a decoder layer: the layer's own number where layers differ, else that of the model."""
    return getattr(config.per_layer_config[layer] if is_unequal(config, count_key) else config, count_key)


def is_unequal(config: Any, count_key: str) -> bool:
    """Whether ``per_layer_config`` gives layers numbers of experts of their own, under the key or an alias of it."""
    aliases = getattr(type(config), "attribute_map", {})
    return any(aliases.get(key, key) == count_key for key in getattr(config, "per_layer_attributes", None) or ())


def build_like(block: torch.nn.Module, own: Any, layer: int) -> torch.nn.Module:
    """A block of the same class for a layer's own config."""
    named = inspect.signature(type(block).__init__).parameters
    return type(block)(own, layer) if "layer_idx" in named else type(block)(own)


def share_config(module: torch.nn.Module, own: Any, config: Any) -> None:
    """Give the modules that were built with a layer's own config the model's, so that later changes reach them."""
    for part in module.modules():
        if getattr(part, "config", None) is own:
            part.config = config


def balanced_by_layer(load_balancing_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Extend transformers' auxiliary loss to router logits of different widths.

    transformers pools an expert's index over all layers, which says nothing where layers have different numbers of
    experts: balanced narrow layers would push wide ones away from their first experts. There the loss is the mean over
    the layers of the loss of each layer alone, with its own number of experts; ``top_k`` where all are balanced, as
    before. Where every layer has ``num_experts`` nothing changes.
    """
    if getattr(load_balancing_loss, "balanced_by_layer", False):
        return load_balancing_loss

    @functools.wraps(load_balancing_loss)
    def loss(gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Any = None) -> Any:
        if not isinstance(gate_logits, tuple) or {logits.shape[-1] for logits in gate_logits} <= {num_experts}:
            return load_balancing_loss(gate_logits, num_experts, top_k, attention_mask)
        device = gate_logits[0].device
        losses = [
            load_balancing_loss((logits.to(device),), logits.shape[-1], top_k, attention_mask)
            for logits in gate_logits
        ]
        return torch.stack(losses).mean()

    vars(loss)["balanced_by_layer"] = True
    return loss


PERMISSION = "allow_global_per_layer_attribute_access"

GLOBAL_COUNT_ALLOWED = property(lambda config: True, lambda config, value: vars(config).update({PERMISSION: value}))
"""In place of a config class's ``PERMISSION``: the number of experts of the whole model may be read.

transformers refuses that where layers have their own, unless each config allows it, and the constructors of its
models ask. The permission is not written into ``config.json``: without this code transformers then stops before it
could build a model of the wrong shape and fill it with random experts.
"""


def without_standalone(auto_map: dict[str, Any]) -> dict[str, Any]:
    """An ``auto_map`` without the code of this file."""
    return {door: code for door, code in auto_map.items() if FILE_STEM not in str(code)}


def damage(config: Any, loading_info: Any, layers: str, block: str, counted: tuple[str, ...]) -> str | None:
    """What is wrong with the experts that were loaded, or None.

    Args:
        config: The config of the model's text part; only those that say something of their layers are looked at.
        loading_info: What transformers found, in its last step before it fills gaps with random weights.
        layers: Name of the list of decoder layers.
        block: Path from a decoder layer to its MoE block; empty where that is the layer.
        counted: Paths below the block of the tensors with a row per expert.
    """
    if not getattr(config, "is_heterogeneous", False):
        return None
    block = re.escape(f"{block}." if block else "")
    inside = re.compile(rf"(?:^|\.){re.escape(layers)}\.(\d+)\.{block}(.+)")
    advice = "The checkpoint is damaged or was edited; it is not loaded, since these experts would be random."
    for name, found, expected in sorted(loading_info.mismatched_keys):
        if match := inside.search(name):
            shapes = f"{name} has shape {tuple(found)}, not {tuple(expected)}"
            if match[2] in counted and found[0] != expected[0] and tuple(found[1:]) == tuple(expected[1:]):
                return (
                    f"layer {match[1]}: config.json says {expected[0]} experts, and the checkpoint holds {found[0]} "
                    f"({shapes}). {advice}"
                )
            return f"layer {match[1]}: the checkpoint disagrees with config.json: {shapes}. {advice}"
    for name in sorted(loading_info.missing_keys):
        if match := inside.search(name):
            return f"layer {match[1]}: {name} is missing in the checkpoint. {advice}"
    return None
