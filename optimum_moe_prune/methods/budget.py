# SPDX-License-Identifier: Apache-2.0
"""How many experts are kept, in each layer or in the whole model, which ones in any case, and the choice by scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import pairwise
from typing import Any

import numpy as np

from ..architectures.routers import RoutingRule
from ..errors import RequestError, RunError
from .limits import allowed_counts, least_kept, limits, nearest, num_removed, spans


@dataclass(frozen=True)
class Budget:
    """What a method has to keep to: a number of experts in the whole model, and at least some in each layer.

    Attributes:
        original: Experts of each layer of the budget. Skipped layers are absent: they keep all.
        total: Experts to retain, in all these layers together.
        rule: How the routers choose: says which numbers of experts a layer can keep.
        protected: Experts that are retained in any case, by layer; every layer of ``original`` has an entry.
        seed: For methods that draw.
        multiple: Layers that are pruned keep a multiple of it.
    """

    original: dict[int, int]
    total: int
    rule: RoutingRule
    protected: dict[int, tuple[int, ...]]
    seed: int = 0
    multiple: int = 1

    @property
    def floor(self) -> int:
        """Experts that the routers need in each layer, at least."""
        return self.rule.fewest

    def allowed(self, layer: int) -> list[int]:
        """The numbers of experts that a layer can keep, the protected ones among them, rising."""
        least = self.rule.least_with(self.protected[layer], self.original[layer])
        return allowed_counts(self.rule, self.original[layer], least, self.multiple)

    def exactly(self, num_experts: dict[int, int]) -> UniformBudget:
        """This budget with a number for each layer, or for each of some."""
        layers = {layer: self.original[layer] for layer in num_experts}
        protected = {layer: self.protected[layer] for layer in num_experts}
        total = sum(num_experts.values())
        return UniformBudget(layers, total, self.rule, protected, self.seed, self.multiple, num_experts=num_experts)

    def order(self, layer: int, key: Sequence[Any] | np.ndarray, first: Sequence[int] | None = None) -> list[int]:
        """All experts of a layer, those to keep first at the front.

        The router's groups take turns: the first n are the first of each group, as many of each, for every n that a
        layer can keep.

        Args:
            layer: The layer.
            key: What each expert is sorted by, lowest first; ties to the lower expert.
            first: Those in front of all others; by default the protected ones.
        """
        front = set(self.protected[layer] if first is None else first)
        experts = sorted(range(len(key)), key=lambda expert: (expert not in front, key[expert], expert))
        return [expert for turn in zip(*self.rule.grouped(experts, len(key)), strict=True) for expert in turn]


@dataclass(frozen=True)
class UniformBudget(Budget):
    """A budget that says for each layer how many experts it keeps.

    Attributes:
        num_experts: Experts to retain, by layer.
    """

    num_experts: dict[int, int] = field(default_factory=dict)


def uniform_budget(
    original: Mapping[int, int],
    rule: RoutingRule,
    *,
    num_experts: int | None = None,
    sparsity: float | None = None,
    protect: Mapping[int, Sequence[int]] | None = None,
    skip_layers: Sequence[int] = (),
    seed: int = 0,
    multiple: int = 1,
) -> UniformBudget:
    """The same count, or the same share removed, in every layer.

    Args:
        original: Experts in each MoE layer.
        rule: How the routers choose.
        num_experts: Experts to retain in each layer; or
        sparsity: the fraction to remove.
        protect: Experts that must be retained, by layer.
        skip_layers: MoE layers that keep all their experts.
        seed: Carried along.
        multiple: What the numbers of experts in layers that are pruned are multiples of.

    Raises:
        RequestError: Naming what was asked, what is true and what can be asked instead.
    """
    layers, protected = _layers(original, (num_experts, sparsity), sparsity, protect, skip_layers)
    possible = {total: [n for n in allowed_counts(rule, total, 1, multiple) if n < total] for total in layers.values()}
    if not any(possible.values()):
        layer, total = next(iter(layers.items()))
        why = f"count_multiple_of={multiple} leaves" if allowed_counts(rule, total)[0] < total else "the router needs"
        why = "every token uses" if total <= rule.top_k else why
        raise RequestError(f"{why} all {total} experts of layer {layer}: none can be removed.")
    least = {layer: rule.least_with(protected[layer], total) for layer, total in layers.items()}
    fullest = {total: max(least[layer] for layer in layers if layers[layer] == total) for total in layers.values()}
    counts = {}
    for layer, total in layers.items():
        if num_experts is not None:
            counts[layer], asked, kind = num_experts, f"num_experts={num_experts}", ""
        else:
            assert sparsity is not None
            removed = num_removed(sparsity, total)
            counts[layer], kind = total - removed, "a sparsity of "
            asked = f"sparsity={sparsity} removes {removed} of {total} experts, which"
        if num_experts == total < max(fullest):
            continue  # a layer may stay whole if others shrink: that is how unequal layers become equal
        count = counts[layer]
        fitting = [n for n in possible[total] if n >= fullest[total]]
        offer = f"Ask for {kind}{nearest(fitting or [total], count, total if kind else None)}"
        if possible[total] and not fitting:
            offer = "Protect fewer experts"
        if len(fullest) > 1:
            offer += f", or leave layer {layer} as it is (skip_layers)"
        if count > total:
            raise RequestError(f"{asked} asks for more experts than layer {layer} has ({total}). {offer}.")
        if count == total:
            raise RequestError(
                f"{asked} leaves layer {layer} with all its {total} experts: nothing to prune. {offer}."
            )
        if count not in possible[total]:
            why = limits(rule, multiple) or "its router does not allow that number"
            why = f"every token uses {rule.top_k}" if count < rule.top_k else why
            raise RequestError(f"{asked} leaves layer {layer} with {max(count, 0)} experts, and {why}. {offer}.")
        if count < least[layer]:
            named = f"{len(protected[layer])} experts of layer {layer}"
            if rule.groups > 1:
                named += f", so that each of its router's {rule.groups} groups keeps {least[layer] // rule.groups}"
            more = f" or keep {fitting[0]} or more" if fitting else ""
            raise RequestError(f"protect names {named}, and the budget keeps {count}; protect fewer{more}.")
    return UniformBudget(layers, sum(counts.values()), rule, protected, seed, multiple, num_experts=counts)


def global_budget(
    original: Mapping[int, int],
    rule: RoutingRule,
    *,
    num_experts: int | None = None,
    sparsity: float | None = None,
    total_experts: int | None = None,
    protect: Mapping[int, Sequence[int]] | None = None,
    skip_layers: Sequence[int] = (),
    seed: int = 0,
    multiple: int = 1,
) -> Budget:
    """A count for all layers together, to be spread over them by the method.

    Args:
        original: Experts in each MoE layer.
        rule: How the routers choose; every layer keeps as many experts as it allows.
        num_experts: Experts to retain in each layer, on average; or
        sparsity: the fraction of all experts to remove; or
        total_experts: the experts to retain in all layers together. Skipped layers do not count in any of the three.
        protect: Experts that must be retained, by layer.
        skip_layers: MoE layers that keep all their experts.
        seed: Carried along.
        multiple: What the numbers of experts in layers that are pruned are multiples of.

    Raises:
        RequestError: Naming what was asked, what is true and what can be asked instead.
    """
    layers, protected = _layers(original, (num_experts, sparsity, total_experts), sparsity, protect, skip_layers)
    everything = sum(layers.values())
    if num_experts is not None:
        total, asked = num_experts * len(layers), f"num_experts={num_experts} on average"
    elif total_experts is not None:
        total, asked = total_experts, f"total_experts={total_experts}"
    else:
        assert sparsity is not None
        total, asked = everything - num_removed(sparsity, everything), f"sparsity={sparsity}"
    asked = f"{asked} keeps {total} of the {everything} experts in {len(layers)} layers"
    budget = Budget(layers, total, rule, protected, seed, multiple)
    allowed = [budget.allowed(layer) for layer in layers]
    least = sum(counts[0] for counts in allowed)
    if least == everything:
        why = f", or no smaller number is allowed by count_multiple_of={multiple}" if multiple > 1 else ""
        raise RequestError(f"every expert is used by every token or protected{why}: none can be removed.")
    steps = {after - before for counts in allowed for before, after in pairwise(counts)}
    if len(steps) > 1:
        raise RequestError(
            "the numbers of experts that the routers allow in a layer do not lie evenly: a budget for the whole model "
            "cannot be spread over them; use allocation 'uniform'."
        )
    most = min(sum(counts[-1] for counts in allowed), everything - 1)
    totals = range(least, most + 1, *steps)
    if num_experts is not None:
        means = [mean for mean in range(1, max(layers.values())) if mean * len(layers) in totals]
        offer = f"Ask for {nearest(means, num_experts)}." if means else "Ask for a sparsity instead."
    elif total_experts is not None:
        offer = f"Ask for {nearest(totals, total)}."
    else:
        offer = f"Ask for a sparsity of {nearest(totals, total, everything)}."
    if total >= everything:
        raise RequestError(f"{asked}: nothing to prune. {offer}")
    if total < least:
        raise RequestError(
            f"{asked}, and each layer keeps at least {least_kept(rule, multiple)}, together {least}. {offer}"
        )
    if total not in totals:
        told = limits(rule, multiple)
        why = f"{told}: what layers keep adds" if told else "the numbers that the routers allow in a layer add"
        raise RequestError(f"{asked}, and {why} up to {nearest(totals, total)}. {offer}")
    return budget


def _layers(
    original: Mapping[int, int],
    sizes: Sequence[float | None],
    sparsity: float | None,
    protect: Mapping[int, Sequence[int]] | None,
    skip_layers: Sequence[int],
) -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
    """The layers of a budget with their experts and protected experts; refuses what is wrong for every budget."""
    if sum(size is not None for size in sizes) != 1:
        raise RequestError(
            "give exactly one of num_experts (to retain in each layer), sparsity (fraction to remove) and, for all "
            "layers together, total_experts."
        )
    if sparsity is not None and not 0 < sparsity < 1:
        raise RequestError(f"sparsity is {sparsity}; the fraction of experts to remove lies between 0 and 1.")
    return checked_layers(original, protect, skip_layers)


def checked_layers(
    original: Mapping[int, int], protect: Mapping[int, Sequence[int]] | None, skip_layers: Sequence[int]
) -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
    """The layers that are pruned with their experts, and the protected experts of each.

    Raises:
        RequestError: If a layer or an expert is named that is not there, or no layer is left.
    """
    protect = protect or {}
    moe_layers = spans(original)
    for what, named in (("skip_layers", skip_layers), ("protect", protect)):
        unknown = sorted(set(named) - set(original))
        if unknown:
            raise RequestError(
                f"{what} names layer {unknown[0]}, which has no experts; the MoE layers are {moe_layers}."
            )
    protected = {}
    for layer, total in original.items():
        experts = tuple(sorted(set(protect.get(layer, ()))))
        outside = [e for e in experts if not 0 <= e < total]
        if outside:
            raise RequestError(
                f"protect names expert {outside[0]} of layer {layer}, which has experts 0 to {total - 1}."
            )
        if layer not in skip_layers:
            protected[layer] = experts
    if not protected:
        raise RequestError(f"skip_layers names every MoE layer ({moe_layers}): nothing to prune.")
    return {layer: original[layer] for layer in protected}, protected


def rounding_note(budget: Budget, sparsity: float | None) -> str | None:
    """What is to be said where whole experts cannot make up a sparsity exactly."""
    done = 1 - budget.total / sum(budget.original.values())
    return None if sparsity is None or abs(sparsity - done) <= 1e-9 else f"sparsity {sparsity} rounds to {done:.4g}"


def choose(scores: Mapping[int, np.ndarray], budget: Budget) -> dict[int, tuple[int, ...]]:
    """The protected experts and those with the highest scores; ties to the lower index.

    Where the budget is one for the whole model, scores of different layers are compared: each is divided by the mean
    magnitude of its layer (norms grow from layer to layer, counts do not), so a layer in which a few experts have
    most of the score keeps fewer. Every layer first keeps its best ones up to the floor.

    Args:
        scores: ``(E,)`` for each layer of the budget, higher = keep.
        budget: How many.

    Raises:
        RunError: If a score is not finite.
    """
    return choose_ranked(keys_of(scores, budget), budget)


def keys_of(scores: Mapping[int, np.ndarray], budget: Budget) -> dict[int, list[float]]:
    """What experts are sorted by, lowest = keep first, where they are chosen by scores (:func:`choose`).

    Raises:
        RunError: If a score is not finite.
    """
    keys = {}
    for layer in budget.original:
        values = np.asarray(scores[layer], dtype=np.float64)
        if not np.isfinite(values).all():
            raise RunError(
                f"layer {layer}: expert {int(np.flatnonzero(~np.isfinite(values))[0])} has no finite score."
            )
        keys[layer] = (-(values if isinstance(budget, UniformBudget) else _relative(values))).tolist()
    return keys


def choose_ranked(keys: Mapping[int, Sequence[Any]], budget: Budget) -> dict[int, tuple[int, ...]]:
    """Spread a budget over the layers: in each the protected and best ones up to the floor, then the best of all.

    Where layers keep only some numbers of experts (a router's groups, a ``multiple``), the next ones of a layer are
    taken together: of each group the best that are left. Such a step is judged by all it adds, the sum of its keys.
    The steps of a layer never improve, so of scores the highest sum is kept that any choice within the budget has.

    Args:
        keys: For each layer of the budget a sort key per expert, a number or numbers, lowest = keep first, comparable
            between layers. Ties go to the lower expert and only then to the lower layer, which would favour early
            layers.
        budget: How many. A uniform budget takes the best of each layer.
    """
    retained: dict[int, list[int]] = {}
    steps = []
    for layer, key in ((layer, keys[layer]) for layer in budget.original):
        experts = budget.order(layer, key)
        if isinstance(budget, UniformBudget):
            retained[layer] = experts[: budget.num_experts[layer]]
            continue
        allowed = budget.allowed(layer)
        retained[layer] = experts[: allowed[0]]
        more = [experts[low:high] for low, high in pairwise(allowed)]  # one expert each, where there are no gaps
        steps.append([(np.sum([key[e] for e in step], axis=0).tolist(), step[0], layer, step) for step in more])
    left = budget.total - sum(map(len, retained.values()))
    for _, _, layer, step in merge(*steps):  # whatever rounding does to sums, a layer's steps stay in their order
        if left < len(step):
            break
        retained[layer] += step
        left -= len(step)
    return {layer: tuple(sorted(experts)) for layer, experts in retained.items()}


def _relative(values: np.ndarray) -> np.ndarray:
    """Values in units of their mean magnitude; all 1 where every one is 0."""
    mean = np.abs(values).mean()
    return values / mean if mean > 0 else np.ones_like(values)
