# SPDX-License-Identifier: Apache-2.0
"""Parts of the exhaustive search over retained sets: which sets lead, and tables of ranks that all sets share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .replay import first_minimum
from .selection import TIE
from .sets import RetainedSet


@dataclass(frozen=True)
class Found:
    """The answer of a search.

    Attributes:
        retained: The set.
        tied: Experts that it could exchange for others, or others for them, at no loss: only their numbers decided.
    """

    retained: RetainedSet
    tied: tuple[int, ...] = ()


class Leaders:
    """The sets with the least loss of all that come by, in lexicographic order, some at a time.

    Attributes:
        in_some, in_all: The experts that some, and that all, of the sets with the least loss hold.
        first: Loss and set of those that can still be the winner; at the end the first of them is.
        smallest: Loss and set of the ``count`` smallest, of equal losses the first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.least = math.inf
        self.first: list[tuple[float, RetainedSet]] = []
        self.smallest: list[tuple[float, RetainedSet]] = []
        self.in_some: set[int] = set()
        self.in_all: set[int] = set()

    def add(self, sets: Sequence[RetainedSet], losses: Tensor) -> None:
        """Look at more sets, all of them after those before."""
        first_minimum(losses)  # raises where they are no numbers
        before_these, self.least = self.least, min(self.least, losses.min().item())
        bound = self.least + TIE * abs(self.least)
        # The winner is the first within the bound. The bound may yet fall, but never to let in a set that is no better
        # than one before it.
        within = (losses <= bound).nonzero().flatten()
        equals = [set(sets[i]) for i in within.tolist()]
        if before_these > bound:
            self.in_some, self.in_all = set(), equals[0]
        self.in_some, self.in_all = self.in_some.union(*equals), self.in_all.intersection(*equals)
        before = torch.cat([torch.tensor([math.inf], dtype=torch.float64), losses[within].cummin(0).values])[:-1]
        for i in within[losses[within] < before].tolist():
            if not self.first or losses[i] < self.first[-1][0]:
                self.first.append((losses[i].item(), sets[i]))
        self.first = [entry for entry in self.first if entry[0] <= bound]
        if self.count:
            smallest = torch.sort(losses, stable=True).indices[: self.count].tolist()
            self.smallest += [(losses[i].item(), sets[i]) for i in smallest]
            self.smallest = sorted(self.smallest, key=lambda entry: entry[0])[: self.count]

    @property
    def tied(self) -> tuple[int, ...]:
        """The experts that some of the sets with the least loss hold and others do not."""
        return tuple(sorted(self.in_some - self.in_all))


@functools.lru_cache(maxsize=1)
def rank_tables(window: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """For the subsets of ``top_k`` of ``window`` ranks, best ranks first, U of them.

    Returns:
        For every bit mask over the ranks (best = highest bit) the number of the subset of its highest bits
        ``(2^window,)``; membership of ranks in subsets ``(U, window)``; and of unordered pairs of ranks, those of two
        different ranks counted twice, ``(U, window (window + 1) / 2)``.
    """
    used = torch.tensor(list(itertools.combinations(range(window), top_k)))
    left = torch.arange(2**window)
    highest_bits = torch.zeros_like(left)
    for _ in range(top_k):
        bit = torch.where(left > 0, 2 ** torch.log2(left.clamp(min=1).double()).floor().long(), 0)
        highest_bits += bit
        left -= bit
    number = torch.zeros_like(left)
    number[(2 ** (window - 1 - used)).sum(1)] = torch.arange(len(used))
    subsets = torch.zeros(len(used), window, dtype=torch.float64).scatter_(1, used, 1.0)
    rows, columns = torch.triu_indices(window, window)
    pairs = subsets[:, rows] * subsets[:, columns] * torch.where(rows == columns, 1.0, 2.0)
    return number[highest_bits], subsets, pairs
