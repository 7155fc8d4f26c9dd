# SPDX-License-Identifier: Apache-2.0
"""How many experts are kept, in each layer or in the whole model, which ones in any case, and the choice by scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ..architectures.routers import RoutingRule
from ..errors import RequestError, RunError


@dataclass(frozen=True)
class Budget:
    """What a method has to keep to: a number of experts in the whole model, and at least some in each layer.

    Attributes:
        original: Experts of each layer of the budget. Skipped layers are absent: they keep all.
        total: Experts to retain, in all these layers together.
        rule: How the routers choose: says which numbers of experts a layer can keep.
        protected: Experts that are retained in any case, by layer; every layer of ``original`` has an entry.
        seed: For methods that draw.
    """

    original: dict[int, int]
    total: int
    rule: RoutingRule
    protected: dict[int, tuple[int, ...]]
    seed: int = 0

    @property
    def floor(self) -> int:
        """Experts to retain in each layer, at least."""
        return self.rule.fewest

    def allowed(self, layer: int) -> list[int]:
        """The numbers of experts that a layer can keep, the protected ones among them; rising, the last is all."""
        return allowed_counts(self.rule, self.original[layer], len(self.protected[layer]))


@dataclass(frozen=True)
class UniformBudget(Budget):
    """A budget that says for each layer how many experts it keeps.

    Attributes:
        num_experts: Experts to retain, by layer.
    """

    num_experts: dict[int, int] = field(default_factory=dict)


def allowed_counts(rule: RoutingRule, num_experts: int, protected: int = 0) -> list[int]:
    """The numbers of experts that a layer of ``num_experts`` can keep: those its rule allows, and all.

    Args:
        rule: The routing rule.
        num_experts: Experts in the layer.
        protected: How many of them are retained in any case.
    """
    return [*(count for count in range(max(protected, 1), num_experts) if rule.allows(count)), num_experts]


def num_removed(sparsity: float, num_experts: int) -> int:
    """Experts that a sparsity removes from ``num_experts``, rounded half up."""
    return math.floor(sparsity * num_experts + 0.5)


def uniform_budget(
    original: Mapping[int, int],
    rule: RoutingRule,
    *,
    num_experts: int | None = None,
    sparsity: float | None = None,
    protect: Mapping[int, Sequence[int]] | None = None,
    skip_layers: Sequence[int] = (),
    seed: int = 0,
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

    Raises:
        RequestError: Naming what was asked, what is true and what can be asked instead.
    """
    layers, protected = _layers(original, (num_experts, sparsity), sparsity, protect, skip_layers)
    smaller = {layer: allowed_counts(rule, total)[:-1] for layer, total in layers.items()}
    if not any(smaller.values()):
        layer, total = next(iter(layers.items()))
        why = "every token uses" if total <= rule.top_k else "the router needs"
        raise RequestError(f"{why} all {total} experts of layer {layer}: none can be removed.")
    counts = {}
    for layer, total in layers.items():
        # A layer may stay whole if others shrink: that is how unequal layers become equal.
        if num_experts is not None:
            count, asked = num_experts, f"num_experts={num_experts}"
            offer = f"Ask for {_numbers(smaller[layer] or [total])}"
            whole = total == count < max(layers.values())
        else:
            assert sparsity is not None
            removed = num_removed(sparsity, total)
            count, asked = total - removed, f"sparsity={sparsity} removes {removed} of {total} experts, which"
            offer = f"Ask for a sparsity of {_numbers(smaller[layer] or [total], total)}"
            whole = False
        if len(set(layers.values())) > 1:
            offer += f", or leave layer {layer} as it is (skip_layers)"
        if count > total:
            raise RequestError(f"{asked} asks for more experts than layer {layer} has ({total}). {offer}.")
        if count == total and not whole:
            raise RequestError(
                f"{asked} leaves layer {layer} with all its {total} experts: nothing to prune. {offer}."
            )
        if count not in smaller[layer] and not whole:
            why = f"every token uses {rule.top_k}" if count < rule.top_k else "its router does not allow that number"
            raise RequestError(f"{asked} leaves layer {layer} with {max(count, 0)} experts, and {why}. {offer}.")
        if len(protected[layer]) > count:
            raise RequestError(
                f"protect names {len(protected[layer])} experts of layer {layer}, and the budget keeps {count}; "
                "protect fewer or keep more."
            )
        counts[layer] = count
    return UniformBudget(layers, sum(counts.values()), rule, protected, seed, num_experts=counts)


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
    allowed = {layer: allowed_counts(rule, count, len(protected[layer])) for layer, count in layers.items()}
    least = sum(counts[0] for counts in allowed.values())
    if least == everything:
        raise RequestError("every expert is used by every token or protected: none can be removed.")
    steps = {after - before for counts in allowed.values() for before, after in pairwise(counts)}
    if len(steps) > 1:
        raise RequestError(
            "the numbers of experts that the routers allow in a layer do not lie evenly: a budget for the whole model "
            "cannot be spread over them; use allocation 'uniform'."
        )
    totals = range(least, everything, steps.pop())
    if num_experts is not None:
        means = [mean for mean in range(1, max(layers.values())) if mean * len(layers) in totals]
        offer = f"Ask for {_numbers(means)}." if means else "Ask for a sparsity instead."
    elif total_experts is not None:
        offer = f"Ask for {_numbers(totals)}."
    else:
        offer = f"Ask for a sparsity of {_numbers(totals, everything)}."
    if total >= everything:
        raise RequestError(f"{asked}: nothing to prune. {offer}")
    if total < least:
        raise RequestError(
            f"{asked}, and each layer keeps at least the {rule.fewest} that every token uses and those protected, "
            f"together {least}. {offer}"
        )
    if total not in totals:
        below = total - (total - least) % totals.step
        raise RequestError(
            f"{asked}, and the numbers that the routers allow in a layer add up to {below} or {below + totals.step}. "
            f"{offer}"
        )
    return Budget(layers, total, rule, protected, seed)


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
    moe_layers = _spans(original)
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


def _numbers(counts: Sequence[int], total: int | None = None) -> str:
    """Numbers of experts as text; with ``total`` the sparsities that leave them."""
    texts = [str(n) if total is None else f"{(total - n) / total:.4g}" for n in counts][:: 1 if total is None else -1]
    if counts[-1] - counts[0] == len(counts) - 1:
        return f"{texts[0]} to {texts[-1]}"
    return ", ".join(texts if len(texts) <= 8 else [*texts[:3], "...", texts[-1]])


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
    keys = {}
    for layer in budget.original:
        values = np.asarray(scores[layer], dtype=np.float64)
        if not np.isfinite(values).all():
            raise RunError(
                f"layer {layer}: expert {int(np.flatnonzero(~np.isfinite(values))[0])} has no finite score."
            )
        keys[layer] = (-(values if isinstance(budget, UniformBudget) else _relative(values))).tolist()
    return choose_ranked(keys, budget)


def choose_ranked(keys: Mapping[int, Sequence[Any]], budget: Budget) -> dict[int, tuple[int, ...]]:
    """Spread a budget over the layers: in each the protected and best ones up to the floor, then the best of all.

    Where the routers allow only some numbers of experts in a layer, the next ones are taken together, in the order of
    the best of them.

    Args:
        keys: For each layer of the budget a sort key per expert, lowest = keep first, comparable between layers. Ties
            go to the lower expert and only then to the lower layer, which would favour early layers.
        budget: How many. A uniform budget takes the best of each layer.
    """
    retained, steps = {}, []
    for layer, count in budget.original.items():
        protected, key = budget.protected[layer], keys[layer]
        order = sorted((expert not in protected, key[expert], expert) for expert in range(count))
        experts = [expert for _, _, expert in order]
        if isinstance(budget, UniformBudget):
            retained[layer] = experts[: budget.num_experts[layer]]
        else:
            allowed = budget.allowed(layer)
            retained[layer] = experts[: allowed[0]]
            more = [
                experts[low:high] for low, high in pairwise(allowed)
            ]  # one expert each, where the rule has no gaps
            steps += [(key[step[0]], step[0], layer, step) for step in more]
    left = budget.total - sum(map(len, retained.values()))
    for _, _, layer, step in sorted(steps):
        if left < len(step):
            break
        retained[layer] += step
        left -= len(step)
    return {layer: tuple(sorted(experts)) for layer, experts in retained.items()}


def _relative(values: np.ndarray) -> np.ndarray:
    """Values in units of their mean magnitude; all 1 where every one is 0."""
    mean = np.abs(values).mean()
    return values / mean if mean > 0 else np.ones_like(values)


def _spans(layers: Mapping[int, int]) -> str:
    """Layer numbers as text: ``0-3, 5``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
