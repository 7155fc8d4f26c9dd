# SPDX-License-Identifier: Apache-2.0
"""How evenly a router spreads its weight over the experts of each layer, and when that goes wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.experts import ExpertsForward, StandIn
from ..models.transfers import sent

_MOST = 0.5  # of a layer's routing weight, that one expert may come to have
_GROWTH = 1.1  # where it had about that much before


class Shares:
    """The share of the routing weight that the experts of each layer have, on some text.

    Attributes:
        before: The largest by layer, as it was first.
        kept: The same of the state that was kept last.
    """

    def __init__(self) -> None:
        self.before: dict[int, float] = {}
        self.kept: dict[int, float] = {}
        self._now: dict[int, float] = {}
        self._sums: dict[int, Tensor] = {}
        self._real: Tensor | None = None

    @contextlib.contextmanager
    def counting(self, block: MoEBlock) -> Iterator[None]:
        """Count what runs through a block inside a ``with``; :meth:`of` says which tokens are real."""
        with block.observed(lambda logits: None, self._counter(block.layer, block.num_experts)):
            yield

    def of(self, batch: Batch) -> None:
        """What runs next."""
        self._real = batch.attention_mask.flatten().bool()

    def end(self) -> dict[int, float]:
        """All that there is was counted once: the largest share of each layer."""
        found = {layer: float(sums.max() / sums.sum()) for layer, sums in self._sums.items()}
        self._sums = {}
        return found

    def take(self, found: dict[int, float]) -> str | None:
        """Take in the largest share of each layer; the first are those that others are compared with.

        Returns:
            A sentence where an expert has come to have too much.
        """
        self._now = found
        if not self.before:
            self.before = self.kept = found
        for layer, share in found.items():
            if share > max(_MOST, _GROWTH * self.before[layer]):
                return (
                    f"it was stopped where one expert of layer {layer} had {share:.0%} of the routing weight "
                    f"({self.before[layer]:.0%} before); what was best before is kept"
                )
        return None

    def keep(self) -> None:
        """The state that was taken in last is the one to be kept."""
        self.kept = self._now

    @property
    def changes(self) -> Mapping[int, tuple[float, float]]:
        """The largest share of each layer, before and as it was kept."""
        return {layer: (share, self.kept[layer]) for layer, share in self.before.items()}

    def _counter(self, layer: int, count: int) -> StandIn:
        def forward(experts: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            flat, own = ids.flatten(), weights.detach().double().abs()
            if self._real is not None and len(self._real) == len(ids):
                own = own * sent(self._real, own.device)[:, None]
            sums = torch.zeros(count + 1, dtype=torch.float64, device=own.device)
            sums = sums.index_add_(0, flat.clamp(max=count), own.flatten())[:count].cpu()  # some go to no expert
            self._sums[layer] = self._sums.get(layer, 0) + sums
            return experts(hidden, ids, weights)

        return forward
