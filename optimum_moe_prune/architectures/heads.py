# SPDX-License-Identifier: Apache-2.0
"""Heads that predict further tokens (MTP), in configs: how many there are, and how many experts each has.

transformers builds a head as one more decoder layer, by the config that ``get_mtp_config`` makes of a model's: with
the number of experts of the whole model, and with another only where ``mtp_per_layer_config`` says so, which other
programs do not read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ..compat import ModelConfig, text_config
from .spec import MoESpec

_NUMBER_KEYS = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_modules",
)
"""What configs call the number of heads."""
_SWITCHES = ("use_mtp",)
_OWN_COUNTS = "mtp_per_layer_config"
_TYPES = {"layer_types": "mtp_layer_types", "mlp_layer_types": "mtp_mlp_layer_types"}
"""What differs from layer to layer, and what says the same of heads."""


def count_of_heads(spec: MoESpec, config: ModelConfig) -> int:
    """The experts of a head where nothing is said of heads."""
    count = text_config(config).to_dict()[spec.key_of_count(config)]  # the attribute may not be read of unequal layers
    return int(count[-1] if isinstance(count, list) else count)


def write_counts_of_heads(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int]) -> None:
    """Write the numbers of experts of heads into a config, after those of the layers.

    Args:
        spec: The architecture.
        config: The config.
        counts: Experts, by number of the head from 0.
    """
    text, key, usual = text_config(config), spec.key_of_count(config), count_of_heads(spec, config)
    aliases = type(text).attribute_map
    own = {
        int(head): {name: value for name, value in values.items() if aliases.get(name, name) != key}
        for head, values in (getattr(text, _OWN_COUNTS, None) or {}).items()
    }
    for head, count in counts.items():
        if count != usual:
            own.setdefault(head, {})[key] = count
    own = {head: values for head, values in own.items() if values}
    if own:
        setattr(text, _OWN_COUNTS, {str(head): values for head, values in sorted(own.items())})
    elif getattr(text, _OWN_COUNTS, None) is not None:
        setattr(text, _OWN_COUNTS, None)


def write_no_heads(config: ModelConfig) -> None:
    """Say in a config that there are no heads."""
    text = text_config(config)
    there = [(part, key) for part in (text, config) for key in _NUMBER_KEYS if getattr(part, key, None) is not None]
    for part, key in there or [(text, _NUMBER_KEYS[0])]:
        setattr(part, key, 0)
    for part in (text, config):
        for key in _SWITCHES:
            if getattr(part, key, None):
                setattr(part, key, False)
        for key in (_OWN_COUNTS, *_TYPES.values()):
            if vars(part).get(key) is not None:
                setattr(part, key, None)


def with_heads(spec: MoESpec, config: ModelConfig, like: Sequence[int], counts: Sequence[int]) -> ModelConfig:
    """A copy of a config that says of heads what transformers has to know to build them.

    Configs of models whose heads transformers does not load (Qwen3.5) lack that; what their files hold tells it.

    Args:
        spec: The architecture.
        config: The config.
        like: For each head the layer of the model that has the same tensors.
        counts: Its experts.
    """
    config = copy.deepcopy(config)
    text: Any = text_config(config)
    if not getattr(text, "num_mtp_layers", None):
        text.num_mtp_layers = len(like)
    for of_layers, of_heads in _TYPES.items():
        types = getattr(text, of_layers, None)
        if types is not None and getattr(text, of_heads, None) is None:
            setattr(text, of_heads, [types[layer] for layer in like])
    write_counts_of_heads(spec, config, dict(enumerate(counts)))
    return config
