# SPDX-License-Identifier: Apache-2.0
"""How a layer takes what its experts give: added to its hidden states as it is, by a share of it, or otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.experts import ExpertsForward
from ..models.layerwise import LayerByLayer

_TRIED = 32  # tokens on which it is tried
_ROUNDING = 0.02  # of what is added, that may be lost to rounding


def added_share(runner: LayerByLayer, block: MoEBlock, batch: Batch, state: Tensor) -> float:
    """The share of what a layer's experts give that is added to its hidden states; 0 where it is not added as it is.

    It is tried out, inside ``running``: on a few tokens with something random more.

    Args:
        runner: The model, with the layer loaded.
        block: Its block.
        batch: A batch.
        state: What goes into the layer of it.
    """
    few = Batch(batch.input_ids[:1, :_TRIED], batch.attention_mask[:1, :_TRIED], batch.samples[:1])
    begin = runner.part_of(state, _TRIED)
    noise: list[Tensor] = []

    def more(own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = own(hidden, ids, weights)
        size = output.float().square().mean().sqrt().clamp(min=1e-6)
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device) * size
        noise.append(drawn.to(output.dtype))
        return output + noise[-1]

    plain = runner.hidden_of(runner.forward(block.layer, few, begin.clone())).float()
    with block.observed(lambda logits: None, more):
        moved = runner.hidden_of(runner.forward(block.layer, few, begin.clone())).float()
    change, given = (moved - plain).flatten(), noise[-1].float().flatten().to(plain.device)
    if len(change) != len(given):
        return 0.0
    share = float(change @ given / (given @ given))
    return share if float((change - share * given).norm()) <= _ROUNDING * abs(share) * float(given.norm()) else 0.0
