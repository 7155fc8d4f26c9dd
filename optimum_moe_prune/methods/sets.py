# SPDX-License-Identifier: Apache-2.0
"""The sets of experts that a layer can be left with: how many there are, and one after the other.

Where a router has groups, a set holds as many experts of each; so sets are counted and made group by group, and none
is made that would have to be thrown away.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Iterator

from ..architectures.routers import RoutingRule

RetainedSet = tuple[int, ...]


def num_sets(rule: RoutingRule, num_experts: int, size: int, required: Collection[int] = ()) -> int:
    """The number of :func:`sets_of`."""
    parts = _parts(rule, num_experts, size, required)
    return math.prod(math.comb(len(free), more) if more >= 0 else 0 for _, free, more in parts)


def sets_of(rule: RoutingRule, num_experts: int, size: int, required: Collection[int] = ()) -> Iterator[RetainedSet]:
    """The sets of ``size`` experts of a layer that hold some, in lexicographic order.

    Args:
        rule: How the router chooses.
        num_experts: Of the layer.
        size: Of a set.
        required: What each set holds.
    """
    first, *others = itertools.starmap(_of_group, _parts(rule, num_experts, size, required))
    # itertools.product would hold all sets of the first group in memory, and there may be no other group.
    return functools.reduce(_joined, map(list, others), first)


def differing(sets: Iterable[Collection[int]]) -> RetainedSet:
    """The experts that some of several sets hold and others do not."""
    first, *others = map(set, sets)
    return tuple(sorted(first.union(*others) - first.intersection(*others)))


def _of_group(fixed: RetainedSet, free: list[int], more: int) -> Iterator[RetainedSet]:
    return (tuple(sorted(fixed + chosen)) for chosen in (itertools.combinations(free, more) if more >= 0 else ()))


def _joined(sets: Iterator[RetainedSet], of_next_group: list[RetainedSet]) -> Iterator[RetainedSet]:
    return (some + others for some in sets for others in of_next_group)


def _parts(
    rule: RoutingRule, num_experts: int, size: int, required: Collection[int]
) -> Iterator[tuple[RetainedSet, list[int], int]]:
    """Of each group of experts: those required, the others, and how many of these are in a set."""
    each = size // rule.groups if rule.groups == 1 or rule.allows(size) else -1
    for members in rule.grouped(range(num_experts), num_experts):
        fixed = tuple(expert for expert in members if expert in required)
        yield fixed, [expert for expert in members if expert not in required], each - len(fixed)
