# SPDX-License-Identifier: Apache-2.0
"""Which numbers of experts a layer can keep, and how a request that is none of them is answered."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence

from ..architectures.routers import RoutingRule
from ..errors import RequestError

MOST_COUNTS = 12
"""Numbers of experts measured in a layer, by default; all of them where there are no more."""

_FEWEST_COUNTS = 6
_MOST_SETS = 2048


def most_counts(num_layers: int, methods: int) -> int:
    """Numbers of experts to measure in a layer at most, so that the sets of several methods stay within bounds.

    Args:
        num_layers: MoE layers.
        methods: Whose sets are measured.
    """
    return max(_FEWEST_COUNTS, min(MOST_COUNTS, _MOST_SETS // (num_layers * methods)))


def allowed_counts(rule: RoutingRule, num_experts: int, least: int = 1, multiple: int = 1) -> list[int]:
    """The numbers of experts that a layer of ``num_experts`` can keep, rising.

    The last is all of them; but where they are no ``multiple``, and a smaller number is, only such.

    Args:
        rule: The routing rule.
        num_experts: Experts in the layer.
        least: The smallest number that holds those retained in any case (``RoutingRule.least_with``).
        multiple: What smaller numbers are multiples of.
    """
    smaller = [n for n in range(max(least, 1), num_experts) if n % multiple == 0 and rule.allows(n)]
    return smaller if smaller and num_experts % multiple else [*smaller, num_experts]


def check_retained(
    rule: RoutingRule, retained: Mapping[int, Sequence[int]], num_experts: Mapping[int, int], whose: str
) -> None:
    """Raise unless each layer can consist of the experts that are retained.

    Args:
        rule: How the routers choose.
        retained: Sorted ids, by layer.
        num_experts: Of the whole layers.
        whose: Who retains them, in words.

    Raises:
        RequestError: Naming the layer, its groups and how many each retains.
    """
    for layer, experts in sorted(retained.items()):
        if not rule.admits(experts, len(experts), num_experts[layer]):
            counts = ", ".join(str(len(group)) for group in rule.grouped(experts, num_experts[layer]))
            raise RequestError(
                f"layer {layer}: {whose} retains {counts} experts of the router's {rule.groups} groups, and each must "
                f"keep the same number, at least {rule.fewest // rule.groups}."
            )


def least_kept(rule: RoutingRule, multiple: int = 1) -> str:
    """What a layer keeps at least, in words."""
    least = f"the {rule.fewest} that every token uses and those protected"
    if rule.groups > 1:
        each = rule.fewest // rule.groups
        least = f"{each} in each of the router's {rule.groups} groups, or as many as are protected in the fullest"
    return f"{least}, in multiples of {multiple}" if multiple > 1 else least


def limits(rule: RoutingRule, multiple: int) -> str:
    """What the number of experts in a layer has to keep to, in words; empty where the rule has no groups to name."""
    said = []
    if rule.groups > 1:
        each = rule.fewest // rule.groups
        said.append(f"each of the router's {rule.groups} groups must keep the same number, at least {each}")
    if multiple > 1:
        said.append(f"count_multiple_of is {multiple}")
    return ", and ".join(said)


def nearest(counts: Sequence[int], asked: int, total: int | None = None) -> str:
    """What to ask for instead: the numbers on both sides of the one asked for, or all where it lies outside of them.

    Args:
        counts: Rising numbers of experts.
        asked: None of them.
        total: To name the sparsities that leave so many of this total.
    """
    above = bisect(counts, asked)
    if between := 0 < above < len(counts):
        counts = counts[above - 1 : above + 1]
    whole = not between and counts[-1] - counts[0] == len(counts) - 1 > 0
    if total is not None:
        counts = counts[::-1]  # so that sparsities rise
    if whole:
        counts = [counts[0], counts[-1]]
    shown = [*counts[:3], *counts[-1:]] if len(counts) > 8 else counts
    texts = [str(n) if total is None else _sparsity(n, total) for n in shown]
    if len(counts) > 8:
        texts.insert(3, "...")
    return (" or " if between else " to " if whole else ", ").join(texts)


def spans(layers: Iterable[int]) -> str:
    """Layer numbers as text: ``0-3, 5``."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer - 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def num_removed(sparsity: float, num_experts: int) -> int:
    """Experts that a sparsity removes from ``num_experts``, rounded half up."""
    return math.floor(sparsity * num_experts + 0.5)


def _sparsity(count: int, total: int) -> str:
    """The shortest sparsity, from 4 digits on, that leaves so many experts of a total."""
    texts = (f"{(total - count) / total:.{digits}g}" for digits in range(4, 18))
    return next(text for text in texts if num_removed(float(text), total) == total - count)
