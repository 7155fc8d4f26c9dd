# SPDX-License-Identifier: Apache-2.0
"""Experts that are modules of their own, which a block calls one by one, each with the tokens that chose it.

So remote code writes it, and transformers did before version 5. Ids and weights go through no call there. What a block
does with them is linear in what its experts give back, so they are measured: where an expert returns a large number in
a place of its own and zeros elsewhere, that place of the block's output holds the expert's weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.routers import RoutingRule
from ..errors import RunError
from .experts import ExpertsForward, OnLogits, Product, StandIn, by_expert, first_of


class ModulesForward(ExpertsForward):
    """As of other experts: each module runs on its own tokens.

    Args:
        forwards: The experts' own, by id.
    """

    def __init__(self, forwards: Sequence[Callable[[Tensor], Any]]) -> None:
        self._forwards = forwards

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output: Tensor | None = None
        for expert, rows, slots in by_expert(ids):
            y = self._forwards[expert](hidden[rows])
            if output is None:
                output = y.new_zeros(len(hidden), y.shape[-1])
            output.index_add_(0, rows, (y * weights[rows, slots, None]).to(y.dtype))
        return torch.zeros_like(hidden) if output is None else output


class ObservingModules:
    """Watches a block with a list of experts inside a ``with``; as ``experts.Observing``.

    The block's own forward runs with experts that return zeros, which leaves what it adds to them, such as a shared
    expert's output; their sum comes from the stand-in and is added. Ids and weights are measured in the first call,
    and in all where the rule has no formula; in later calls they are the rule's, and each expert has to be called with
    as many tokens as the rule sends to it.

    Args:
        block: The module that calls them.
        experts: The list.
        weight: The tensor that the logits are products of.
        rule: The layer's rule.
        on_logits: Called with the logits.
        stand_in: Called in place of the experts.
    """

    def __init__(
        self,
        block: nn.Module,
        experts: nn.ModuleList,
        weight: Tensor,
        rule: RoutingRule,
        on_logits: OnLogits,
        stand_in: StandIn,
    ) -> None:
        self.block = block
        self.experts = experts
        self.weight = weight
        self.rule = rule
        self.on_logits = on_logits
        self.stand_in = stand_in
        self.is_proven = False

    def __enter__(self) -> None:
        self._before = self.block.__dict__.get("forward")
        self._forward = self.block.forward
        self.block.forward = self._run

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            del self.block.forward
        else:
            self.block.forward = self._before

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if given is None:
            raise RunError(f"a {type(self.block).__name__} is called without hidden states; it cannot be observed.")
        hidden = given.reshape(-1, given.shape[-1])
        forwards = [expert.forward for expert in self.experts]
        with Product(self.weight) as product, self._standing_in(0.0) as calls:
            output = self._forward(*args, **kwargs)
        if product.value is None:
            raise RunError(
                f"a {type(self.block).__name__} multiplies nothing by its router's matrix; it cannot be observed."
            )
        logits = product.value.reshape(-1, product.value.shape[-1])
        plain = first_of(output)
        measures = not self.is_proven or not self.rule.formula
        ids, weights = self._measured(plain, args, kwargs, logits) if measures else self.rule.choose(logits)
        self._check(calls, ids, weights)
        self.is_proven = True
        self.on_logits(logits)
        routed = self.stand_in(ModulesForward(forwards), hidden, ids, weights.to(hidden.dtype))
        whole = plain + routed.view(plain.shape).to(plain.dtype)
        return whole if isinstance(output, Tensor) else (whole, *output[1:])

    def _measured(
        self, plain: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights ``(T, K)`` of what the block does, by what it makes of numbers in places of their own."""
        width, count = plain.shape[-1], len(self.experts)
        size = 2.0 ** (10 if plain.dtype == torch.float16 else 20)  # beside it what the block adds is lost in rounding
        weights = torch.empty(len(logits), count, dtype=torch.float32, device=plain.device)
        for first in range(0, count, width):
            with self._standing_in(size, first):
                output = first_of(self._forward(*args, **kwargs))
            found = (output.float() - plain.float()).reshape(-1, width) / size
            weights[:, first : first + width] = found[:, : count - first]
        top_k = int((weights != 0).sum(1).max())
        key = (weights != 0).float() * 2 + logits[:, :count].float().sigmoid()  # the chosen first
        ids = key.topk(top_k, dim=1).indices
        return ids, weights.gather(1, ids)

    def _check(self, calls: dict[int, int], ids: Tensor, weights: Tensor) -> None:
        expected = ids[weights != 0].bincount(minlength=len(self.experts)).tolist()
        for expert, tokens in enumerate(expected):
            if calls.get(expert, 0) != tokens:
                raise RunError(
                    f"expert {expert} of a {type(self.block).__name__} is called with {calls.get(expert, 0)} tokens, "
                    f"and {tokens} are sent to it; such a block cannot be observed."
                )

    @contextlib.contextmanager
    def _standing_in(self, size: float, first: int = 0) -> Iterator[dict[int, int]]:
        """Experts that return ``size`` in the place of their number, from ``first`` on; the rows each was given."""
        calls: dict[int, int] = {}
        before = [expert.__dict__.get("forward") for expert in self.experts]

        def stand_in(number: int) -> Callable[..., Tensor]:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                calls[number] = calls.get(number, 0) + x.reshape(-1, x.shape[-1]).shape[0]
                y = torch.zeros_like(x)
                if size and first <= number < first + x.shape[-1]:
                    y[..., number - first] = size
                return y

            return forward

        try:
            for number, expert in enumerate(self.experts):
                expert.forward = stand_in(number)
            yield calls
        finally:
            for expert, forward in zip(self.experts, before, strict=True):
                if forward is None:
                    del expert.forward
                else:
                    expert.forward = forward


def keep_modules(experts: nn.ModuleList, retained: Sequence[int]) -> None:
    """Keep these experts of a list, numbered anew, in place: whoever holds the list has them."""
    kept = [experts[expert] for expert in retained]
    experts._modules.clear()
    experts.extend(kept)
