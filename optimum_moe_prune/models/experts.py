# SPDX-License-Identifier: Apache-2.0
"""Watching a router and standing in for its experts, whichever way a block calls them.

The logits are caught where the router's own matrix is multiplied: what a router returns first may be probabilities,
capped, or fewer than it has rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RunError

OnLogits = Callable[[Tensor], None]
"""Takes a router's logits ``(T, E)``."""

_VIEWS = {
    "to", "type", "float", "double", "half", "bfloat16", "t", "transpose", "contiguous", "type_as", "permute",
    "__get__",
}  # fmt: skip
_PRODUCTS = {"linear", "mm", "matmul", "addmm", "__matmul__", "__rmatmul__"}


class ExpertsForward:
    """The experts' own forward: hidden states ``(T, H)``, ids and weights ``(T, K)`` -> weighted sum ``(T, H)``.

    Attributes:
        scores: Columns of the hidden states beyond ``H``, which multiply what goes into each expert.

    Args:
        forward: The module's.
        at_least: The fewest experts of a token that it can be called with.
    """

    scores = 0

    def __init__(self, forward: Callable[..., Tensor], at_least: int = 1) -> None:
        self._forward = forward
        self._at_least = at_least

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if (more := self._at_least - ids.shape[1]) > 0:  # the same once more, with no weight
            ids = torch.cat([ids, ids[:, :1].expand(-1, more)], dim=1)
            weights = torch.cat([weights, weights.new_zeros(len(weights), more)], dim=1)
        return self._forward(hidden, ids, weights)

    def renumbered(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Hidden states whose columns of scores are of these experts, with columns for all."""
        return hidden


StandIn = Callable[[ExpertsForward, Tensor, Tensor, Tensor], Tensor]
"""Takes the experts' forward and what they were called with; returns their output."""


class Observing:
    """Watches one block inside a ``with``.

    Hooks of accelerate live in the instances as well: this stands before them, and leaves them as they were.

    Args:
        experts: The module that is called with hidden states, ids and weights.
        router: The module that is called to route.
        weight: The tensor that its logits are products of.
        on_logits: Called with the logits.
        stand_in: Called in place of the experts.
        at_least: As in :class:`ExpertsForward`.
    """

    def __init__(
        self,
        experts: nn.Module,
        router: nn.Module,
        weight: Tensor,
        on_logits: OnLogits,
        stand_in: StandIn,
        at_least: int = 1,
    ) -> None:
        self.at_least = at_least
        self.experts = experts
        self.router = router
        self.weight = weight
        self.on_logits = on_logits
        self.stand_in = stand_in
        self._before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> None:
        self.experts_forward = self.experts.forward
        for module, forward in ((self.router, self._routing(self.router.forward)), (self.experts, self._experts)):
            self._before.append((module, module.__dict__.get("forward")))
            module.forward = forward

    def __exit__(self, *error: object) -> None:
        for module, before in reversed(self._before):
            if before is None:
                del module.forward
            else:
                module.forward = before

    def _routing(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def routing(*args: Any, **kwargs: Any) -> Any:
            with Product(self.weight) as product:
                output = forward(*args, **kwargs)
            if product.value is None:
                raise RunError(
                    f"the logits of {type(self.router).__name__} are no product of its own matrix; this router cannot "
                    "be observed."
                )
            self.on_logits(product.value)
            self.routed(args, output)
            return output

        return routing

    def routed(self, args: tuple[Any, ...], output: Any) -> None:
        """Called after the router with what went in and came out."""

    def _experts(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.stand_in(ExpertsForward(self.experts_forward, self.at_least), hidden, ids, weights)


class ObservingScaledInput(Observing):
    """Watches a block whose routers' scores multiply what goes into the experts (Llama 4).

    Its experts are called with a copy of the hidden states for each of them, already multiplied, and the copies are
    added up. Here each runs on its own tokens alone.
    """

    _top_k: int | None = None

    def routed(self, args: tuple[Any, ...], output: Any) -> None:
        self._hidden, self._scores = args[0].reshape(-1, args[0].shape[-1]), output[0]

    def _experts(self, hidden: Tensor) -> Tensor:  # type: ignore[override]  # called in its own way
        scores, plain = self._scores, self._hidden
        if self._top_k is None:  # the same for every batch
            self._top_k = min(int((scores != 0).sum(1).max()), scores.shape[1])
        ids = scores.topk(self._top_k, dim=1).indices
        own = _ScaledInput(self.experts, self.experts_forward, plain.shape[1])
        output = self.stand_in(
            own, torch.cat([plain, scores.to(plain.dtype)], dim=1), ids, torch.ones_like(ids, dtype=plain.dtype)
        )
        whole = torch.zeros_like(hidden)  # the block adds up the copies
        whole[: len(plain)] = output
        return whole


class _ScaledInput(ExpertsForward):
    """Experts that are run with their own scores on their input, one after the other, each on its tokens."""

    def __init__(self, experts: nn.Module, forward: Callable[..., Tensor], hidden_size: int) -> None:
        super().__init__(forward)
        self._module = experts
        self._size = hidden_size

    @property
    def scores(self) -> int:  # type: ignore[override]
        return len(next(self._module.parameters()))

    def renumbered(self, hidden: Tensor, ids: Tensor) -> Tensor:
        whole = hidden.new_zeros(len(hidden), self._size + self.scores)
        whole[:, : self._size] = hidden[:, : self._size]
        whole[:, self._size + ids] = hidden[:, self._size :]
        return whole

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        x, scores = hidden[:, : self._size], hidden[:, self._size :]
        output = torch.zeros_like(x)
        for expert, rows, slots in by_expert(ids):
            y = self._one(expert, x[rows] * scores[rows, expert, None])
            output.index_add_(0, rows, y * weights[rows, slots, None].to(y.dtype))
        return output

    def _one(self, expert: int, x: Tensor) -> Tensor:
        """One expert's output, by the module's own forward with that expert alone."""
        module = self._module
        held = dict(module.named_parameters(recurse=False))
        counts = {name: value for name, value in vars(module).items() if type(value) is int and value == self.scores}
        try:
            for name, tensor in held.items():
                setattr(module, name, nn.Parameter(tensor.detach()[expert : expert + 1], requires_grad=False))
            for name in counts:
                setattr(module, name, 1)
            return self._forward(x)
        finally:
            for name, value in {**held, **counts}.items():
                setattr(module, name, value)


def by_expert(ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert among ids ``(T, K)`` with the rows and the places in them where it stands, in their order.

    A device is asked once for how many there are of each.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    found, sizes = torch.stack([experts, counts]).tolist()
    for expert, places in zip(found, order.split(sizes), strict=True):
        yield expert, places // ids.shape[1], places % ids.shape[1]


class Product(TorchFunctionMode):
    """Catches the product of a matrix, or of a view or cast of it, with anything, inside a ``with``."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self._followed = [matrix]
        self.value: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.value is None:
            name = getattr(func, "__name__", "")
            if name in _VIEWS and args and self._follows(args[0]) and isinstance(output, Tensor):
                self._followed.append(output)
            elif name in _PRODUCTS and any(map(self._follows, args)):
                self.value = output
        return output

    def _follows(self, value: Any) -> bool:
        return any(value is followed for followed in self._followed)


def first_of(output: Any) -> Tensor:
    """A block's output, without what it returns beside it."""
    return output if isinstance(output, Tensor) else output[0]
