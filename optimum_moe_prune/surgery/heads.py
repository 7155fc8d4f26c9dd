# SPDX-License-Identifier: Apache-2.0
"""What becomes of the heads for further tokens (MTP) of a checkpoint whose layers are pruned.

They are pruned as one more layer each, kept whole, or left out (``planning.heads.way_with_heads``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..architectures.heads import count_of_heads
from ..checkpoints.heads import Head
from ..checkpoints.layout import Layout
from ..compat import ModelConfig
from ..errors import RequestError
from ..methods.budget import choose
from ..models.heads import counts_built
from ..names import DROP, KEEP, NOTES_LOGGER, PRUNE
from ..plan import PruningPlan
from ..planning.heads import budget_of_head, way_with_heads
from ..storage.values import Json
from .config_json import config_after

logger = logging.getLogger(NOTES_LOGGER)


def way_of_plan(plan: PruningPlan, mtp: str | None = None) -> str:
    """What becomes of heads by a plan.

    Args:
        plan: The plan.
        mtp: In place of what it says.
    """
    asked = mtp or plan.config.get("mtp") or (PRUNE if plan.heads else None)
    return way_with_heads(asked, plan.uniform_num_experts is not None)


def check_heads(layout: Layout, way: str, uniform: bool) -> None:
    """Raise unless a checkpoint's experts outside its layers can be treated so.

    Args:
        layout: The checkpoint.
        way: What is to become of heads.
        uniform: Whether every layer will keep the same number of experts.

    Raises:
        RequestError: Naming a tensor, and what can be done.
    """
    if way == PRUNE:
        for head in (head for head in layout.heads if head.problem):
            names = [name for name in layout.head_names if name.startswith(head.prefix) and ".experts." in name]
            raise RequestError(
                f"{_some(names)} of {layout.checkpoint.name_or_path} are experts outside the model's layers, in a "
                f"head that cannot be pruned as one of them ({head.problem.rstrip('.')}). "
                "Leave it out (mtp='drop'), or prune with a global allocation, which keeps it whole."
            )
    if layout.foreign and uniform:
        raise RequestError(
            f"{_some(layout.foreign)} of {layout.checkpoint.name_or_path} are experts outside the model's layers, "
            "which no plan names and config.json would number wrongly. Remove them from the checkpoint, or prune with "
            "a global allocation, which leaves the model-wide number as it is."
        )


def check_way(layout: Layout, num_experts: Mapping[int, int], mtp: str | None) -> None:
    """Raise unless heads can be treated as asked beside layers that keep these numbers, before it is known which.

    Raises:
        RequestError: As :func:`check_heads_load`.
    """
    if way_with_heads(mtp, len(set(num_experts.values())) == 1) == KEEP:
        counts = {number: head.layer.num_experts for number, head in enumerate(layout.heads) if not head.problem}
        check_heads_load(layout, config_after(layout, num_experts, counts), counts)


def check_heads_load(layout: Layout, config: ModelConfig, counts: Mapping[int, int]) -> None:
    """Raise unless heads can be loaded that have another number of experts than the whole model.

    transformers with this package builds them; nobody else can be told.

    Args:
        layout: The checkpoint before pruning.
        config: The config after it.
        counts: Experts of the heads after it, by number.

    Raises:
        RequestError: If transformers does not build such heads, and why.
    """
    usual = count_of_heads(layout.spec, config)
    other = [number for number, count in counts.items() if count != usual]
    if not other:
        return
    built = counts_built(layout, config)
    if isinstance(built, str) or any(built[number] != count for number, count in counts.items()):
        head = layout.heads[other[0]]
        why = built if isinstance(built, str) else f"it builds it with {built[other[0]]}"
        raise RequestError(
            f"head {head.index} would have {counts[other[0]]} experts, and config.json says {usual} for the whole "
            f"model; only transformers can be told that they differ, and it does not build this head ({why}). Prune "
            "heads as well (mtp='prune'), or leave them out (mtp='drop')."
        )


def with_heads_settled(plan: PruningPlan, layout: Layout, mtp: str | None = None) -> PruningPlan:
    """A plan that says what becomes of the heads of a checkpoint.

    Args:
        plan: The plan, which may know of no heads.
        layout: The checkpoint.
        mtp: What becomes of them; by default what the plan says, or what loads.

    Raises:
        RequestError: If the plan is for other heads.
    """
    way, indexes = way_of_plan(plan, mtp), [head.index for head in layout.heads]
    if mtp is not None:
        plan = replace(plan, config={**plan.config, "mtp": mtp})
    if way != PRUNE or not layout.heads:  # files that were saved from memory have none
        plan = plan.without_heads
    for head in layout.heads if plan.heads else ():
        if plan.original_num_experts.get(head.index, head.layer.num_experts) != head.layer.num_experts:
            raise RequestError(
                f"this plan is for another model, with {plan.original_num_experts[head.index]} experts in head "
                f"{head.index}; this model has {head.layer.num_experts}."
            )
    unknown = [head for head in layout.heads if head.index not in plan.retained] if way == PRUNE else []
    for head in unknown:
        plan = _with_head(plan, layout, head)
    if not layout.heads or (way == PRUNE and not unknown):
        return plan
    which = f"head{'s' if len(indexes) > 1 else ''} for further tokens (layer {', '.join(map(str, indexes))})"
    what = {
        PRUNE: "without statistics, so the experts with the largest rows in the router are retained",
        KEEP: "kept whole",
        DROP: "left out",
    }
    return _said(plan, way, f"{which}: {what[way]}", _size(layout) if way == DROP else {})


def head_counts(plan: PruningPlan, layout: Layout) -> dict[int, int] | None:
    """The experts of heads, by number, after a plan that says what becomes of them; None where they are left out."""
    if layout.heads and way_of_plan(plan) == DROP:
        return None
    kept = plan.num_experts
    return {n: kept.get(h.index, h.layer.num_experts) for n, h in enumerate(layout.heads) if not h.problem}


def _with_head(plan: PruningPlan, layout: Layout, head: Head) -> PruningPlan:
    """The plan with a head that has no statistics: the experts with the largest rows in its router."""
    total, rule = head.layer.num_experts, layout.spec.routing(layout.config)
    name = head.layer.router[layout.structure_of(head.index).logits_from]
    with layout.checkpoint.reader() as read:
        rows = layout.checkpoint.finite(name, read(name)).float()[:total]
    norms = torch.linalg.vector_norm(rows.flatten(1), dim=1).double().numpy()
    budget = budget_of_head(head.index, total, plan.without_heads.num_experts, rule)
    return replace(
        plan,
        retained={**plan.retained, **choose({head.index: norms}, budget)},
        original_num_experts={**plan.original_num_experts, head.index: total},
        heads=tuple(sorted({*plan.heads, head.index})),
    )


def _said(plan: PruningPlan, way: str, note: str, more: Json) -> PruningPlan:
    """The plan with what became of its heads: in its notes, and for the card."""
    notes = plan.provenance.get("notes")
    notes = [*notes] if isinstance(notes, list) else []  # plans are edited by hand
    before = plan.provenance.get("heads")
    if isinstance(before, dict) and before.get("note") in notes:
        notes.remove(before["note"])
    logger.warning("%s", note)
    heads = {"mtp": way, "note": note, **more}
    return replace(plan, provenance={**plan.provenance, "notes": [*notes, note], "heads": heads})


def _size(layout: Layout) -> Json:
    """What is left out, for those who count parameters."""
    tensors = [layout.checkpoint.tensors[name] for name in layout.head_names]
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return {"parameters": parameters, "bytes": sum(tensor.nbytes for tensor in tensors)}


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
