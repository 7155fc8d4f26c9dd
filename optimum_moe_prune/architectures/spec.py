# SPDX-License-Identifier: Apache-2.0
"""What has to be known about an architecture to prune it: one frozen row per model type.

A row says how the routers choose, which no shape tells. Where experts and routers are, their tensors, the counts that
modules remember and the names in files are found (``structure``), and the rule is proven against what the model does,
on the first batch of every layer. Nothing else asks for a model type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..compat import ModelConfig, text_config
from ..errors import RequestError
from .own_code import Own
from .routers import RoutingRule
from .rules import Form, Mixer, Softmax

COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")


@dataclass(frozen=True)
class MoESpec:
    """One architecture.

    Attributes:
        model_type: ``model_type`` of the config of its text part.
        form: How its routers choose.
        count_key: The config's key for the number of routed experts; by default the one of the usual names it has.
        top_k_key: The config's key for the experts used per token; likewise.
        also: Other model types that the same row describes.
        rule: Makes the rule of a model's config, in place of ``form``.
        modelling: The module with its classes, where that is not one of transformers.
        at_least: The fewest experts of a token that its experts can be called with.
        unequal: Whether transformers can build layers with different numbers of experts.
        streams: Whether the model can be run one layer at a time.
        refused: Why models of this type are not pruned; empty for all others.
        notes: What a person should know of it (``architectures/README.md``).
        found: How the rule was found, where that was by trying (``models.discovery``), and for which settings.
    """

    model_type: str
    form: Form | Softmax | Mixer | Own | None = None
    count_key: str = ""
    top_k_key: str = ""
    also: tuple[str, ...] = ()
    rule: Callable[[Any], RoutingRule] | None = None
    modelling: str = ""
    at_least: int = 1
    unequal: bool = True
    streams: bool = True
    refused: str = ""
    notes: str = ""
    found: tuple[str, str] | None = field(default=None, repr=False)

    def key_of_count(self, config: ModelConfig) -> str:
        """The text config's own (canonical) key for the number of routed experts."""
        return _canonical(text_config(config), (self.count_key,) if self.count_key else COUNT_KEYS, self.model_type)

    def key_of_top_k(self, config: ModelConfig) -> str:
        """The text config's own key for the experts used per token."""
        return _canonical(text_config(config), (self.top_k_key,) if self.top_k_key else TOP_K_KEYS, self.model_type)

    def is_unequal(self, config: ModelConfig) -> bool:
        """Whether a model's layers have different numbers of experts (``per_layer_config``)."""
        from .unequal import is_unequal  # it needs torch

        return is_unequal(text_config(config), self.key_of_count(config))

    def num_experts(self, config: ModelConfig, layer: int) -> int:
        """Routed experts of a decoder layer, should it be sparse."""
        from .unequal import count_of_layer

        return count_of_layer(text_config(config), self.key_of_count(config), layer)

    def routing(self, config: ModelConfig) -> RoutingRule:
        """The rule of this architecture's routers, with the settings of one model."""
        config = text_config(config)
        if self.rule is not None:
            return self.rule(config)
        top_k = getattr(config, self.key_of_top_k(config))
        if isinstance(top_k, list):  # one for each layer; rules have one
            if len(set(top_k)) > 1:
                raise RequestError(f"the layers of this model differ in experts per token ({top_k}); not supported.")
            top_k = top_k[0]
        if self.form is None:
            raise RequestError(f"the row of {self.model_type!r} names no rule of its routers (form, or rule).")
        return self.form.rule(config, int(top_k))

    def by_table(self, rule: RoutingRule) -> RoutingRule:
        """The rule of a layer that goes by a table of token ids, of the rule of the others."""
        assert isinstance(self.form, Form)
        return self.form.by_table(rule)


def _canonical(config: Any, names: tuple[str, ...], model_type: str) -> str:
    """The one key of a config that goes by one of these names, aliases resolved.

    Raises:
        RequestError: If there is none, or several that differ.
    """
    aliases = getattr(type(config), "attribute_map", {})
    values = vars(config)
    found = {aliases.get(name, name): None for name in names if aliases.get(name, name) in values}
    if len(found) != 1:
        what = ", ".join(found) or f"none of {', '.join(names)}"
        raise RequestError(f"the config of this {model_type!r} model has {what}; which key counts cannot be told.")
    return next(iter(found))
