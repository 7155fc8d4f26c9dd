# SPDX-License-Identifier: Apache-2.0
"""How many parameters and bytes a model in memory has, those of each routed expert apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..architectures.structure import part
from ..checkpoints.sizes import Size, Sizes, total
from .blocks import MoEBlock, moe_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def sizes_of_model(model: PreTrainedModel) -> Sizes:
    """The sizes of a model in memory."""
    blocks = moe_blocks(model)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    routers = [tensor for block in blocks for tensor in block.router_tensors.values()]
    kept = {id(tensor) for module in ends if module is not None for tensor in module.parameters()}
    kept |= {id(tensor) for tensor in routers}
    return Sizes(
        total(_size(tensor, id(tensor) not in kept) for tensor in model.parameters()),
        {block.layer: _expert(block, kept) for block in blocks},
        {block.layer: block.num_experts for block in blocks},
    )


def _size(tensor: Tensor, quantisable: bool, share: int = 1, of: int = 1) -> Size:
    count = tensor.numel() * share // of
    matrix = tensor.ndim >= 2 and min(tensor.shape[-2:]) > 1
    return Size(count, count if matrix and quantisable else 0, count * tensor.element_size())


def _expert(block: MoEBlock, kept: set[int]) -> Size:
    """One expert of a block: its own tensors, or its rows of those of all."""
    experts: Any = block.experts
    size = total(_size(t, id(t) not in kept) for t in experts[0].parameters()) if block.structure.numbered else Size()
    for path, axis in block.structure.tensors.items():
        tensor = part(block.decoder_layer, path)
        size += _size(tensor, id(tensor) not in kept, axis.each, tensor.shape[axis.axis])
    return size
