# SPDX-License-Identifier: Apache-2.0
"""A device that the processor plays, and how often the package has to wait for it.

Tensors that are marked, and all that is calculated from them, count as the device's. The package waits where it asks
for their numbers or for a shape that depends on them, and where it copies them to tensors that are not the device's.
What transformers does with a device is its own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import optimum_moe_prune

PACKAGE = str(Path(optimum_moe_prune.__file__).parent)
ASKING = {
    "item", "tolist", "numpy", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "equal",
    "allclose", "bincount", "__bool__", "__int__", "__float__", "__index__", "__len__", "__contains__",
}  # fmt: skip
GOING = {"cpu"}
STAYING = {"__len__"}


class Waits(TorchFunctionMode):
    """Counts inside a ``with``; ``places`` are the lines of the package that waited."""

    def __init__(self, of_device: Iterable[Tensor]) -> None:
        super().__init__()
        self._own: dict[int, weakref.ref[Tensor]] = {}
        self.places: list[str] = []
        for tensor in of_device:
            self._mark(tensor)

    def _mark(self, tensor: Tensor) -> None:
        self._own[id(tensor)] = weakref.ref(tensor)

    def _is_own(self, value: Any) -> bool:
        found = self._own.get(id(value))
        return found is not None and found() is value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = list(_tensors((args, kwargs)))
        own = [tensor for tensor in given if self._is_own(tensor)]
        output = func(*args, **kwargs)
        if not own:
            return output
        target = args[0] if args else None
        writes = isinstance(target, Tensor) and (
            (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        )
        masks = name in ("__getitem__", "index_put_") and any(
            tensor.dtype in (torch.bool, torch.uint8) and self._is_own(tensor) for tensor in given[1:]
        )
        leaves = name in GOING or (writes and not self._is_own(target))
        if (name in ASKING - STAYING) or masks or leaves:
            self._note(name)
        if leaves:
            return output.clone() if output is own[0] and name in GOING else output
        for tensor in _tensors(output):
            self._mark(tensor)
        return output

    def _note(self, name: str) -> None:
        frame = sys._getframe(2)
        while frame is not None and "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            self.places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {name}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
