# SPDX-License-Identifier: Apache-2.0
"""Sums of experts' outputs over the tokens routed to them, for the samples of one batch.

Shapes: B samples of the batch, E experts, n tokens, K top_k, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES_AT_ONCE = 32 * 2**20  # of outputs that are widened


class OutputSums:
    """Adds up outputs in float64, whatever precision they come in.

    Args:
        num_samples: B.
        num_experts: E.
        hidden_size: H.
    """

    def __init__(self, num_samples: int, num_experts: int, hidden_size: int) -> None:
        self._shape = num_samples, num_experts + 1, hidden_size
        self._sums: Tensor | None = None

    def add(self, outputs: Tensor, slots: Tensor) -> None:
        """Add outputs of chosen experts.

        Args:
            outputs: ``(n, K, H)``, without the experts' weights.
            slots: Whose they are ``(n, K)``: sample times ``E + 1`` plus the expert; what is no expert's has the last
                slot of its sample.
        """
        device = torch.device("cpu") if outputs.device.type == "mps" else outputs.device  # which lacks float64
        if self._sums is None:
            samples, experts, size = self._shape
            self._sums = torch.zeros(samples * experts, size, dtype=torch.float64, device=device)
        rows = max(1, _BYTES_AT_ONCE // (8 * self._shape[2]))
        parts = zip(outputs.flatten(0, 1).split(rows), slots.flatten().split(rows), strict=True)
        for values, where in parts:
            self._sums.index_add_(0, where.to(device), values.to(device).double())

    def by_sample(self) -> Tensor:
        """The sums ``(B, E, H)`` float32."""
        samples, experts, size = self._shape
        assert self._sums is not None
        return self._sums.view(samples, experts, size)[:, : experts - 1].float()
