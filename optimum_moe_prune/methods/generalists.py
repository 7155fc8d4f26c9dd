# SPDX-License-Identifier: Apache-2.0
r"""Generalists: the experts with which alone the layer's output changes least, the first step of Mosaic Pruning.

A set of :math:`m` generalists is the one with the least reconstruction loss, searched as in ``enumeration``. The loss
of one expert alone is a sum of what the calibration gathers anyway for each kept token, its single-expert error
:math:`\|F_{\{e\}}(x_t) - F_{all}(x_t)\|^2`:

.. math:: L_{recon}(\{e\}) = \sum_s w_s \sqrt{\sum_{t \in s} \|F_{\{e\}}(x_t) - F_{all}(x_t)\|^2},

so one generalist needs no Gram matrices, however many experts there are, and none is left out of the search. Where a
router has groups, one expert alone is no layer, but its error is what it is: one generalist stays one. Beside experts
that do nothing (``RoutingRule.fixed``), which stay in every layer, *alone* means without these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..statistics.needs import Need
from .budget import UniformBudget
from .enumeration import SearchOptions, search_notes, search_set
from .limits import allowed_counts
from .sets import differing

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics.stats import LayerStats
    from .replay_leaders import Found


@dataclass(frozen=True)
class GeneralistOptions(SearchOptions):
    """Options of methods that begin with generalists; ``search`` and ``max_sets`` as in ``enumeration``.

    Attributes:
        num_generalists: Experts chosen for the least reconstruction error, at most as many as are retained.
    """

    num_generalists: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generalists < 0:
            raise ValueError(f"num_generalists is {self.num_generalists}; it cannot be negative.")

    @property
    def is_one_alone(self) -> bool:
        """Whether one generalist is looked for by the error of each expert alone; elimination goes through sets."""
        return self.num_generalists == 1 and self.search != "greedy"


def generalist_needs(options: GeneralistOptions) -> frozenset[Need]:
    """What the search for generalists reads; ``GRAM`` only where it looks at sets of several experts."""
    if not options.num_generalists:
        return frozenset()
    return frozenset({Need.SINGLE_ERROR}) if options.is_one_alone else frozenset({Need.ROUTING, Need.GRAM})


def check(budget: UniformBudget, options: GeneralistOptions) -> None:
    """Refuse more generalists than a layer keeps experts.

    Raises:
        RequestError: Naming the layer.
    """
    for index, count in budget.num_experts.items():
        if options.num_generalists > count:
            raise RequestError(
                f"num_generalists is {options.num_generalists}, and the budget keeps {count} experts in layer "
                f"{index}; ask for at most that many."
            )


def generalists(layer: LayerStats, index: int, budget: UniformBudget, options: GeneralistOptions) -> tuple[int, ...]:
    """The generalists of a layer, the protected experts among them; more of them if more are protected."""
    return search_generalists(layer, index, budget, options).retained


def search_generalists(layer: LayerStats, index: int, budget: UniformBudget, options: GeneralistOptions) -> Found:
    """As :func:`generalists`, with the experts between which only their numbers decided."""
    if options.is_one_alone and not budget.protected[index]:
        return best_alone(layer)
    return search_set(layer, index, num_generalists(index, budget, options), budget, options)


def best_alone(layer: LayerStats) -> Found:
    """The expert with which alone the reconstruction loss is least, from single-expert errors; ties to the first.

    Raises:
        RequestError: If a layer with fewer experts does not follow from its statistics.
        RunError: If a loss is NaN or infinite.
    """
    from .replay import check_replays, first_minimum, minima  # they need torch
    from .replay_leaders import Found

    check_replays(layer.routing)
    losses = losses_alone(layer)
    return Found((first_minimum(losses),), differing([(expert,) for expert in minima(losses)]))


def losses_alone(layer: LayerStats) -> Tensor:
    """The reconstruction loss of each expert alone ``(E,)`` float64."""
    from .replay import reconstruction_loss

    errors = layer.tensors["token_single_error"].double()
    return reconstruction_loss(errors, layer.token_sample, layer.loss_weights)


def num_generalists(index: int, budget: UniformBudget, options: GeneralistOptions) -> int:
    """How many generalists a layer has; where its router has groups, the next number that can be a layer.

    A set whose groups are not equal is none, so it has no reconstruction loss; one expert alone has its own.
    """
    rule, protected, asked = budget.rule, budget.protected[index], options.num_generalists
    if asked <= len(protected) or rule.groups == 1 or options.is_one_alone:
        return max(asked, len(protected))
    total = budget.original[index]
    return next(n for n in allowed_counts(rule, total, rule.least_with(protected, total)) if n >= asked)


def generalist_notes(budget: UniformBudget, options: GeneralistOptions) -> tuple[str, ...]:
    """What is to be said of the search for generalists."""
    if options.is_one_alone:
        return ()
    numbers = {i: num_generalists(i, budget, options) for i in budget.num_experts}
    more = {n for i, n in numbers.items() if n > max(options.num_generalists, len(budget.protected[i]))}
    notes = tuple(
        f"num_generalists={options.num_generalists} is raised to {n}, the next number that the router's "
        f"{budget.rule.groups} groups can share"
        for n in sorted(more)
    )
    return notes + search_notes(numbers, budget, options)
