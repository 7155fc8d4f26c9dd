# SPDX-License-Identifier: Apache-2.0
"""How large the weights of each expert are, from a checkpoint's files: one tensor is in memory at a time.

Of all matrices of an expert together; biases are left out, and so is what only says how a tensor is to be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures.structure import ExpertAxis
from ..progress import working
from .layout import Layout
from .moe_layer import MoELayer

WeightSizes = dict[str, Tensor]
"""``weight_magnitude`` and ``weight_square``: means of ``|w|`` and ``w^2`` over each expert's weights ``(E,)``."""


@dataclass
class WeightSums:
    """Sums over the weights of each of a layer's experts, which grow matrix by matrix.

    Args:
        num_experts: How many.
    """

    num_experts: int

    def __post_init__(self) -> None:
        self._sums = torch.zeros(2, self.num_experts, dtype=torch.float64)
        self._counts = torch.zeros(self.num_experts, dtype=torch.float64)

    def add(self, expert: int, matrix: Tensor) -> None:
        """Count a matrix of one expert."""
        self._add([expert], [matrix])

    def add_all(self, tensor: Tensor, axis: ExpertAxis) -> None:
        """Count a tensor with a matrix of each expert; one with a vector of each is a bias, and is left out."""
        if tensor.dim() - (axis.each == 1) < 2:
            return
        parts = [tensor.narrow(axis.axis, expert * axis.each, axis.each) for expert in range(self.num_experts)]
        self._add(range(self.num_experts), parts)

    def means(self) -> WeightSizes:
        """By name; 0 for an expert without weights."""
        magnitude, square = self._sums / self._counts.clamp(min=1)
        return {"weight_magnitude": magnitude, "weight_square": square}

    def _add(self, experts: Iterable[int], matrices: list[Tensor]) -> None:
        # Rows in float32, as not every device has float64; there is one transfer for all experts.
        found = [torch.stack([m.abs().sum(-1).sum(), m.square().sum(-1).sum()]) for m in map(_exactly, matrices)]
        for expert, sums, matrix in zip(experts, torch.stack(found).cpu().double(), matrices, strict=True):
            self._sums[:, expert] += sums
            self._counts[expert] += matrix.numel()


def _exactly(matrix: Tensor) -> Tensor:
    matrix = matrix.detach()
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def weight_sizes(layout: Layout) -> dict[int, WeightSizes]:
    """By MoE layer, dequantised where the files are quantised.

    Raises:
        RequestError: If a tensor is quantised in a way that cannot be read.
        RunError: If one holds NaN or infinity.
    """
    with working("reading the experts' weights", len(layout.layers), "layer", "read the experts' weights of") as work:
        return {index: _of_layer(layout, layout.layers[index]) for index in work.over(sorted(layout.layers))}


def _of_layer(layout: Layout, layer: MoELayer) -> WeightSizes:
    sums, plain = WeightSums(layer.num_experts), layout.plain

    def whole(names: Iterable[str]) -> list[str]:
        """The tensors that these are, or only lie beside."""
        return [name for name in dict.fromkeys(plain.owners.get(n, n) for n in names) if name in plain.tensors]

    with layout.checkpoint.reader() as read:
        for expert in range(layer.num_experts):
            for name in whole(layer.experts.get(expert, {}).values()):
                if len(plain.tensors[name].shape) >= 2:
                    sums.add(expert, plain.read(read, name))
        for stored in layer.fused.values():
            for name in whole([stored]):
                if stored == plain.tensors[name].parts["weight"]:
                    sums.add_all(plain.read(read, name), layer.axes[stored])
    return sums.means()
