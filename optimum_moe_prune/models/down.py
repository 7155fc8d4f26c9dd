# SPDX-License-Identifier: Apache-2.0
"""The last matrix of each expert, its *down projection*, and what goes into it.

Which of an expert's tensors that is, and which way round it lies, is found by watching one expert run. An expert's
output has to be linear in it: where something follows that is not, as a norm, the expert has no such matrix.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..architectures.structure import owner, part
from ..compat.experts import run_plainly
from ..errors import RunError
from .blocks import MoEBlock
from .widened import WIDENING

_TOKENS = 5  # random ones, by which it is found
_VIEWS = {
    "to", "type", "float", "double", "half", "bfloat16", "t", "transpose", "contiguous", "type_as", "permute", "mT",
    "__get__", "__getitem__", "select", "squeeze", "view", "reshape", "swapaxes",
}  # fmt: skip
_PRODUCTS = {
    "linear", "mm", "bmm", "matmul", "addmm", "baddbmm", "__matmul__", "__rmatmul__", "einsum", "_grouped_mm",
    "grouped_mm", "grouped_mm_fallback",
}  # fmt: skip


@dataclass(frozen=True)
class Down:
    """Where the down projections of a block's experts are.

    Attributes:
        path: Of the tensor, below the decoder layer; below the expert, where each is a module of its own.
        transposed: Whether an expert's matrix is ``(I, H)``, and its product ``x W``; else ``(H, I)`` and ``x W^T``.
        width: I, the numbers that go into it.
        repeats: Rows that the expert's forward makes of a token.
        alternates: Whether these follow one another; else all tokens follow one another, and then all again.
    """

    path: str
    transposed: bool
    width: int
    repeats: int = 1
    alternates: bool = False


class SingleExpert:
    """One expert in a module of its own, in another precision, that can be run on any tokens.

    Args:
        block: The block, whose tensors are there.
        expert: Its id.
        dtype: The precision.
    """

    def __init__(self, block: MoEBlock, expert: int, dtype: torch.dtype = torch.float32) -> None:
        structure = block.structure
        self.block, self.dtype, self.expert = block, dtype, expert
        self.scored = bool(getattr(block.rule, "on_input", False))
        self.at_least = 1 if self.scored else block.spec.at_least
        self.numbered = bool(structure.numbered)
        if self.numbered:
            experts: Any = block.experts
            source, cut = experts[expert], {}
        else:
            source = block.experts
            cut = {id(part(block.decoder_layer, path)): structure.tensors[path] for path in structure.expert_tensors}
        self.module = _copied(source, cut, expert, block.num_experts, dtype)
        if not self.numbered:
            start = f"{structure.experts}."
            for path, more in structure.counts.items():
                if path.startswith(start):
                    module, name = owner(self.module, path.removeprefix(start))
                    setattr(module, name, 1 + more)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors that are the expert's own, by path below it or below the decoder layer."""
        if self.numbered:
            return {path: part(self.module, path) for path in self.block.structure.numbered}
        start = f"{self.block.structure.experts}."
        paths = self.block.structure.expert_tensors
        return {path: part(self.module, path.removeprefix(start)) for path in paths}

    def __call__(self, x: Tensor) -> Tensor:
        """The expert's output ``(n, H)`` for what a block hands its experts ``(n, ...)``."""
        x = x.to(self.dtype)
        if self.scored:
            size = x.shape[1] - self.block.num_experts
            x = x[:, :size] * x[:, size + self.expert, None]
        if self.numbered or self.scored:
            return self.module(x)
        ids = torch.zeros(len(x), self.at_least, dtype=torch.int64, device=x.device)
        weights = torch.zeros(len(x), self.at_least, dtype=self.dtype, device=x.device)
        weights[:, 0] = 1
        return self.module(x, ids, weights)

    def features(self, x: Tensor, down: Down) -> tuple[Tensor, Tensor]:
        """What goes into its down projection ``(n, I)``, and its output ``(n, H)``."""
        with _Watching({id(self.tensors[down.path]): down.path}) as watching:
            output = self(x)
        rows = watching.inputs[-1].reshape(-1, down.width)
        if down.repeats > 1:
            rows = rows[:: down.repeats] if down.alternates else rows[: len(x)]
        return rows, output


def down_projection(block: MoEBlock) -> Down | None:
    """The down projections of a block's experts, whose tensors have to be there; None where outputs are not linear.

    It is found once for a block: on a few random tokens with the first expert.
    """
    single = SingleExpert(block, 0)
    x = _random_input(block, single)
    known = {id(tensor): path for path, tensor in single.tensors.items()}
    with torch.no_grad():
        with _Watching(known) as watching:
            output = single(x)
        if not watching.paths:
            return None
        path, rows = watching.paths[-1], watching.inputs[-1]
        width = rows.shape[-1]
        rows = rows.reshape(-1, width)
        matrix = single.tensors[path]
        matrix = matrix.reshape(matrix.shape[-2:])
        # By the change that another matrix makes: whatever is added, as a bias, falls away.
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1)).to(matrix.device)
        change = noise * matrix.std().clamp(min=1e-3)
        single.tensors[path].add_(change.view_as(single.tensors[path]))
        difference = single(x) - output
    repeats = len(rows) // len(x)
    if repeats * len(x) != len(rows):
        return None
    for alternates in (False, True) if repeats > 1 else (False,):
        own = rows[::repeats] if alternates else rows[: len(x)]
        for transposed in (False, True):
            w = change if transposed else change.T
            if w.shape == (width, output.shape[-1]) and _is_close(own @ w, difference):
                return Down(path, transposed, width, repeats, alternates)
    return None


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * b.abs().max()) and bool(b.abs().max() > 0)


def _random_input(block: MoEBlock, single: SingleExpert) -> Tensor:
    """Random tokens as wide as what the expert takes: what its router takes, or one of its own dimensions."""
    tensors = list(single.tensors.values())
    router = part(block.decoder_layer, block.structure.logits_from).shape[-1]
    widths = dict.fromkeys([router, *(size for tensor in tensors for size in reversed(tensor.shape))])
    for width in widths:
        x = torch.randn(_TOKENS, width, generator=torch.Generator().manual_seed(0)).to(tensors[0].device)
        if single.scored:
            x = torch.cat([x, x.new_ones(_TOKENS, block.num_experts)], dim=1)
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            single(x)
            return x
    raise RunError(
        f"layer {block.layer}: its experts take tokens of none of the widths {', '.join(map(str, widths))}."
    )


def _copied(source: nn.Module, cut: dict[int, Any], expert: int, count: int, dtype: torch.dtype) -> nn.Module:
    """A copy of a module with the part of one expert of each tensor in ``cut``, all in another precision."""
    memo: dict[int, Any] = {}
    for module in source.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            value = tensor.detach()
            if axis := cut.get(id(tensor)):
                rows = torch.tensor(axis.rows([expert], count), device=value.device)
                value = value.index_select(axis.axis, rows)
            own = value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(own, requires_grad=False) if is_parameter else own
        for value in vars(module).values():  # configs, and what else is no part of the module, is shared
            if not isinstance(value, (nn.Module, dict, list, int, float, str, bool, type(None), Tensor, torch.dtype)):
                memo.setdefault(id(value), value)
    made = copy.deepcopy(source, memo)
    for module in made.modules():
        module.__dict__.pop("forward", None)  # what stands in for it in the source
        if WIDENING in module.__dict__:
            del module.__dict__[WIDENING]
            module.__class__ = type(module).__mro__[1]  # its own
        run_plainly(module)
    return made


class _Watching(TorchFunctionMode):
    """Notes what tensors, or views and casts of them, are multiplied with, inside a ``with``.

    Args:
        tensors: Their names, by their ids.
    """

    def __init__(self, tensors: dict[int, str]) -> None:
        super().__init__()
        self._names = dict(tensors)
        self._held: list[Tensor] = []  # views: their ids stay theirs
        self.paths: list[str] = []
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        followed = [self._names[id(value)] for value in args if id(value) in self._names]
        if not followed:
            return output
        if name in _VIEWS and isinstance(output, Tensor) and id(args[0]) in self._names:
            self._names[id(output)] = followed[0]
            self._held.append(output)
        elif name in _PRODUCTS:
            others = [value for value in args if isinstance(value, Tensor) and id(value) not in self._names]
            if others and others[0].is_floating_point():
                self.paths.append(followed[0])
                self.inputs.append(others[0])
        return output
