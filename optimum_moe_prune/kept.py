# SPDX-License-Identifier: Apache-2.0
"""Which tokens statistics per token are kept for: the same ones for any batch size, order or number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .stats import Sample


def keep_tokens(samples: Sequence[Sample], max_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens that are kept: all of them, or the ``max_tokens`` with the lowest hash.

    Args:
        samples: The samples, in their final order.
        max_tokens: The most tokens to keep.
        seed: Another seed keeps others.

    Returns:
        Sample and position of each kept token, both ``(N,)`` int64, in the order of samples and positions.
    """
    sample = np.concatenate(
        [np.full(s.num_tokens, i, dtype=np.int64) for i, s in enumerate(samples)] or [np.zeros(0, int)]
    )
    position = np.concatenate([np.arange(s.num_tokens, dtype=np.int64) for s in samples] or [np.zeros(0, int)])
    if len(sample) > max_tokens:
        of_sample = np.array([int(s.hash[:16], 16) for s in samples], dtype=np.uint64)
        key = _mix(_mix(of_sample + np.uint64(seed % 2**64))[sample] + position.astype(np.uint64))
        kept = np.sort(np.argsort(key, kind="stable")[:max_tokens])
        sample, position = sample[kept], position[kept]
    return torch.from_numpy(sample.astype(np.int64)), torch.from_numpy(position.astype(np.int64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64): an even, reproducible hash."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
