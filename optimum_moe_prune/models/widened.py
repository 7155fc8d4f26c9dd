# SPDX-License-Identifier: Apache-2.0
"""A model calculated in a wider precision than its weights have, which stay as they are.

Inside :func:`widened` every module finds, where it looks for a tensor of its own while the model runs, a wider copy of
it, which is gone when it was used. So the numbers are those of the model loaded in the wider precision, and memory is
not: experts run a few at a time, large matrices in pieces of their rows, and of embeddings only the rows that are
looked up are widened.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.structure import ExpertAxis, owner, part
from ..architectures.table import find_architecture
from ..compat import built_like, initialise
from ..errors import MoEPruneError, RequestError
from ..names import AUTO
from .blocks import MoEBlock, decoder_of, moe_blocks
from .checks import check_model, input_device
from .experts import ExpertsForward
from .precision import NARROW, computing_dtype, dtype_of_weights

logger = logging.getLogger(__name__)

PIECE_BYTES = 4 * 2**20
"""Of widened weights that are there at once; a single expert may be larger."""

WIDENING = "_widening"  # the attribute by which a module knows that it is widened
_Forward = Callable[..., Any]


def precision_of(model: Any, asked: str = AUTO) -> torch.dtype:
    """The precision to calculate a model in memory in: its own, or a wider one by :func:`widened`.

    Args:
        model: A causal language model in memory.
        asked: What was asked for by name; ``"auto"`` leaves it to the device (``precision.computing_dtype``).
    """
    weights = dtype_of_weights(model)
    if weights not in NARROW or not _can_be_widened(model):
        return weights
    chosen = computing_dtype(weights, input_device(model), asked)
    return weights if chosen in NARROW else chosen


@contextlib.contextmanager
def widened(model: Any, dtype: torch.dtype = torch.float32, in_pieces: bool = True) -> Iterator[None]:
    """Calculate in ``dtype`` inside a ``with``, whatever narrower precision a model's tensors are in.

    It stands outside what watches, restricts or replaces parts of the model inside it. The parameters themselves are
    at any time what they were; ``model.dtype`` is what is calculated in.

    Args:
        model: A causal language model in memory.
        dtype: The precision; where it is no wider than the model's, nothing changes.
        in_pieces: Of experts and matrices; else gradients can go through them, which need the whole.
    """
    is_narrower = any(_is_narrower(tensor, dtype) for tensor in (*model.parameters(), *model.buffers()))
    if not is_narrower or any(WIDENING in module.__dict__ for module in model.modules()):  # once is enough
        yield
        return
    widening = _Widening(dtype, in_pieces)
    try:
        widening.begin(model)
        yield
    finally:
        widening.end()


def _is_narrower(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype in NARROW and dtype not in NARROW


def _blocks_of(model: Any) -> list[MoEBlock]:
    """The MoE blocks of a model; none of one that has none, or whose architecture is not known."""
    try:
        return moe_blocks(model) if find_architecture(model.config) is not None else []  # nothing is tried out
    except MoEPruneError:
        return []


def _can_be_widened(model: Any) -> bool:
    """Whether a model has plain tensors, and all that is large would be widened in pieces.

    Experts in one tensor have to be known as such.
    """
    try:
        check_model(model)
    except RequestError:
        return False
    known = {module for block in _blocks_of(model) for module in block.experts.modules()}
    return not any(
        parameter.ndim == 3 and len(parameter) > 1
        for module in model.modules()
        if module not in known and not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )


class _Widening:
    """What is widened while a model runs, and how it was before."""

    def __init__(self, dtype: torch.dtype, in_pieces: bool) -> None:
        self.dtype, self._in_pieces = dtype, in_pieces
        self._running = 0
        self._in_place_of: dict[tuple[nn.Module, str], Tensor] = {}
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._forwards: list[tuple[nn.Module, _Forward | None]] = []
        self._rooms: dict[tuple[int, torch.Size, tuple[int, ...], torch.device], Tensor] = {}
        self._last: tuple[list[Tensor], tuple[int, int], list[Tensor]] | None = None  # the piece of experts before

    def begin(self, model: Any) -> None:
        blocks = _blocks_of(model)
        routers = {module for block in blocks for module in block.router.modules()}
        experts = {block.experts: block for block in blocks if not block.structure.numbered}
        modules: list[nn.Module] = list(model.modules())
        for module in modules:
            narrow = [tensor for tensor in _own(module).values() if _is_narrower(tensor, self.dtype)]
            if not narrow and not isinstance(getattr(type(module), "dtype", None), property):
                continue
            self._classes.append((module, type(module)))
            module.__dict__[WIDENING] = self
            module.__class__ = _widened_class(type(module))  # type: ignore[arg-type]  # a class has a hash
            if module in experts and narrow and self._in_pieces:
                self._replace(module, self._run_experts(experts[module]))
            elif not narrow or module in experts:
                continue
            elif isinstance(module, nn.Embedding) and module.max_norm is None:
                self._replace(module, self._looked_up(module, module.forward))
            elif not self._in_pieces or self._bytes(narrow) <= PIECE_BYTES or module in routers:
                continue
            elif type(module).__mro__[1] is nn.Linear:
                self._replace(module, self._by_rows(module, module.forward))
        self._in_place_of |= _remade_buffers(model, self.dtype)
        for root in dict.fromkeys((model, decoder_of(model)) if blocks else (model,)):
            self._replace(root, root.forward)

    def end(self) -> None:
        """Have every module be what it was."""
        for module, forward in reversed(self._forwards):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
        for module, own in self._classes:
            module.__class__ = own
            module.__dict__.pop(WIDENING, None)
        self._in_place_of.clear()
        self._rooms, self._last = {}, None

    def tensor(self, module: nn.Module, name: str, value: Tensor) -> Tensor:
        """What a module is to find in place of a tensor of its own."""
        if (found := self._in_place_of.get((module, name))) is not None:
            return found
        return value.to(self.dtype) if self._running and _is_narrower(value, self.dtype) else value

    def _bytes(self, tensors: list[Tensor]) -> int:
        return sum(tensor.numel() for tensor in tensors) * self.dtype.itemsize

    def _replace(self, module: nn.Module, forward: _Forward) -> None:
        """Have a module's forward be another, in which modules find widened tensors."""
        self._forwards.append((module, module.__dict__.get("forward")))
        module.forward = self._running_in(forward)

    def _running_in(self, real: _Forward) -> _Forward:

        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._running += 1
            try:
                return real(*args, **kwargs)
            finally:
                self._running -= 1

        return forward

    @contextlib.contextmanager
    def _finding(self, module: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Iterator[None]:
        """A module that finds other tensors than its own, and other plain attributes, inside a ``with``."""
        before = {name: getattr(module, name) for name in numbers}
        self._in_place_of |= {(module, name): tensor for name, tensor in tensors.items()}
        self._set(module, numbers)
        try:
            yield
        finally:
            self._set(module, before)
            for name in tensors:
                del self._in_place_of[module, name]

    @staticmethod
    def _set(module: nn.Module, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(module, name, value)

    # -- embeddings and large matrices

    def _by_rows(self, module: nn.Module, real: _Forward) -> _Forward:
        """A matrix in pieces of its rows, which never is there as a whole."""

        def forward(x: Tensor) -> Tensor:
            own = _own(module)
            weight = own["weight"]
            output: Tensor | None = None
            size = max(1, PIECE_BYTES // (weight.shape[1] * self.dtype.itemsize))
            for first in range(0, len(weight), size):
                rows = {name: tensor[first : first + size].to(self.dtype) for name, tensor in own.items()}
                with self._finding(module, rows, {}):
                    y = real(x)
                if output is None:
                    output = y.new_empty(*y.shape[:-1], len(weight))
                output[..., first : first + size] = y
            assert output is not None
            return output

        return forward

    def _looked_up(self, module: nn.Embedding, real: _Forward) -> _Forward:
        """Ids in place of rows that were widened; what a class does beside looking up is done as ever."""
        is_plain = type(module).forward is nn.Embedding.forward

        def forward(ids: Tensor) -> Tensor:
            weight = module._parameters["weight"]
            assert weight is not None
            if weight.is_meta:
                return real(ids)
            used, places = ids.unique(return_inverse=True)
            rows = {"weight": weight[used].to(self.dtype)}
            if is_plain:
                with self._finding(module, rows, {"padding_idx": None}):
                    return real(places)
            try:  # does it look up anything but the ids?
                with self._finding(module, rows, {"padding_idx": None}):
                    found = real(places)
            except IndexError:
                return real(ids)
            with self._finding(module, {"weight": weight}, {}):
                rounded = real(ids).to(found.dtype)
            tolerance = 0.05 * rounded.abs().amax(-1, keepdim=True)
            return found if bool(((found - rounded).abs() <= tolerance).all()) else real(ids)

        return forward

    # -- experts

    def _run_experts(self, block: MoEBlock) -> _Forward:
        """The experts' forward with a few of them at a time."""
        module, real = block.experts, block.experts.forward
        own = ExpertsForward(real, block.spec.at_least)
        start = f"{block.structure.experts}."
        axes = {path.removeprefix(start): block.structure.tensors[path] for path in block.structure.expert_tensors}
        counts = {p.removeprefix(start): more for p, more in block.structure.counts.items() if p.startswith(start)}

        @contextlib.contextmanager
        def piece(first: int, last: int) -> Iterator[None]:
            """These experts alone, widened."""
            whole = [_raw(module, path) for path in axes]
            with contextlib.ExitStack() as stack:
                for path, tensor in zip(axes, self._piece(whole, list(axes.values()), first, last), strict=True):
                    place, name = owner(module, path)
                    stack.enter_context(self._finding(place, {name: tensor}, {}))
                for path, more in counts.items():
                    place, name = owner(module, path)
                    stack.enter_context(self._finding(place, {}, {name: last - first + more}))
                yield

        def forward(*args: Any, **kwargs: Any) -> Any:
            whole = {path: _raw(module, path) for path in axes}
            count = next(axes[path].count(tensor.shape) for path, tensor in whole.items())
            size = max(1, PIECE_BYTES * count // max(1, self._bytes(list(whole.values()))))
            is_known = not kwargs and args and all(isinstance(value, Tensor) and value.ndim == 2 for value in args)
            if size >= count or not is_known or len(args) not in (1, 3):
                with piece(0, count):
                    return real(*args, **kwargs)
            pieces = [(first, min(first + size, count)) for first in range(0, count, size)]
            return _each(piece, pieces, real, *args) if len(args) == 1 else _sent(piece, pieces, own, *args)

        return forward

    def _piece(self, whole: list[Tensor], axes: list[ExpertAxis], first: int, last: int) -> list[Tensor]:
        """Some experts of tensors, widened; those that were asked for last are there still."""
        if self._last is not None:
            before, bounds, made = self._last
            if bounds == (first, last) and len(before) == len(whole) and all(map(operator.is_, before, whole)):
                return made
        parts = [
            tensor.narrow(axis.axis, first * axis.each, (last - first) * axis.each)
            for tensor, axis in zip(whole, axes, strict=True)
        ]
        if torch.is_grad_enabled():  # what is differentiated holds what it was calculated with
            return [part.to(self.dtype) for part in parts]
        made = [self._room(number, part).copy_(part) for number, part in enumerate(parts)]
        self._last = whole, (first, last), made
        return made

    def _room(self, number: int, like: Tensor) -> Tensor:
        """Where a widened tensor goes, in place of the one before: fresh memory takes as long as the widening."""
        key = (number, like.shape, like.stride(), like.device)
        if key not in self._rooms:
            self._rooms = {other: room for other, room in self._rooms.items() if other[0] != number}
            self._rooms[key] = torch.empty_like(like, dtype=self.dtype)
        return self._rooms[key]


_Piece = Callable[[int, int], contextlib.AbstractContextManager[None]]


def _each(piece: _Piece, pieces: list[tuple[int, int]], real: _Forward, hidden: Tensor) -> Tensor:
    """Experts that are called with an input for each, one expert's after another's: ``(E * T, H)``."""
    length = len(hidden) // pieces[-1][1]
    outputs = []
    for first, last in pieces:
        with piece(first, last):
            outputs.append(real(hidden[first * length : last * length]))
    return torch.cat(outputs)


def _sent(
    piece: _Piece, pieces: list[tuple[int, int]], own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Experts that are called with hidden states ``(T, H)``, ids and weights ``(T, K)``.

    Ids beyond all experts, of what a module does without weights, stay beyond those of the last piece.
    """
    top_k = ids.shape[1]
    ordered, order = ids.flatten().sort(stable=True)
    weights = weights.flatten()
    starts = torch.searchsorted(ordered, torch.tensor([first for first, _ in pieces], device=ids.device)).tolist()
    output: Tensor | None = None
    for (first, last), begin, end in zip(pieces, starts, [*starts[1:], len(ordered)], strict=True):
        if begin == end:
            continue
        slots = order[begin:end]
        rows = slots // top_k
        with piece(first, last):
            y = own(hidden[rows], ordered[begin:end, None] - first, weights[slots, None])
        if output is None:
            output = y.new_zeros(len(hidden), y.shape[-1])
        output.index_add_(0, rows, y)
    return torch.zeros_like(hidden) if output is None else output


# ------------------------------------------------------------------------------------------- modules


@functools.cache
def _widened_class(own: type[nn.Module]) -> type[nn.Module]:
    """A class of modules whose tensors are found widened, and which is otherwise the same."""

    def find(self: Any, name: str) -> Any:
        value = own.__getattr__(self, name)
        return self.__dict__[WIDENING].tensor(self, name, value) if isinstance(value, Tensor) else value

    members: dict[str, Any] = {"__getattr__": find, "__module__": own.__module__, "__doc__": own.__doc__}
    members["__qualname__"] = own.__qualname__
    if isinstance(getattr(own, "dtype", None), property):
        members["dtype"] = property(lambda self: self.__dict__[WIDENING].dtype)
    return type(own.__name__, (own,), members)


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors, as they are."""
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _remade_buffers(model: Any, dtype: torch.dtype) -> dict[tuple[nn.Module, str], Tensor]:
    """Buffers that no checkpoint holds, as transformers makes them in a precision; not where it does not say how."""
    found = {
        (path, name): module
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set and _is_narrower(buffer, dtype)
    }
    made: dict[tuple[nn.Module, str], Tensor] = {}
    if not found:
        return made
    try:
        twin = built_like(model, copy.deepcopy(model.config), dtype)
        for (path, name), module in found.items():
            place, own = part(twin, path), _own(module)[name]
            device = "cpu" if own.is_meta else own.device
            setattr(place, name, torch.full(own.shape, torch.nan, dtype=dtype, device=device))
            initialise(twin, place)
            value = _own(place)[name]
            if value.shape == own.shape and bool(value.isfinite().all()):
                made[module, name] = value
    except Exception as error:  # code that builds no second model: they are rounded then
        logger.debug("buffers cannot be made anew: %s", error)
    return made


def _raw(module: nn.Module, path: str) -> Tensor:
    """A tensor by its path, as it is."""
    parent, _, name = path.rpartition(".")
    return _own(part(module, parent))[name]
