# SPDX-License-Identifier: Apache-2.0
"""Float32 copies of what is trained, and how they are changed by gradients (Adam)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .trained import EXPERTS, Trained

_BETAS = (0.9, 0.95)
_EPSILON = 1e-8  # beside the root mean square of gradients, whose scale falls away
_TINY = 1e-12
KINDS = VALUE, _MEAN, _SQUARE = "value", "mean", "square"
"""What is kept of each between two steps."""
NARROW_WIDTH = 128
"""Up to which matrices change at the rate that is asked for."""
RANK = 16
"""Of the change of a down projection where any change does not fit in memory."""
BYTES = 4 * 4
"""Of each number that is trained: itself in float32, its gradient, and two moments of it."""


class Master:
    """A parameter in float32 while it is trained: as a whole, or as what it was and a change of low rank.

    Args:
        trained: Which parameter.
        start: As it is in the model; kept where the change is of low rank.
        rate: Its largest change in a step, relative to the root mean square of its numbers, of a narrow matrix: the
            changes of a wide one add up over its width, while its numbers are smaller by the root of that only.
        rank: Of the change; 0 for any.
        seed: Of what a change of low rank starts with.
        changes: Whether it will be changed, and not only calculated with.
        stored: The dtype that it will be stored in, where that is another than it has in the model.
    """

    def __init__(
        self,
        trained: Trained,
        start: Tensor,
        rate: float,
        rank: int = 0,
        seed: int = 0,
        changes: bool = True,
        stored: torch.dtype | None = None,
    ) -> None:
        self.trained = trained
        self.dtype = start.dtype
        self._stored = stored or start.dtype
        self.rank = rank_of(trained, start.shape, rank)
        whole = start.detach().float()
        rate *= min(1.0, math.sqrt(NARROW_WIDTH / trained.width))
        scale = rate * max(float((whole + trained.centre).square().mean().sqrt()), _TINY)
        if self.rank:
            self._start: Tensor | None = start.detach()
            left, right = leaf_shapes(trained, start.shape, rank)
            drawn = torch.randn(right, generator=torch.Generator().manual_seed(seed)) / math.sqrt(self.rank)
            leaves = [start.new_zeros(left, dtype=torch.float32), drawn.to(start.device)]
            self.rates = [scale, rate / math.sqrt(self.rank)]
        else:
            self._start = None
            leaves, self.rates = [whole.clone()], [scale]
        self.leaves = [leaf.requires_grad_() for leaf in leaves]
        self.is_reached = False  # by a gradient
        self.moments = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) if changes else () for leaf in leaves]

    def value(self) -> Tensor:
        """The parameter in float32; gradients flow to what is trained."""
        if self._start is None:
            return self.leaves[0]
        return self._start.float() + self.leaves[0] @ self.leaves[1]

    def rounded(self) -> Tensor:
        """The parameter as it will be stored."""
        with torch.no_grad():
            return self.value().to(self._stored, copy=True)

    def step(self, number: int, pace: float) -> None:
        """Change it by the gradients that have gathered, which are gone then.

        Args:
            number: Steps before this one.
            pace: The share of its rate.
        """
        for leaf, moments, rate in zip(self.leaves, self.moments, self.rates, strict=True):
            if leaf.grad is None:
                continue
            self.is_reached = True
            if self.trained.rows is not None:
                leaf.grad[self.trained.rows :] = 0
            adam(leaf, leaf.grad, moments, number, rate * pace)
            leaf.grad = None

    def drop(self) -> None:
        """Drop the gradients that have gathered."""
        for leaf in self.leaves:
            leaf.grad = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that has to be kept between two steps, by name."""
        found: dict[str, Tensor] = {}
        for number, (leaf, moments) in enumerate(zip(self.leaves, self.moments, strict=True)):
            for kind, tensor in zip(KINDS, (leaf.detach(), *moments), strict=False):
                found[kept_name(self.trained, number, kind)] = tensor
        return found

    def set(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what was kept (:attr:`tensors`)."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])


def adam(value: Tensor, gradient: Tensor, moments: Sequence[Tensor], number: int, rate: float) -> None:
    """One step of Adam, in place; ``number`` steps were done before."""
    mean, square = moments
    with torch.no_grad():
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.lerp_(gradient.square(), 1 - _BETAS[1])
        size = (square / (1 - _BETAS[1] ** (number + 1))).sqrt_()
        least = _EPSILON * float(size.max()) + torch.finfo(torch.float32).tiny
        value.addcdiv_(mean, size.add_(least), value=-rate / (1 - _BETAS[0] ** (number + 1)))


def rank_of(trained: Trained, shape: Sequence[int], rank: int) -> int:
    """The rank of a parameter's change; 0 where that saves nothing, or it is no down projection."""
    if trained.role != EXPERTS or len(shape) < 2 or not rank:
        return 0
    out, into = shape[-2:]
    return rank if rank * (out + into) < out * into else 0


def leaf_shapes(trained: Trained, shape: Sequence[int], rank: int) -> list[tuple[int, ...]]:
    """The shapes of what is trained of a parameter: itself, or the two factors of its change."""
    if not (rank := rank_of(trained, shape, rank)):
        return [tuple(shape)]
    *stacked, out, into = shape
    return [(*stacked, out, rank), (*stacked, rank, into)]


def kept_name(trained: Trained, leaf: int, kind: str) -> str:
    """The name of a tensor that is kept between two steps."""
    return f"{trained.name}|{leaf}|{kind}"


def reached(trained: Sequence[Trained], kept: Mapping[str, Tensor]) -> set[str]:
    """The roles that gradients reached, by the moments that these left in what is kept between two steps."""
    found: set[str] = set()
    for one in trained:
        if one.role not in found and bool(kept[kept_name(one, 0, _SQUARE)].any()):
            found.add(one.role)
    return found
