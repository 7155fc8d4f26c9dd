# SPDX-License-Identifier: Apache-2.0
"""What distillation trains: of each MoE layer the down projections, the router's rows and the norm before them.

The norm is found and not listed: it is the last one whose output goes into the block, its router or its experts when
the layer runs. A model whose layers have none there (norms after the block, say) has none that is trained.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.structure import LayerStructure, owner, part, structure_of
from ..errors import RequestError
from ..models.blocks import MoEBlock
from ..models.down import Down, down_projection

EXPERTS, ROUTER, NORMS = "experts", "router", "norms"
ROLES = (EXPERTS, ROUTER, NORMS)
"""What can be trained: the down projections of retained experts, their rows of the router, the norm before both."""


@dataclass(frozen=True)
class Trained:
    """One parameter that is trained.

    Attributes:
        name: Its name in the model.
        role: One of ``ROLES``.
        layer: Index of its decoder layer.
        rows: Only so many of its first rows are trained; None trains all. Some routers have rows beyond the experts'.
        centre: What the model adds to it before it multiplies: 1 for norms whose weights are stored less one.
        width: How many numbers each of its outputs is a sum over; 1 for vectors.
    """

    name: str
    role: str
    layer: int
    rows: int | None = None
    centre: float = 0.0
    width: int = 1

    def moved(self, name: str, layer: int) -> Trained:
        """The same of another layer that is like its own."""
        return replace(self, name=name, layer=layer)


def check_roles(what: Sequence[str]) -> tuple[str, ...]:
    """What is to be trained, each once.

    Raises:
        RequestError: If something is not known, or nothing is named.
    """
    wrong = [role for role in what if role not in ROLES]
    if wrong or not what:
        raise RequestError(f"recover_what is {', '.join(what) or 'empty'}; what can be trained: {', '.join(ROLES)}.")
    return tuple(role for role in ROLES if role in what)


def trained_of(
    model: Any, blocks: Sequence[MoEBlock], what: Sequence[str], run: Callable[[], object]
) -> list[Trained]:
    """What is trained of some MoE layers, whose parameters have to be there, as they are.

    Args:
        model: The pruned model.
        blocks: The layers' blocks.
        what: Of ``ROLES``.
        run: Runs the layers on a few tokens; called only where norms have to be found.
    """
    layers = structure_of(model, blocks[0].spec).layers
    norms = norms_before(blocks, run) if NORMS in what else {}
    found = []
    downs: list[tuple[LayerStructure, Down | None]] = []
    for block in blocks:
        start = f"{layers}.{block.layer}."
        if EXPERTS in what:
            if not any(structure == block.structure for structure, _ in downs):  # alike layers are looked at once
                downs.append((block.structure, down_projection(block)))
            down = next(down for structure, down in downs if structure == block.structure)
            if down is not None:
                paths = _paths(block, down)
                found += [Trained(start + path, EXPERTS, block.layer, width=down.width) for path in paths]
        if ROUTER in what:
            path = block.structure.logits_from
            axis = block.structure.tensors[path]
            rows = block.num_experts * axis.each if axis.extra else None
            width = part(block.decoder_layer, path).shape[-1]
            found.append(Trained(start + path, ROUTER, block.layer, rows, width=width))
        if norm := norms.get(block.layer):
            found += [Trained(start + path, NORMS, block.layer, centre=norm.centre) for path in norm.paths]
    return found


def _paths(block: MoEBlock, down: Down) -> list[str]:
    """The down projections, by path below the decoder layer."""
    if not block.structure.numbered:
        return [down.path]
    return [f"{block.structure.experts}.{expert}.{down.path}" for expert in range(block.num_experts)]


@dataclass(frozen=True)
class Norm:
    """A norm whose output goes into a MoE block.

    Attributes:
        paths: Its parameters, by path below the decoder layer.
        centre: 1 where what multiplies is the weight and one more.
    """

    paths: tuple[str, ...]
    centre: float


def norms_before(blocks: Sequence[MoEBlock], run: Callable[[], object]) -> dict[int, Norm]:
    """By layer the last norm whose output goes into the block, its router or its experts, where there is one.

    Args:
        blocks: The blocks.
        run: Runs their layers on a few tokens.
    """
    with contextlib.ExitStack() as stack:
        watching = [stack.enter_context(_Watching(block)) for block in blocks]
        run()
    return {each.layer: norm for each in watching if (norm := each.norm()) is not None}


class _Watching:
    """Watches, inside a ``with``, which norms of a layer run, and what its block is given.

    A norm may stand in a module that does something more, as a gate after it: what that gives counts as well.
    """

    def __init__(self, block: MoEBlock) -> None:
        self.layer = block.layer
        self._fed = {block.module, block.router, block.experts} - {block.decoder_layer}
        inside = {module for fed in (block.router, block.experts) for module in fed.modules()}
        self._modules: dict[str, nn.Module] = dict(block.decoder_layer.named_modules())
        self._norms = {p: m for p, m in self._modules.items() if m not in inside and _is_norm(m)}
        self._norm_of: dict[str, str] = {}  # by the path of a module with a single norm in it
        for path, module in self._modules.items():
            own = [norm for norm in self._norms if norm == path or norm.startswith(f"{path}.")]
            if path and len(own) == 1 and not any(inner in self._fed for inner in module.modules()):
                self._norm_of[path] = own[0]
        self._given: dict[str, Tensor] = {}
        self._ran: list[tuple[str, Tensor]] = []  # kept, so that no other tensor takes their memory
        self._last: int | None = None

    def __enter__(self) -> _Watching:
        with contextlib.ExitStack() as hooks:
            for path in self._norm_of:
                made = functools.partial(self._on_output, path)
                hooks.callback(self._modules[path].register_forward_hook(made).remove)
            for module in self._fed:
                hooks.callback(module.register_forward_pre_hook(self._on_input, with_kwargs=True).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def norm(self) -> Norm | None:
        """The last norm that fed the block."""
        if self._last is None:
            return None
        path = self._ran[self._last][0]
        module = self._norms[path]
        names = [name for name, tensor in module._parameters.items() if tensor is not None]
        return Norm(tuple(f"{path}.{name}" for name in names), _centre(module, self._given[path]))

    def _on_output(self, path: str, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        if path in self._norms and args and isinstance(args[0], Tensor):
            self._given[path] = args[0]
        made = output[0] if isinstance(output, tuple) and output else output
        if isinstance(made, Tensor) and self._norm_of[path] in self._given:
            self._ran.append((self._norm_of[path], made))

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        fed = [number for number, (_, made) in enumerate(self._ran) if any(_shares(made, value) for value in given)]
        self._last = max((n for n in (self._last, *fed) if n is not None), default=None)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has nothing but vectors, as norms have."""
    own = [tensor for tensor in module._parameters.values() if tensor is not None]
    return bool(own) and not any(True for _ in module.children()) and all(t.ndim <= 1 for t in own)


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _centre(norm: nn.Module, given: Tensor) -> float:
    """1 where a norm without weights still lets through what it is given."""
    zeros = {name: torch.zeros_like(t) for name, t in norm._parameters.items() if t is not None}
    with torch.no_grad(), swapped(norm, zeros):
        return float(bool(norm(given).any()))


@contextlib.contextmanager
def swapped(module: Any, values: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in place of parameters, by name below a module, inside a ``with``: gradients flow to them."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, value in values.items():
            place, name = owner(module, path)
            before.append((place._parameters, name, place._parameters[name]))
            place._parameters[name] = value
        yield
    finally:
        for held, name, value in reversed(before):
            held[name] = value


def raw(module: Any, path: str) -> Tensor:
    """A parameter by its path, as it is (``widened`` modules show another)."""
    parent, _, name = path.rpartition(".")
    return part(module, parent)._parameters[name]
