# SPDX-License-Identifier: Apache-2.0
"""A budget spread over the layers by measured divergences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..errors import RequestError
from ..methods.budget import Budget
from ..methods.selection import Selection
from .sensitivity import ALL, Divergence, MethodSensitivity


def allocate(
    measured: MethodSensitivity, budget: Budget, domain_weights: Mapping[str, float] | None = None
) -> Selection:
    """The measured sets, one for each layer, whose divergences have the least sum under a budget.

    Exact, by dynamic programming over the layers: ``L`` layers, ``C`` numbers of experts measured in each and a budget
    of ``B`` experts take ``O(L B C)``. Ties go to more experts.

    Args:
        measured: Of the method. A layer may also keep all its experts, at no loss.
        budget: The most experts to retain in all layers together, and the fewest in each.
        domain_weights: A share for each domain; by default every token counts once.

    Returns:
        The retained experts of each layer of the budget. Their number may be below the budget where the numbers
        measured do not add up to it; a note says so. The findings have the sum.

    Raises:
        RequestError: If the sensitivity lacks a layer, or no numbers measured fit the budget.
    """
    least = np.full(budget.total + 1, np.inf)  # the least sum that so many experts can have
    least[0] = 0
    taken: dict[int, np.ndarray] = {}
    for layer, original in budget.original.items():
        entry = measured.layers.get(layer)
        if entry is None or entry.original_num_experts != original:
            raise RequestError(f"the sensitivity says nothing of layer {layer} with its {original} experts.")
        allowed = set(budget.allowed(layer)) - {original}
        cost = {count: _cost(kl, domain_weights) for count, kl in entry.kl.items() if count in allowed}
        cost[original] = 0.0
        before, least = least, np.full_like(least, np.inf)
        taken[layer] = np.zeros(len(least), dtype=np.int64)
        for count in sorted(cost, reverse=True):
            if count <= budget.total:
                sums = before[: len(before) - count] + cost[count]
                better = sums < least[count:]
                least[count:][better] = sums[better]
                taken[layer][count:][better] = count
    if not np.isfinite(least).any():
        raise RequestError(
            f"the budget keeps {budget.total} experts, fewer than the smallest numbers measured add up to; measure "
            "smaller ones (--counts)."
        )
    left = total = int(np.flatnonzero(least == least.min())[-1])
    retained = {}
    for layer in reversed(budget.original):
        count = int(taken[layer][left])
        everything = tuple(range(budget.original[layer]))
        retained[layer] = measured.layers[layer].retained[count] if count < len(everything) else everything
        left -= count
    note = (
        f"{total} experts are retained, {budget.total - total} fewer than the budget allows: the numbers measured do "
        "not add up to it, or more would not help"
    )
    return Selection(
        dict(sorted(retained.items())),
        notes=(note,) if total < budget.total else (),
        findings={"sum of divergences": round(float(least[total]), 6)},
    )


def _cost(kl: Divergence, domain_weights: Mapping[str, float] | None) -> float:
    if domain_weights is None:
        return kl[ALL]
    try:
        return sum(weight * kl[domain] for domain, weight in domain_weights.items()) / sum(domain_weights.values())
    except KeyError as error:
        raise RequestError(f"the sensitivity was not measured on domain {error.args[0]!r}.") from error
