# SPDX-License-Identifier: Apache-2.0
"""Heads for further tokens (MTP) as transformers builds and reads them: names that it does not export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import ModelConfig, WeightNames, text_config

if TYPE_CHECKING:
    import torch


class _Trunk:
    """What transformers asks of a model whose heads it builds."""

    def __init__(self, model: Any, decoder: Any, config: ModelConfig) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.config = config
        self.lm_head = model.get_output_embeddings()
        self.get_decoder = lambda: decoder
        self.get_input_embeddings = model.get_input_embeddings
        # those of a text part in a larger model are for names below that part's, which heads have not
        nested = text_config(model.config) is not model.config
        self._weight_conversions = get_model_conversion_mapping(decoder if nested else model)


def build_heads(model: Any, decoder: Any, config: ModelConfig, dtype: torch.dtype | None = None) -> Any:
    """The heads of a model for further tokens, as transformers builds them, without weights, in evaluation mode.

    Why: ``modeling_layers.MtpModel`` (5.23 and 5.24) is not exported, and reads what it needs from a loaded model.

    Args:
        model: The model, on any device; embeddings, positions and output layer of the heads are its own.
        decoder: The part of it that runs the decoder layers.
        config: Its config; one that says of heads what ``get_mtp_config`` asks.
        dtype: The precision of the parameters.

    Raises:
        Exception: Whatever transformers raises for heads that it cannot build.
    """
    import torch
    from transformers.modeling_layers import MtpModel

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        with torch.device("meta"):
            trunk: Any = _Trunk(model, decoder, config)
            return MtpModel(trunk, text_config(config).num_mtp_layers).eval()
    finally:
        torch.set_default_dtype(before)


def names_of_heads(heads: Any, model: Any, decoder: Any, config: ModelConfig) -> WeightNames:
    """The mapping from tensors in files to the parameters of heads; see :func:`build_heads`."""
    return WeightNames(heads, heads.get_weight_conversions(_Trunk(model, decoder, config)))


def cache_of_heads(heads: Any) -> Any:
    """An empty cache of heads (``cache_utils.MtpCache`` is not exported)."""
    from transformers.cache_utils import MtpCache

    return MtpCache(config=heads.config)


def share_with_heads(heads: Any, model: Any, decoder: Any, config: ModelConfig) -> None:
    """Let heads use the embeddings, positions and output layer of another model of the same kind."""
    heads.tie_with_main_model(_Trunk(model, decoder, config))
