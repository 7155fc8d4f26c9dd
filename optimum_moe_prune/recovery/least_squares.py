# SPDX-License-Identifier: Apache-2.0
r"""The refit of one layer: a change of down projections by which retained experts stand in for pruned ones.

With :math:`\phi_{te}` what goes into expert e's down projection for token t, times the weight that the pruned router
gives it, and :math:`R_t = F_{all}(x_t) - F_S(x_t)` what the cut took from the layer's output,

.. math:: \Delta W = \arg\min \sum_t \|\sum_e \phi_{te} \Delta W_e - R_t\|^2 + \lambda m \|\Delta W\|^2,

:math:`m` the mean diagonal of the Gram matrix. Experts with up to :data:`MOST_FEATURES` features in all are solved for
together, by Cholesky's decomposition; else in groups, one after another, on what the others leave (Gauss-Seidel). The
ridge :math:`\lambda` of a group is the one of :data:`RIDGES` that leaves the least on tokens that are held back, and
where each leaves more than no change, nothing changes: on these tokens a layer's error never rises.

Sums over tokens are all that is needed of them, so several processes add up theirs.

Shapes: T tokens, G experts of a group, I features of an expert, n = G I, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (0.01, 0.1, 1.0, 10.0)
MOST_FEATURES = 8192
SWEEPS = 2
_EXACT_FEATURES = 2048  # up to so many are solved for in float64


def precision(features: int) -> torch.dtype:
    """What so many features are solved for in."""
    return torch.float64 if features <= _EXACT_FEATURES else torch.float32


@dataclass(frozen=True)
class Sums:
    r"""What a group's solution and its error follow from, in float64 where there are few features.

    Attributes:
        gram: :math:`\sum_t \phi_t \phi_t^T` ``(n, n)``.
        products: :math:`\sum_t \phi_t R_t^T` ``(n, H)``.
        energy: :math:`\sum_t \|R_t\|^2`, of all tokens, of which the group has a part.
    """

    gram: Tensor
    products: Tensor
    energy: Tensor

    @classmethod
    def zeros(cls, features: int, outputs: int, device: torch.device) -> Sums:
        """Of no tokens."""
        dtype = precision(features)
        return cls(
            torch.zeros(features, features, dtype=dtype, device=device),
            torch.zeros(features, outputs, dtype=dtype, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def add(self, phi: Sequence[Tensor], rows: Sequence[Tensor], residual: Tensor) -> None:
        """Add tokens.

        Pairs of experts are multiplied on the tokens that have both: of many experts few are.

        Args:
            phi: Weighted features of each of the group's experts, of its own tokens ``(t_e, I)``.
            rows: Which tokens these are ``(t_e,)``, in rising order.
            residual: Of all tokens ``(T, H)``.
        """
        self.energy.add_(energy_of(residual))
        width = self.gram.shape[0] // max(1, len(phi))
        place = torch.full((len(residual),), -1, dtype=torch.int64, device=residual.device)
        for i, (a, of_a) in enumerate(zip(phi, rows, strict=True)):
            if not len(of_a):
                continue
            own = slice(i * width, (i + 1) * width)
            self.products[own] += a.T @ residual[of_a]
            self.gram[own, own] += a.T @ a
            place.fill_(-1)
            place[of_a] = torch.arange(len(of_a), device=place.device)
            for j in range(i + 1, len(phi)):
                found = place[rows[j]]
                both = (found >= 0).nonzero().flatten()
                if len(both):
                    alike = len(both) == len(of_a) == len(rows[j])  # as where as many are left as a token uses
                    block = a.T @ phi[j] if alike else a[found[both]].T @ phi[j][both]
                    other = slice(j * width, (j + 1) * width)
                    self.gram[own, other] += block
                    self.gram[other, own] += block.T

    def without(self, now: Tensor) -> Sums:
        """The same with residuals that the group's own change ``(n, H)`` so far is no part of."""
        grown = self.gram @ now
        energy = self.energy + (now * (2 * self.products + grown)).sum(dtype=torch.float64)
        return Sums(self.gram, self.products + grown, energy)

    def error(self, change: Tensor) -> float:
        """What a change ``(n, H)`` of the weights leaves of the energy."""
        moved = (change * (self.gram @ change - 2 * self.products)).sum(dtype=torch.float64)
        return float(self.energy + moved)


def energy_of(residual: Tensor) -> Tensor:
    """The sum of squares, ``()`` float64."""
    return torch.linalg.vector_norm(residual, dtype=torch.float64).square()


def added(sums: Sequence[Sums]) -> Sums:
    """The sums of the tokens of all."""
    first = Sums(*(getattr(sums[0], name).clone() for name in ("gram", "products", "energy")))
    for other in sums[1:]:
        for name in ("gram", "products", "energy"):
            getattr(first, name).add_(getattr(other, name))
    return first


def solved(fit: Sums, ridge: float) -> Tensor | None:
    """The change ``(n, H)`` for a ridge; None where the decomposition fails in this precision."""
    matrix = fit.gram.clone()
    matrix.diagonal().add_(ridge * fit.gram.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else torch.cholesky_solve(fit.products, factor)


def best_change(fit: Sums, held_back: Sums, now: Tensor) -> tuple[Tensor, float | None]:
    """The change of a group's weights that leaves the least on tokens held back, and its ridge.

    Args:
        fit: Sums over the tokens to fit to, with residuals that the group's own change so far is no part of.
        held_back: Likewise of the tokens held back.
        now: The change so far ``(n, H)``, which stays where nothing is better; the ridge is None then.
    """
    best, least, chosen = now, held_back.error(now), None
    if not float(fit.gram.diagonal().sum()) > 0:
        return best, chosen
    for ridge in RIDGES:
        change = solved(fit, ridge)
        if change is not None and (error := held_back.error(change)) < least:
            best, least, chosen = change, error, ridge
    return best, chosen


def grouped(count: int, width: int, most: int = MOST_FEATURES) -> list[range]:
    """Experts, by their places, in groups of at most so many features, or of one expert.

    Args:
        count: Experts.
        width: I, features of each.
        most: Of a group.
    """
    size = max(1, most // width)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]
