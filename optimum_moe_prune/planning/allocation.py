# SPDX-License-Identifier: Apache-2.0
"""A budget spread over the layers by measured divergences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_

import numpy as np

from ..errors import RequestError
from ..methods.budget import Budget
from ..methods.limits import nearest
from .sensitivity import ALL, Divergence, MethodSensitivity


@dataclass(frozen=True)
class Allocation:
    """How many experts each layer keeps.

    Attributes:
        num_experts: By layer of the budget; together its total.
        divergence: The sum of the layers' divergences.
        interpolated: The layers whose number was not measured; their divergence lies between measured ones.
    """

    num_experts: dict[int, int]
    divergence: float
    interpolated: tuple[int, ...]


def allocate(
    measured: MethodSensitivity,
    budget: Budget,
    domain_weights: Mapping[str, float] | None = None,
    accepts: Callable[[int, int], bool] | None = None,
) -> Allocation:
    """The numbers of experts whose divergences have the least sum, with exactly the budget's total.

    A number that was not measured costs what lies on the line between its measured neighbours; all experts of a layer
    cost nothing, and below the smallest number measured nothing is known. Exact for these costs, by dynamic
    programming over the layers: ``L`` layers of ``E`` experts and a budget of ``B`` take ``O(L B E)``. Of equal sums
    the one wins that keeps more experts in later layers.

    Args:
        measured: Of the method.
        budget: The experts to retain in all layers together, and what each layer can keep.
        domain_weights: A share for each domain; by default every token counts once.
        accepts: Whether the method can choose for a layer and a number that was not measured; by default for all.

    Raises:
        RequestError: If the sensitivity lacks a layer or domain, or numbers that it speaks of do not add up to the
            budget.
    """
    costs = {layer: costs_of(measured, budget, layer, domain_weights, accepts) for layer in budget.original}
    counts, divergence = spread(costs, budget.total)
    interpolated = tuple(
        layer
        for layer, count in counts.items()
        if count not in measured.layers[layer].kl and count < budget.original[layer]
    )
    return Allocation(counts, divergence, interpolated)


def spread(costs: Mapping[int, Mapping[int, float]], total: int) -> tuple[dict[int, int], float]:
    """The numbers that have the least sum of costs and add up to a total, by layer; and that sum.

    Args:
        costs: Of each number that a layer can keep.
        total: What they add up to.

    Raises:
        RequestError: If none do.
    """
    least = np.full(total + 1, np.inf)  # the least sum that so many experts of the layers so far can have
    least[0] = 0.0
    taken: dict[int, np.ndarray] = {}
    for layer in costs:
        before, least = least, np.full_like(least, np.inf)
        taken[layer] = np.zeros(len(least), dtype=np.int32)
        for count, cost in sorted(costs[layer].items(), reverse=True):
            if count <= total:
                sums = before[: len(before) - count] + cost
                better = sums < least[count:]
                least[count:][better] = sums[better]
                taken[layer][count:][better] = count
    if not np.isfinite(least[-1]):
        raise _not_met(total, costs)
    left, counts = total, {}
    for layer in reversed([*costs]):
        counts[layer] = int(taken[layer][left])
        left -= counts[layer]
    return dict(sorted(counts.items())), float(least[-1])


def _not_met(total: int, costs: Mapping[int, Mapping[int, float]]) -> RequestError:
    """What is wrong with a total that no numbers of the layers add up to, and the nearest ones that some do."""
    sums = 1  # bit n: some numbers of the layers so far add up to n
    for possible in costs.values():
        sums = reduce(or_, (sums << count for count in possible))
    totals = [n for n in range(sums.bit_length()) if sums >> n & 1]
    if total < totals[0]:
        return RequestError(
            f"the budget keeps {total} experts, fewer than the smallest numbers measured add up to ({totals[0]}); "
            "measure smaller ones (counts), or keep more."
        )
    return RequestError(
        f"the budget keeps {total} experts, and the numbers that layers can keep do not add up to it; ask for a total "
        f"of {nearest(totals, total)}."
    )


def costs_of(
    measured: MethodSensitivity,
    budget: Budget,
    layer: int,
    domain_weights: Mapping[str, float] | None,
    accepts: Callable[[int, int], bool] | None,
) -> dict[int, float]:
    """The divergence of a layer for each number of experts it can keep, as far as measuring went."""
    entry, original = measured.layers.get(layer), budget.original[layer]
    if entry is None or entry.original_num_experts != original:
        raise RequestError(f"the sensitivity says nothing of layer {layer} with its {original} experts.")
    known = {count: cost_of(kl, domain_weights) for count, kl in sorted(entry.kl.items()) if count < original}
    known[original] = 0.0
    counts = [
        count
        for count in budget.allowed(layer)
        if count in known or (count > min(known) and (accepts is None or accepts(layer, count)))
    ]
    return dict(zip(counts, np.interp(counts, list(known), list(known.values())).tolist(), strict=True))


def cost_of(kl: Divergence, domain_weights: Mapping[str, float] | None) -> float:
    """A divergence as one number.

    Raises:
        RequestError: If a domain with a share was not measured.
    """
    if domain_weights is None:
        return kl[ALL]
    try:
        return sum(weight * kl[domain] for domain, weight in domain_weights.items()) / sum(domain_weights.values())
    except KeyError as error:
        raise RequestError(f"the sensitivity was not measured on domain {error.args[0]!r}.") from error
