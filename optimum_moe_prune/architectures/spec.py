# SPDX-License-Identifier: Apache-2.0
"""What has to be known about an architecture to prune it: one frozen row per model type.

Everything else (collecting, surgery, checks, the command line) reads these rows; nothing else asks for a model type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..compat import ModelConfig, text_config
from .routers import RoutingRule, SoftmaxTopK


@dataclass(frozen=True)
class MoESpec:
    """One architecture.

    Dotted paths follow attributes of modules. The experts are one module with fused tensors, called with hidden
    states, the ids of the chosen experts and their weights, as in transformers 5.

    Attributes:
        model_type: ``config.model_type``.
        block_class: Class name of the MoE block; a decoder layer whose block has another class is dense.
        layer_class: Class name of the decoder layer.
        count_key: The config's own (canonical) key for the number of routed experts.
        layers: From the causal language model to its decoder layers.
        block: From a decoder layer to its MoE block.
        experts: From the block to the module with the experts' tensors.
        router: From the block to the module whose first output is the router's logits.
        expert_tensors: Tensors of the experts module, expert first.
        router_tensors: Tensors of the block (parameters or buffers, such as a correction bias) with a row per expert.
        block_counts: Attributes below the block in which modules remember the number of experts.
        model_counts: Attributes of the causal language model that do.
        top_k_key: The config's key for the experts used per token.
        renormalise: Whether the router divides the chosen weights by their sum: always, never, or by that config key.
        cast_weights: Whether the router rounds the weights to the dtype of its logits.
        rule: Makes the routers' rule of a model's config, where it is another one than these settings of a softmax.
        modelling: The module with these classes; by default the one of the model type in transformers.
        file_block: Name of the block in checkpoint files, where another one than ``block`` may stand there.
        file_experts: Where files hold one tensor per expert and projection, ``BLOCK.EXPERTS.7.w1.weight``: name of
            each projection, and the config's keys of its output and input size.
    """

    model_type: str
    block_class: str
    layer_class: str
    count_key: str
    layers: str = "model.layers"
    block: str = "mlp"
    experts: str = "experts"
    router: str = "gate"
    expert_tensors: tuple[str, ...] = ("gate_up_proj", "down_proj")
    router_tensors: tuple[str, ...] = ("gate.weight",)
    block_counts: tuple[str, ...] = ("experts.num_experts", "gate.num_experts")
    model_counts: tuple[str, ...] = ("num_experts",)
    top_k_key: str = "num_experts_per_tok"
    renormalise: bool | str = True
    cast_weights: bool = False
    rule: Callable[[Any], RoutingRule] | None = None
    modelling: str = ""
    file_block: str = ""
    file_experts: tuple[tuple[str, str, str], ...] = ()

    @property
    def modelling_module(self) -> str:
        """The module with the architecture's classes."""
        return self.modelling or f"transformers.models.{self.model_type}.modeling_{self.model_type}"

    @property
    def file_blocks(self) -> tuple[str, ...]:
        """The names under which checkpoint files may hold the block."""
        return tuple(dict.fromkeys((self.file_block or self.block, self.block)))

    def is_unequal(self, config: ModelConfig) -> bool:
        """Whether a model's layers have different numbers of experts (``per_layer_config``)."""
        from .unequal import is_unequal  # it needs torch

        return is_unequal(text_config(config), self.count_key)

    def num_experts(self, config: ModelConfig, layer: int) -> int:
        """Routed experts of a decoder layer, should it be sparse."""
        from .unequal import count_of_layer

        return count_of_layer(text_config(config), self.count_key, layer)

    def routing(self, config: ModelConfig) -> RoutingRule:
        """The rule of this architecture's router, with the settings of one model."""
        config, renormalise = text_config(config), self.renormalise
        if self.rule is not None:
            return self.rule(config)
        if isinstance(renormalise, str):
            renormalise = bool(getattr(config, renormalise))
        return SoftmaxTopK(int(getattr(config, self.top_k_key)), renormalise, self.cast_weights)
