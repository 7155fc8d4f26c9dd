# SPDX-License-Identifier: Apache-2.0
"""What a context takes in memory: the keys, values and states that a model keeps of the tokens it has read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import ModelConfig, build_on_meta, text_config
from .blocks import decoder_of, moe_blocks

logger = logging.getLogger(__name__)

_LENGTHS = (128, 256)


def context_bytes(config: ModelConfig, num_tokens: int, trust_remote_code: bool = False) -> int:
    """Bytes of the cache of one sequence, in 16 bits, as transformers keeps it.

    The model is run without weights and without experts over two short texts, and what its cache grew by is
    continued: layers with a window up to that, layers with a state of one size not at all. Where that cannot be done,
    it is what ordinary attention keeps.

    Args:
        config: The model's config.
        num_tokens: The length of the sequence.
        trust_remote_code: Whether code that comes with the model may run.
    """
    if num_tokens == 0:
        return 0
    try:
        model = build_on_meta(config, torch.bfloat16, trust_remote_code)
        _leave_out_experts(model)
        short, long = (_cached(model, length) for length in _LENGTHS)
        if [len(layer) for layer, _ in short] != [len(layer) for layer, _ in long]:
            raise ValueError("its cache changes its shape")
    except Exception as error:  # any code of any model; what is sought is an estimate
        logger.debug("the cache is estimated by the config: %s", error)
        return _usual(config, num_tokens)
    return sum(
        _continued(before.nbytes, after.nbytes, num_tokens, window)
        for (shorter, window), (longer, _) in zip(short, long, strict=True)
        for before, after in zip(shorter, longer, strict=True)
    )


def _continued(before: int, after: int, num_tokens: int, window: int | None) -> int:
    """The bytes of a tensor for a length, from those for the two short ones."""
    per_token = (after - before) / (_LENGTHS[1] - _LENGTHS[0])
    held = window and max(window - 1, 1)  # the newest token finds these beside itself
    if held is not None and held <= _LENGTHS[0]:
        if before == after:  # full
            return round(before * min(num_tokens / held, 1))
        held = None  # what grows on is of something else in the layer
    fixed = before - per_token * _LENGTHS[0]
    return round(fixed + per_token * min(num_tokens, held or num_tokens))


def _leave_out_experts(model: Any) -> None:
    """Have experts hand on what they are given: how tokens are spread over them cannot be told without weights."""
    for block in moe_blocks(model):
        stub: Any = block.module if block.calls_modules else block.experts
        stub.forward = _handed_on


def _handed_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@torch.no_grad()
def _cached(model: Any, length: int) -> list[tuple[list[Tensor], int | None]]:
    """The tensors of each layer's cache after so many tokens, and its window."""
    with torch.device("meta"):
        ids = torch.zeros(1, length, dtype=torch.int64)
        output = decoder_of(model)(input_ids=ids, use_cache=True)
    cache = output["cache"] if "cache" in output else output["past_key_values"]  # older versions have one name alone
    found = [(list(_tensors(layer)), getattr(layer, "sliding_window", None)) for layer in cache.layers]
    if not any(tensors for tensors, _ in found):
        raise ValueError("nothing is kept")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that a layer of a cache holds, and what it is made of."""
    if isinstance(value, Tensor):
        if value.ndim:  # else it counts
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        yield from _tensors(vars(value))


def _usual(config: ModelConfig, num_tokens: int) -> int:
    """What ordinary attention keeps: keys and values of each head that has its own, in every layer."""
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * text.num_hidden_layers * heads * width * num_tokens
