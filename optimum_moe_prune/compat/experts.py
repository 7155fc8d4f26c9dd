# SPDX-License-Identifier: Apache-2.0
"""The product that transformers' own experts are made of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows multiplied by the matrix of their expert, by whichever kernel transformers takes for it.

    Why: which kernel that is, is decided by versions and devices in a private function (``_grouped_mm``, transformers
    5.14 to 5.24). Where it is gone, the rows of one expert after another are multiplied.

    Args:
        x: Rows ``(S, H)``, those of one expert together.
        weight: The experts' matrices ``(E, H, I)``.
        ends: Where the rows of each expert end ``(E,)`` int32.
    """
    try:
        from transformers.integrations.moe import _grouped_mm
    except ImportError:
        parts = zip(x.tensor_split(ends[:-1].tolist()), weight, strict=True)
        return torch.cat([rows @ matrix for rows, matrix in parts])
    return _grouped_mm(x, weight, ends)


def run_plainly(experts: nn.Module) -> None:
    """Have a module of experts run its own forward, whatever implementation its model was loaded with.

    Why: others sort the rows that go through an expert, and not stably (``torch.sort`` in transformers 5.14 to 5.24),
    so that what is seen inside them is of nobody knows which token. Which one runs is read from the config that the
    module holds, a value that is not public.

    Args:
        experts: A module that nobody else uses; its config is replaced by a copy.
    """
    config: Any = getattr(experts, "config", None)
    if hasattr(config, "_experts_implementation_internal"):
        own = copy.copy(config)
        own._experts_implementation_internal = "eager"  # not by its setter, which reaches parts of the config as well
        experts.config = own
