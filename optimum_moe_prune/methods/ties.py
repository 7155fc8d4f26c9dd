# SPDX-License-Identifier: Apache-2.0
"""Ties: where nothing but their numbers decided between experts that are retained and experts that are pruned.

Experts are *tied* if a method prefers none of them and keeps some: numbered otherwise, it would keep others. Methods
that compare numbers find ties by :func:`tied_by_keys`; those that compare sets, by the sets that are equally good
(``sets.differing``); and where a choice goes through many comparisons, it is made again with the experts numbered
otherwise (``mosaic``).

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .budget import Budget, UniformBudget
from .selection import TIE, Retained, Ties


def tied_by_keys(keys: Mapping[int, Sequence[Any]], budget: Budget, retained: Retained) -> Ties:
    """The tied experts of each layer in which there are any, of a choice by sort keys (``budget.choose_ranked``).

    Args:
        keys: For each layer of the budget a key per expert, a number or numbers, lowest = keep first.
        budget: What was kept to. Experts that it protects are never tied.
        retained: What was chosen, by layer.
    """
    found = {layer: tied_in_layer(keys[layer], budget, layer, retained[layer]) for layer in budget.original}
    if not isinstance(budget, UniformBudget):
        for layer, experts in _tied_between_layers(keys, budget, retained):
            found[layer] |= set(experts)
    return sorted_ties(found)


def tied_in_layer(
    key: Sequence[Any], budget: Budget, layer: int, retained: Collection[int], first: Collection[int] | None = None
) -> set[int]:
    """Experts of a layer whose keys are equal though some of them are retained and others not.

    Args:
        key: Of each expert.
        budget: Knows which experts are protected, and the router's groups, of which each is chosen from by itself.
        layer: The layer.
        retained: What was chosen.
        first: Those that are retained whatever their keys; by default the protected ones.
    """
    fixed, kept = set(budget.protected[layer] if first is None else first), set(retained)
    tied: set[int] = set()
    for group in budget.rule.grouped(range(len(key)), len(key)):
        order = sorted((expert for expert in group if expert not in fixed), key=lambda expert: key[expert])
        for run in _runs(order, key):
            if set(run) & kept and set(run) - kept:
                tied |= set(run)
    return tied


def still_tied(experts: Collection[int], retained: Collection[int]) -> set[int]:
    """Experts tied in a first step of a choice, where some of them are retained in the end and others are not."""
    some = set(experts)
    return some if some & set(retained) and some - set(retained) else set()


def sorted_ties(found: Mapping[int, Collection[int]]) -> Ties:
    """Ties as a selection has them, of the layers where there are any."""
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(found.items()) if experts}


def alike(a: Any, b: Any) -> bool:
    """Whether two sort keys are equal but for rounding."""
    if isinstance(a, (tuple, list)):
        return all(map(alike, a, b))
    return math.isclose(a, b, rel_tol=TIE)


def _runs(order: Sequence[int], key: Sequence[Any]) -> Iterator[list[int]]:
    """Experts in the order of their keys, cut where these differ."""
    start = 0
    for end, (one, other) in enumerate(pairwise(order), 1):
        if not alike(key[one], key[other]):
            yield list(order[start:end])
            start = end
    yield list(order[start:])


def _tied_between_layers(
    keys: Mapping[int, Sequence[Any]], budget: Budget, retained: Retained
) -> Iterator[tuple[int, list[int]]]:
    """Of a budget for the whole model: the experts of steps that are as good as the best one that was not taken."""
    taken: list[tuple[Any, int, list[int]]] = []
    left: list[tuple[Any, int, list[int]]] = []
    for layer in budget.original:
        experts = budget.order(layer, keys[layer])
        for low, high in pairwise(budget.allowed(layer)):
            step = experts[low:high]
            worth = np.sum([keys[layer][expert] for expert in step], axis=0).tolist()
            (left if high > len(retained[layer]) else taken).append((worth, layer, step))
    if not left or not taken:
        return
    bar = min(left)[0]
    equal = [[(layer, step) for worth, layer, step in steps if alike(worth, bar)] for steps in (taken, left)]
    if all(equal):
        yield from (entry for steps in equal for entry in steps)
