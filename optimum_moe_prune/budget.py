# SPDX-License-Identifier: Apache-2.0
"""How many experts each layer keeps, which ones are kept whatever happens, and the choice by scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .errors import RequestError, RunError
from .stats import CalibrationStats


@dataclass(frozen=True)
class Budget:
    """What a method has to keep to.

    Attributes:
        num_experts: Experts to retain, by layer. Skipped layers are absent: they keep all.
        protected: Experts that are retained in any case, by layer; every layer of ``num_experts`` has an entry.
        seed: For methods that draw.
        notes: What was done otherwise than asked for.
    """

    num_experts: dict[int, int]
    protected: dict[int, tuple[int, ...]]
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remember that something else was done than asked for; said once, and kept with the plan."""
        if text not in self.notes:
            self.notes.append(text)


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
) -> Budget:
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
    if (num_experts is None) == (sparsity is None):
        raise RequestError(
            "give exactly one of num_experts (to retain in each layer) and sparsity (fraction to remove)."
        )
    moe_layers = _spans(original)
    for what, layers in (("skip_layers", skip_layers), ("protect", protect or {})):
        unknown = sorted(set(layers) - set(original))
        if unknown:
            raise RequestError(
                f"{what} names layer {unknown[0]}, which has no experts; the MoE layers are {moe_layers}."
            )
    counts = {}
    for layer, total in original.items():
        if layer in skip_layers:
            continue
        if num_experts is not None:
            count, asked = num_experts, f"num_experts={num_experts}"
            allowed = f"Ask for {top_k} to {total - 1}."
        else:
            assert sparsity is not None
            if not 0 < sparsity < 1:
                raise RequestError(f"sparsity is {sparsity}; the fraction of experts to remove lies between 0 and 1.")
            removed = num_removed(sparsity, total)
            count, asked = total - removed, f"sparsity={sparsity} removes {removed} of {total} experts, which"
            allowed = f"Ask for a sparsity of {1 / total:.4g} to {(total - top_k) / total:.4g}."
        if total == top_k:
            raise RequestError(f"every token uses all {total} experts of layer {layer}: none can be removed.")
        if count > total:
            raise RequestError(f"{asked} asks for more experts than layer {layer} has ({total}). {allowed}")
        if count == total:
            raise RequestError(
                f"{asked} leaves layer {layer} with all its {total} experts: nothing to prune. {allowed}"
            )
        if count < top_k:
            raise RequestError(
                f"{asked} leaves layer {layer} with {max(count, 0)} experts, and every token uses {top_k}. {allowed}"
            )
        counts[layer] = count
    if not counts:
        raise RequestError(f"skip_layers names every MoE layer ({moe_layers}): nothing to prune.")
    protected = {}
    for layer, total in original.items():
        experts = tuple(sorted(set((protect or {}).get(layer, ()))))
        outside = [e for e in experts if not 0 <= e < total]
        if outside:
            raise RequestError(
                f"protect names expert {outside[0]} of layer {layer}, which has experts 0 to {total - 1}."
            )
        if layer not in counts:
            continue
        if len(experts) > counts[layer]:
            raise RequestError(
                f"protect names {len(experts)} experts of layer {layer}, and the budget keeps {counts[layer]}; "
                "protect fewer or keep more."
            )
        protected[layer] = experts
    budget = Budget(counts, protected, seed)
    if sparsity is not None:
        done = 1 - sum(counts.values()) / sum(original[layer] for layer in counts)
        if abs(sparsity - done) > 1e-9:
            budget.note(f"sparsity {sparsity} rounds to {done:.4g}")
    return budget


def super_experts(stats: CalibrationStats) -> dict[int, tuple[int, ...]]:
    """Experts with extreme outputs, which a model can hardly do without (arXiv 2507.23279).

    Those whose largest output norm over routed tokens is above the 99.5th percentile of all experts, above a tenth of
    the largest, and above ten times the median of their layer (the last is ours: a small model does not always have
    one).
    """
    largest = {index: layer.maximum("max_norm").numpy() for index, layer in stats.layers.items()}
    every = np.concatenate(list(largest.values()))
    threshold = max(float(np.percentile(every, 99.5)), float(every.max()) / 10)
    return {
        index: tuple(np.flatnonzero((norms > threshold) & (norms > 10 * np.median(norms))).tolist())
        for index, norms in largest.items()
    }


def choose(scores: Mapping[int, np.ndarray], budget: Budget) -> dict[int, tuple[int, ...]]:
    """The protected experts and those with the highest scores; ties to the lower index.

    Args:
        scores: ``(E,)`` for each layer of the budget, higher = keep.
        budget: How many.

    Raises:
        RunError: If a score is not finite.
    """
    retained = {}
    for layer, count in budget.num_experts.items():
        values = np.asarray(scores[layer], dtype=np.float64)
        if not np.isfinite(values).all():
            raise RunError(
                f"layer {layer}: expert {int(np.flatnonzero(~np.isfinite(values))[0])} has no finite score."
            )
        protected = budget.protected[layer]
        order = [e for e in np.argsort(-values, kind="stable").tolist() if e not in protected]
        retained[layer] = tuple(sorted([*protected, *order[: count - len(protected)]]))
    return retained


def _spans(layers: Mapping[int, int]) -> str:
    """Layer numbers as text: ``0-3, 5``."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
