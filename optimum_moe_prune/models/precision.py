# SPDX-License-Identifier: Apache-2.0
"""The precision to calculate in: that of the weights, or float32 where a processor multiplies that far faster.

A processor without units for bfloat16 or float16 takes many times as long for a product in it. Which one has them is
no matter of names (of libraries, of settings, of what a virtual machine hands on): products of the kinds that models
are made of are timed, once in a process. On other devices than processors the weights' own precision is taken.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..compat.experts import grouped_product
from ..names import AUTO, dtype_text
from ..progress import say

NARROW = (torch.bfloat16, torch.float16)
"""What may be calculated in float32 instead."""

_MARGIN = 2.5  # times as slow: with units for the precision it is less than 1.8, without them more than 3.7
_REPEATS = 4
_ROWS, _WIDTH = 128, 512  # of a plain product
_EXPERTS, _EXPERT_WIDTH = 8, 256  # of a grouped one of as many rows

Times = Mapping[str, float]
"""Seconds by kind of product."""


def computing_dtype(weights: torch.dtype, device: torch.device | str, asked: str = AUTO) -> torch.dtype:
    """The precision to calculate in with weights of a precision.

    Args:
        weights: The precision of the weights.
        device: Where they are.
        asked: What was asked for by name; ``"auto"`` leaves it to the device.
    """
    if asked != AUTO:
        return getattr(torch, asked)
    if weights not in NARROW or torch.device(device).type != "cpu":
        return weights
    if not is_slow(slowness(weights)):
        return weights
    _say(weights, torch.float32)
    return torch.float32


def dtype_of_weights(model: nn.Module) -> torch.dtype:
    """The precision of most of a model's numbers."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


@functools.cache
def slowness(dtype: torch.dtype) -> float:
    """How many times as long this processor takes for products in a precision as in float32; measured once."""
    return ratio(*measured(dtype))


def ratio(narrow: Times, wide: Times) -> float:
    """How many times as long a model takes that is made of such products, as many of each kind."""
    return sum(narrow.values()) / sum(wide.values())


def is_slow(times: float) -> bool:
    """Whether so many times as long is worth widening every weight where it is used."""
    return times >= _MARGIN


def measured(dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> tuple[Times, Times]:
    """The least of several times of each kind of product in a precision and, in turn with it, in float32."""
    works = [_products(dtype), _products(torch.float32)]
    least: list[dict[str, float]] = [{}, {}]
    for repeat in range(_REPEATS + 1):
        for kind in works[0]:
            for work, times in zip(works, least, strict=True):
                began = clock()
                work[kind]()
                taken = clock() - began
                if repeat:  # the first chooses kernels
                    times[kind] = min(taken, times.get(kind, taken))
    return least[0], least[1]


def _products(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A layer's product with some tokens, and the experts' one, with their share of the tokens each."""
    x, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    rows = torch.ones(_ROWS, _EXPERT_WIDTH, dtype=dtype)
    experts = torch.ones(_EXPERTS, _EXPERT_WIDTH, _EXPERT_WIDTH, dtype=dtype)
    ends = torch.arange(1, _EXPERTS + 1, dtype=torch.int32) * (_ROWS // _EXPERTS)
    return {
        "plain": lambda: nn.functional.linear(x, weight),
        "grouped": lambda: grouped_product(rows, experts, ends),
    }


@functools.cache
def _say(weights: torch.dtype, computing: torch.dtype) -> None:
    """Say, once in a process, that another precision is calculated in than the weights have."""
    narrow, wide = dtype_text(weights), dtype_text(computing)
    times = f"{slowness(weights):.0f} times as fast as {narrow}"
    say(f"computing in {wide} from {narrow} weights: this processor multiplies {wide} {times}")
