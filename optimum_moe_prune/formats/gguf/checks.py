# SPDX-License-Identifier: Apache-2.0
"""Whether a plan fits the model in a GGUF file, and llama.cpp opens what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ...errors import RequestError
from ...methods.limits import spans
from ...plan import PruningPlan
from ...storage.gguf_files import ARRAY
from .architectures import ARCHITECTURES
from .model import GgufModel
from .routers import EXACT, proof
from .tensors import COUNT, Block, num_experts

_USED, _GROUPS, _BLOCKS, _HEADS = "expert_used_count", "expert_group_count", "block_count", "nextn_predict_layers"
_NO_COUNTS = frozenset(
    "expert_feed_forward_length expert_shared_feed_forward_length expert_chunk_feed_forward_length expert_used_count "
    "expert_shared_count expert_group_count expert_group_used_count expert_weights_scale expert_weights_norm "
    "expert_gating_func expert_group_scale expert_latent_length".split()
)
"""Keys that speak of experts and do not count them."""


def heads_of(model: GgufModel, blocks: Mapping[int, Block]) -> list[int]:
    """Layers with experts that are heads for further tokens: the last of the file's blocks."""
    first = model.number(_BLOCKS) - model.number(_HEADS)
    return [index for index in blocks if model.number(_HEADS) and index >= first]


def check_uniform(plan: PruningPlan, model: GgufModel) -> int:
    """The number of experts that each layer keeps.

    Raises:
        RequestError: If they keep different numbers.
    """
    if (count := plan.uniform_num_experts) is not None:
        return count
    counts = set(plan.without_heads.num_experts.values())
    raise RequestError(
        f"the layers of this plan keep {min(counts)} to {max(counts)} experts, and a GGUF file has one number for all "
        f"layers ({model.key(COUNT)}): llama.cpp would refuse the tensors of the others. Make the plan with "
        "allocation='uniform' (--allocation uniform), and skip no layers."
    )


def check_belongs(plan: PruningPlan, model: GgufModel, blocks: Mapping[int, Block]) -> str:
    """How it is known that a plan was made for a model (``routers.proof``).

    Raises:
        RequestError: If it was made for another.
    """
    known = ARCHITECTURES.get(plan.model_type, ())
    named = model.architecture in known
    stranger = f"this plan is for a {plan.model_type!r} model, and {model.path} is a {model.architecture!r} model" + (
        f" by llama.cpp's names (expected: {' or '.join(known)})." if known else " by llama.cpp's names."
    )
    try:
        _check_numbers(plan, model, blocks)
    except RequestError as error:
        if known and not named:
            raise RequestError(stranger) from error
        raise
    own = {index: block for index, block in blocks.items() if index not in heads_of(model, blocks)}
    try:
        found = proof(plan, model, own, plan.top_k)
    except RequestError as error:
        if known and not named:
            raise RequestError(stranger) from error
        raise
    if not named and found != EXACT:
        raise RequestError(stranger)
    return found


def _check_numbers(plan: PruningPlan, model: GgufModel, blocks: Mapping[int, Block]) -> None:
    """Raise unless a plan fits a model by its layers and numbers."""
    when = "A plan is applied to the model it was made for, before pruning."
    count, used = num_experts(model), model.value(_USED)
    if isinstance(used, tuple):  # one for each layer
        used = next(iter(set(used))) if len(set(used)) == 1 else used
    if used != plan.top_k:
        raise RequestError(
            f"this plan is for another model, with top_k {plan.top_k}; {model.path} has {model.key(_USED)} = {used}. "
            f"{when}"
        )
    own = plan.without_heads.original_num_experts
    other = next((layer for layer, number in sorted(own.items()) if number != count), None)
    if other is not None:
        raise RequestError(
            f"this plan is for another model, with {own[other]} experts in layer {other}; {model.path} has {count}. "
            f"{when}"
        )
    layers = set(blocks) - set(heads_of(model, blocks))
    if layers != set(own):
        raise RequestError(
            f"this plan is for another model, with experts in layers {spans(own)}; {model.path} has them in layers "
            f"{spans(layers)}. {when}"
        )


def check_count(plan: PruningPlan, model: GgufModel, count: int) -> None:
    """Raise unless llama.cpp opens a model with so many experts, in the groups that its routers have.

    Raises:
        RequestError: Naming the layer and its groups.
    """
    groups, total = model.number(_GROUPS), num_experts(model)
    if groups and groups >= count:
        raise RequestError(
            f"each layer would keep {count} experts, and the router has {groups} groups ({model.key(_GROUPS)}): "
            f"llama.cpp opens only files with more experts than groups. Keep {2 * groups} or more."
        )
    for layer, experts in sorted(plan.retained.items()) if groups > 1 else ():
        each = [sum(expert * groups // total == group for expert in experts) for group in range(groups)]
        if len(set(each)) > 1:
            raise RequestError(
                f"layer {layer}: the plan retains {', '.join(map(str, each))} experts of the router's {groups} "
                "groups, and each must keep the same number."
            )


def check_keys(model: GgufModel) -> None:
    """Raise if the file has a key that may count experts in a way that is not known.

    Raises:
        RequestError: Naming it.
    """
    count = num_experts(model)
    for name, key in model.parts[0].keys.items():
        below = name.removeprefix(f"{model.architecture}.")
        if below == name or "expert" not in below or below in (COUNT, *_NO_COUNTS):
            continue
        value = key.value
        counts = value == count or (isinstance(value, tuple) and (len(value) == count or count in value))
        if (key.kind == ARRAY and value is None) or counts:
            raise RequestError(
                f"{model.path}: the key {name} may count the {count} experts, and what it says is not known; prune "
                "the original checkpoint, and convert what comes out."
            )


def with_heads_settled(
    plan: PruningPlan, model: GgufModel, blocks: Mapping[int, Block], count: int
) -> tuple[PruningPlan, list[str]]:
    """A plan that says what becomes of the heads of a file, and of these alone; and notes of it.

    Heads have as many experts as the layers, since the file has one number. One that the plan does not know keeps
    those with the largest rows in its router.
    """
    heads = heads_of(model, blocks)
    if set(plan.heads) - set(heads):  # most files are converted without
        there = {head: plan.retained[head] for head in plan.heads if head in heads}
        plan = _with(plan.without_heads, there, num_experts(model))
    notes: list[str] = []
    unknown = [head for head in heads if head not in plan.retained or len(plan.retained[head]) != count]
    if unknown:
        groups = max(1, model.number(_GROUPS))
        chosen = {head: _largest(model.values(blocks[head].router), count, groups) for head in unknown}
        plan = _with(plan, chosen, num_experts(model))
        notes.append(
            f"head{'s' if len(unknown) > 1 else ''} for further tokens (layer {spans(unknown)}): the experts with the "
            f"largest rows in the router are retained, {count} as in the layers, since a GGUF file has one number"
        )
    return plan, notes


def _with(plan: PruningPlan, heads: Mapping[int, Sequence[int]], total: int) -> PruningPlan:
    if not heads:
        return plan
    scores = None if plan.scores is None else {k: v for k, v in plan.scores.items() if k not in heads}
    return replace(
        plan,
        retained={**plan.retained, **{head: tuple(experts) for head, experts in heads.items()}},
        original_num_experts={**plan.original_num_experts, **dict.fromkeys(heads, total)},
        scores=scores,
        heads=tuple(sorted({*plan.heads, *heads})),
    )


def _largest(router: torch.Tensor, count: int, groups: int) -> tuple[int, ...]:
    """The experts with the largest rows in a router, as many of each group."""
    norms = torch.linalg.vector_norm(router.double(), dim=1).reshape(groups, -1)
    best = norms.argsort(dim=1, descending=True, stable=True)[:, : count // groups]
    return tuple(sorted((best + torch.arange(groups)[:, None] * norms.shape[1]).flatten().tolist()))
