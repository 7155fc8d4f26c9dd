# SPDX-License-Identifier: Apache-2.0
"""Layers with different numbers of experts: what transformers' own classes lack for them.

This file also travels inside checkpoints that load with ``trust_remote_code=True``, so it needs nothing of the package
it comes from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def count_of_layer(config: Any, count_key: str, layer: int) -> int:
    """Routed experts of a decoder layer: the layer's own number where layers differ, else that of the model."""
    return getattr(config.per_layer_config[layer] if is_unequal(config, count_key) else config, count_key)


def is_unequal(config: Any, count_key: str) -> bool:
    """Whether ``per_layer_config`` gives layers numbers of experts of their own, under the key or an alias of it."""
    aliases = getattr(type(config), "attribute_map", {})
    return any(aliases.get(key, key) == count_key for key in getattr(config, "per_layer_attributes", None) or ())


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
    before. Logits of ``num_experts`` columns are passed on as they are.
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
