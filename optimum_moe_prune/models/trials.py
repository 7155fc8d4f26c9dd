# SPDX-License-Identifier: Apache-2.0
"""One MoE layer tried out: what its router does, and whether the layer without some experts is what is taken for it.

The model itself stays as it is. What is tried is a copy of the layer that shares its tensors, in which the router's
are replaced: by float32, by fewer rows, by numbers where all were alike, so that a bias of zeros can be seen.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.candidates import Observed
from ..architectures.routers import RoutingRule
from ..architectures.structure import owner
from ..errors import RequestError
from .blocks import MoEBlock, replace_tensor
from .experts import ExpertsForward, first_of


@dataclass(frozen=True)
class Call:
    """A MoE block and how its model calls it."""

    block: MoEBlock
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def observed_of(call: Call, few: Sequence[int]) -> tuple[list[Observed], list[Observed]]:
    """What a layer's router does in float32, with the states of a text and with random ones; and in bfloat16.

    Args:
        call: The layer.
        few: So few experts that sums of their weights may be small, which shows what is added to them; it is tried
            with these alone as well.

    Raises:
        RequestError: If it cannot be observed, and how it differs.
    """
    stirred = _copy(call.block, torch.float32, stir=True)
    found = [_observe(stirred, *_inputs(call, torch.float32, how)) for how in (_as_they_are, _random)]
    with contextlib.suppress(Exception):  # that it runs with fewer experts is proven later
        cut = _copy(stirred)
        cut.retain(few)
        found.append(_observe(cut, *_inputs(call, torch.float32, _random)))
    try:
        lower = [_observe(_copy(stirred, torch.bfloat16), *_inputs(call, torch.bfloat16, _random))]
    except (RequestError, RuntimeError, TypeError):  # code that knows float32 alone
        lower = []
    return found, lower


def check_call(call: Call) -> None:
    """Raise unless the experts are called in a way that is known.

    Raises:
        RequestError: Saying what they are called with.
    """
    block, seen = call.block, []
    if block.calls_modules:
        if not block.structure.block:
            raise RequestError(
                f"the experts of layer {block.layer} are modules that the decoder layer itself calls; they cannot be "
                "observed there."
            )
        return
    twin = _copy(block, torch.float32)
    if not isinstance(twin.router, nn.Module):
        raise RequestError(f"the router's {block.structure.logits_from} in layer {block.layer} is in no module of it.")

    class Called(Exception):
        pass

    def stand_in(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise Called

    twin.experts.forward = stand_in
    args, kwargs = _inputs(call, torch.float32, _as_they_are)
    try:
        with torch.no_grad():
            twin.module(*args, **kwargs)
    except Called:
        pass
    if not seen:
        raise RequestError(f"the experts of layer {block.layer} are not called as one module; it cannot be observed.")
    given, named = seen[0]
    tensors = [value for value in given if isinstance(value, Tensor)]
    if named or len(tensors) != len(given) or len(tensors) != 3 or not _is_routing(*tensors):
        said = [_said(value) for value in given] + [f"{name}={_said(value)}" for name, value in named.items()]
        raise RequestError(
            f"the experts of layer {block.layer} are called with ({', '.join(said)}), and not with hidden states, ids "
            "and weights of the chosen experts."
        )


def prove(call: Call, rule: RoutingRule, seed: int = 0) -> None:
    """Raise unless a layer without some experts is the same by rule, by restriction, and really cut.

    Args:
        call: The layer.
        rule: What its model's routers are taken to follow.
        seed: Decides which experts are left.

    Raises:
        RequestError: Naming what differs.
    """
    call = replace(call, block=replace(call.block, rule=rule))
    for share in (0.5,) if rule.formula else (0.0, 0.5, 1.0):  # what no rule says is looked at more often
        if (retained := _some(rule, call.block.num_experts, share, seed)) is not None:
            _prove_set(call, retained)


def _prove_set(call: Call, retained: list[int]) -> None:
    block, where = call.block, f"layer {call.block.layer}"
    try:
        if block.rule.formula:
            _prove_choice(call, retained, where)
        dtype = next(block.module.parameters()).dtype
        args, kwargs = call.args, call.kwargs
        cut = _copy(block)
        cut.retain(retained)
        with torch.no_grad():
            expected = first_of(cut.module(*args, **kwargs)).double()
            with block.restricted(retained):
                found = first_of(block.module(*args, **kwargs)).double()
            whole = first_of(block.module(*args, **kwargs)).double()
            with block.observed(lambda logits: None, _one_by_one):
                again = first_of(block.module(*args, **kwargs)).double()
    except RequestError:
        raise
    except Exception as error:  # whatever a model's code does with fewer experts
        raise RequestError(
            f"{where}: its block does not run with {len(retained)} of {block.num_experts} experts: {error}"
        ) from error
    tolerance = (1e-4 if dtype == torch.float32 else 5e-2) * float(expected.abs().max())
    for what, a, b in (("observed", again, whole), (f"restricted to {len(retained)} experts", found, expected)):
        if (difference := float((a - b).abs().max())) > tolerance:
            raise RequestError(
                f"{where}: its block, {what}, differs by {difference:.2g} from what the model really calculates "
                f"(largest number {float(expected.abs().max()):.2g})."
            )


def _one_by_one(own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts' output from each chosen one's own, as a calibration asks for them."""
    rows = hidden.repeat_interleave(ids.shape[1], dim=0)
    y = own(rows, ids.reshape(-1, 1), torch.ones_like(weights).view(-1, 1)).view(*ids.shape, -1)
    return (y * weights[..., None]).sum(1).to(y.dtype)


def _prove_choice(call: Call, retained: list[int], where: str) -> None:
    """Raise unless the rule gives what the router of a cut layer does."""
    inputs = _inputs(call, torch.float32, _random)
    base = _copy(call.block, torch.float32, stir=True)
    cut = _copy(base)
    cut.retain(retained)
    whole, less = _observe(base, *inputs), _observe(cut, *inputs)
    rule = base.rule.of_router(whole.tensors)
    ids, weights = rule.choose(whole.logits, retained)
    found = torch.tensor(retained)[less.ids]
    (ids, order), (found, own_order) = ids.sort(dim=1), found.sort(dim=1)
    if ids.shape != found.shape:
        raise RequestError(f"{where}: with {len(retained)} experts a token is sent to {found.shape[1]} of them.")
    same = (ids == found).all(1)
    if int((~same).sum()) > len(same) // 200:  # logits that are all but equal may be rounded apart
        raise RequestError(
            f"{where}: with {len(retained)} experts {int((~same).sum())} of {len(same)} tokens are sent elsewhere "
            "than by the rule."
        )
    difference = (weights.gather(1, order) - less.weights.float().gather(1, own_order))[same].abs().max()
    if float(difference) > 1e-4:
        raise RequestError(
            f"{where}: with {len(retained)} experts their weights differ by {difference:.2g} from the rule."
        )


def _observe(block: MoEBlock, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observed:
    """What a router does; its experts do not run."""
    seen: dict[str, Tensor] = {}

    def on_logits(logits: Tensor) -> None:
        seen["logits"] = logits.detach().reshape(-1, logits.shape[-1])

    def stand_in(own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        seen.update(ids=ids.detach(), weights=weights.detach())
        return torch.zeros_like(hidden)

    with torch.no_grad(), block.observed(on_logits, stand_in):
        block.module(*args, **kwargs)
    if {"logits", "ids"} - seen.keys():
        raise RequestError(f"layer {block.layer}: nothing is multiplied by {block.structure.logits_from} to route.")
    logits, ids, weights = (seen[name] for name in ("logits", "ids", "weights"))
    if logits.shape[1] != block.num_experts or not bool(torch.isfinite(logits).all()):
        raise RequestError(
            f"layer {block.layer}: its router gives {logits.shape[1]} logits for {block.num_experts} experts."
        )
    return Observed(
        block.layer,
        logits.cpu(),
        ids.cpu(),
        weights.cpu(),
        {k: t.detach().cpu() for k, t in block.router_tensors.items()},
    )


def _copy(block: MoEBlock, dtype: torch.dtype | None = None, stir: bool = False) -> MoEBlock:
    """A copy of a block's layer that shares all tensors; but those beside the experts in another precision."""
    layer = block.decoder_layer
    shared: dict[int, Any] = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    shared |= {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    twin = replace(block, decoder_layer=copy.deepcopy(layer, shared))
    experts = twin.experts
    kept = {id(t) for t in [*experts.parameters(), *experts.buffers()]}
    generator = torch.Generator().manual_seed(1)
    names = [*dict(twin.decoder_layer.named_parameters()), *dict(twin.decoder_layer.named_buffers())]
    routing = set(block.structure.router_tensors)
    for name in names:
        module, last = owner(twin.decoder_layer, name)
        tensor = getattr(module, last)
        if id(tensor) in kept or not tensor.is_floating_point() or (dtype is None and not stir):
            continue
        value = tensor.detach().to(dtype or tensor.dtype)
        if stir and name in routing and value.numel() and bool((value == value.flatten()[0]).all()):
            noise = torch.randn(value.shape, generator=generator).to(value)
            value = value + noise * (0.1 if value.numel() == block.num_experts else value.shape[-1] ** -0.5)
        replace_tensor(module, last, value)
    return twin


def _as_they_are(hidden: Tensor) -> Tensor:
    return hidden


def _random(hidden: Tensor) -> Tensor:
    """Normal numbers, a third of the tokens small, a third as large as the model's, a third large."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden)
    sizes = torch.tensor([0.3, 1.0, 3.0])[torch.randint(3, hidden.shape[:-1], generator=generator)].to(hidden)
    return noise * hidden.float().square().mean().sqrt().to(hidden) * sizes[..., None]


def _inputs(call: Call, dtype: torch.dtype, how: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments in a precision, the hidden states among them (the first tensor) changed."""
    changed = False

    def made(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, Tensor) and value.is_floating_point():
            value, first = value.to(dtype), not changed
            changed = True
            return how(value) if first else value
        return type(value)(map(made, value)) if type(value) in (tuple, list) else value

    return tuple(map(made, call.args)), {name: made(value) for name, value in call.kwargs.items()}


def _some(rule: RoutingRule, num_experts: int, share: float, seed: int) -> list[int] | None:
    """Experts that could be left, about that share of all where so many may be; None where all have to stay."""
    counts = [count for count in range(rule.fewest, num_experts) if rule.allows(count)]
    if not counts:
        return None
    count = min(counts, key=lambda n: abs(n - num_experts * share))
    groups, generator = rule.groups, random.Random(seed)
    width = num_experts // groups
    parts = [sorted(generator.sample(range(g * width, (g + 1) * width), count // groups)) for g in range(groups)]
    return [expert for experts in parts for expert in experts]


def _is_routing(hidden: Tensor, ids: Tensor, weights: Tensor) -> bool:
    return ids.ndim == 2 and ids.shape == weights.shape and not ids.is_floating_point() and weights.is_floating_point()


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)[:20]
