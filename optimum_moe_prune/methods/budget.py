# SPDX-License-Identifier: Apache-2.0
"""How many experts are kept, in each layer or in the whole model, which ones in any case, and the choice by scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import RequestError, RunError


@dataclass(frozen=True)
class Budget:
    """What a method has to keep to: a number of experts in the whole model, and at least some in each layer.

    Attributes:
        original: Experts of each layer of the budget. Skipped layers are absent: they keep all.
        total: Experts to retain, in all these layers together.
        floor: Experts to retain in each layer, at least: ``top_k``.
        protected: Experts that are retained in any case, by layer; every layer of ``original`` has an entry.
        seed: For methods that draw.
        notes: What was done otherwise than asked for.
        findings: What a method found on its way and is worth keeping with the plan, as plain values.
    """

    original: dict[int, int]
    total: int
    floor: int
    protected: dict[int, tuple[int, ...]]
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    findings: dict[str, Any] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Remember that something else was done than asked for; said once, and kept with the plan."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class UniformBudget(Budget):
    """A budget that says for each layer how many experts it keeps.

    Attributes:
        num_experts: Experts to retain, by layer.
    """

    num_experts: dict[int, int] = field(default_factory=dict)


def num_removed(sparsity: float, num_experts: int) -> int:
    """Experts that a sparsity removes from ``num_experts``, rounded half up."""
    return math.floor(sparsity * num_experts + 0.5)


def uniform_budget(
    original: Mapping[int, int],
    top_k: int,
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
        top_k: Experts used per token.
        num_experts: Experts to retain in each layer; or
        sparsity: the fraction to remove.
        protect: Experts that must be retained, by layer.
        skip_layers: MoE layers that keep all their experts.
        seed: Carried along.

    Raises:
        RequestError: Naming what was asked, what is true and what can be asked instead.
    """
    layers, protected = _layers(original, (num_experts, sparsity), sparsity, protect, skip_layers)
    if all(total == top_k for total in layers.values()):
        layer, total = next(iter(layers.items()))
        raise RequestError(f"every token uses all {total} experts of layer {layer}: none can be removed.")
    counts = {}
    for layer, total in layers.items():
        # A layer may stay whole if others shrink: that is how unequal layers become equal.
        if num_experts is not None:
            count, asked = num_experts, f"num_experts={num_experts}"
            allowed = f"Ask for {top_k} to {max(total - 1, top_k)}"
            whole = total == count < max(layers.values())
        else:
            assert sparsity is not None
            removed = num_removed(sparsity, total)
            count, asked = total - removed, f"sparsity={sparsity} removes {removed} of {total} experts, which"
            allowed = f"Ask for a sparsity of {1 / total:.4g} to {(total - top_k) / total:.4g}"
            whole = False
        if len(set(layers.values())) > 1:
            allowed += f", or leave layer {layer} as it is (skip_layers)"
        if count > total:
            raise RequestError(f"{asked} asks for more experts than layer {layer} has ({total}). {allowed}.")
        if count == total and not whole:
            raise RequestError(
                f"{asked} leaves layer {layer} with all its {total} experts: nothing to prune. {allowed}."
            )
        if count < top_k:
            raise RequestError(
                f"{asked} leaves layer {layer} with {max(count, 0)} experts, and every token uses {top_k}. {allowed}."
            )
        if len(protected[layer]) > count:
            raise RequestError(
                f"protect names {len(protected[layer])} experts of layer {layer}, and the budget keeps {count}; "
                "protect fewer or keep more."
            )
        counts[layer] = count
    budget = UniformBudget(layers, sum(counts.values()), top_k, protected, seed, num_experts=counts)
    _note_rounding(budget, sparsity)
    return budget


def global_budget(
    original: Mapping[int, int],
    top_k: int,
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
        top_k: Experts used per token; every layer keeps at least that many.
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
    floors = {layer: max(min(top_k, count), len(protected[layer])) for layer, count in layers.items()}
    least = sum(floors.values())
    if least == everything:
        raise RequestError("every expert is used by every token or protected: none can be removed.")
    if num_experts is not None:
        low, high = -(-least // len(layers)), (everything - 1) // len(layers)
        allowed = f"Ask for {low} to {high}." if low <= high else "Ask for a sparsity instead."
    elif total_experts is not None:
        allowed = f"Ask for {least} to {everything - 1}."
    else:
        allowed = f"Ask for a sparsity of {1 / everything:.4g} to {(everything - least) / everything:.4g}."
    if total >= everything:
        raise RequestError(f"{asked}: nothing to prune. {allowed}")
    if total < least:
        raise RequestError(
            f"{asked}, and each layer keeps at least the {top_k} that every token uses and those protected, together "
            f"{least}. {allowed}"
        )
    budget = Budget(layers, total, top_k, protected, seed)
    _note_rounding(budget, sparsity)
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


def _note_rounding(budget: Budget, sparsity: float | None) -> None:
    done = 1 - budget.total / sum(budget.original.values())
    if sparsity is not None and abs(sparsity - done) > 1e-9:
        budget.note(f"sparsity {sparsity} rounds to {done:.4g}")


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

    Args:
        keys: For each layer of the budget a sort key per expert, lowest = keep first, comparable between layers. Ties
            go to the lower expert and only then to the lower layer, which would favour early layers.
        budget: How many. A uniform budget takes the best of each layer.
    """
    retained, rest = {}, []
    for layer, count in budget.original.items():
        protected, key = budget.protected[layer], keys[layer]
        order = sorted((expert not in protected, key[expert], expert) for expert in range(count))
        experts = [expert for _, _, expert in order]
        if isinstance(budget, UniformBudget):
            retained[layer] = experts[: budget.num_experts[layer]]
        else:
            first = max(budget.floor, len(protected))
            retained[layer] = experts[:first]
            rest += [(key[expert], expert, layer) for expert in experts[first:]]
    for _, expert, layer in sorted(rest)[: budget.total - sum(map(len, retained.values()))]:
        retained[layer].append(expert)
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
