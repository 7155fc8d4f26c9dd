# SPDX-License-Identifier: Apache-2.0
"""What goes between memory and a card while the card calculates: through pinned memory, on a stream of its own.

On the processor nothing has to go anywhere: there is no lane, and everything is done at once and in place.

torch keeps the memory that it pins: a piece that is let go is used again when the copies asked for of it are done.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..storage.tensor_files import TensorEntry, dtype_of, read_into
from .devices import CPU, free_bytes, total_bytes

T = TypeVar("T")

_PIECE_BYTES = 16 * 2**20  # of a file, that are read while the piece before is copied
_THREADS = 4  # that read a layer's experts
_UNDER_WAY = 2  # what a batch gave: its hidden states, and what was chosen
_HEADROOM_BYTES = 2 * 2**30  # of a card, for what is calculated


class Lane:
    """Work on a card beside what is calculated there.

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What this thread asks of the card inside a ``with`` is done beside what is calculated."""
        with torch.no_grad(), self._module.stream(self._stream):
            yield

    def follow(self) -> None:
        """Have what is asked for aside from now on wait, on the card, for what was calculated until now."""
        self._stream.wait_stream(self._main())

    def mark(self) -> Any:
        """A mark behind what was asked for aside until now."""
        return self._stream.record_event()

    def hold(self, mark: Any) -> None:
        """Have what is calculated from now on wait, on the card, for a mark."""
        self._main().wait_event(mark)

    def wait(self, mark: Any) -> None:
        """Return when a mark is reached."""
        mark.synchronize()

    def used(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor that was made aside until what calculates with it is done."""
        tensor.record_stream(self._main())

    def used_aside(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor that was calculated until what is done with it aside is done."""
        tensor.record_stream(self._stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Ask for a copy, one of the two pinned."""
        target.copy_(source, non_blocking=True)

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes can be taken, and enough is left for what is calculated."""
        beside = max(_HEADROOM_BYTES, total_bytes(str(self.device)) // 10)
        return free_bytes(str(self.device)) >= nbytes + beside

    def _main(self) -> Any:
        return self._module.current_stream(self.device)


def lane_of(device: torch.device) -> Lane | None:
    """A lane to a card; None where nothing is copied beside what is calculated."""
    return Lane(device) if copies_aside(device) else None


def copies_aside(device: torch.device) -> bool:
    """Whether a device is a card that copies while it calculates."""
    return device.type not in (CPU, "meta") and hasattr(torch.get_device_module(device), "Stream")


def pinned(nbytes: int) -> Tensor:
    """Bytes in memory that cards can reach by themselves."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def read_onto(device: torch.device, check: Callable[[], None], file: int, entry: TensorEntry) -> Tensor:
    """A tensor of an open file on a card, as ``storage.tensor_files.read_tensor`` gives it in memory.

    Args:
        device: The card.
        check: Called before each piece; what it raises ends the reading.
        file: The file.
        entry: Where it lies there.
    """
    dtype = dtype_of(entry)
    made = torch.empty(entry.nbytes, dtype=torch.uint8, device=device)
    for begin in range(0, entry.nbytes, _PIECE_BYTES):
        check()
        piece = pinned(min(_PIECE_BYTES, entry.nbytes - begin))
        read_into(piece.numpy().data, file, entry.begin + begin)
        made[begin : begin + len(piece)].copy_(piece, non_blocking=True)
    return made.view(dtype).view(entry.shape)


def for_each(function: Callable[[T], None], items: Sequence[T], device: torch.device) -> None:
    """Call a function with each item: one after another on the processor, else in threads, for the caller's stream.

    Raises:
        Exception: The first that a call raised, in the order of the items; nothing runs any more then.
    """
    if not copies_aside(device):
        for item in items:
            function(item)
        return
    module: Any = torch.get_device_module(device)
    stream = module.current_stream(device)

    def call(item: T) -> None:
        with torch.no_grad(), module.stream(stream):
            function(item)

    with ThreadPoolExecutor(min(_THREADS, len(items) or 1)) as pool:
        calls = [pool.submit(call, item) for item in items]
        try:
            for each in calls:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device, on its way there while the device goes on calculating."""
    if tensor.device.type != CPU or device.type in (CPU, "meta") or not torch.accelerator.is_available():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def rows_of(tensor: Tensor, mask: Tensor) -> Tensor:
    """The elements ``(N, ...)`` of a tensor ``(B, L, ...)`` at the true places of a mask ``(B, L)`` in memory.

    Why: a device that is asked which places these are has to finish all it was asked for first.
    """
    rows, columns = sent(mask.nonzero().mT.contiguous(), tensor.device)
    return tensor[rows, columns]


class Carrier:
    """Carries hidden states from memory to where they are calculated with, and back.

    While one batch is calculated, the next one comes and the one before goes.

    Args:
        lane: To the card; None where there is none.
    """

    def __init__(self, lane: Lane | None) -> None:
        self._lane = lane
        self._going: deque[tuple[Any, Tensor, Tensor]] = deque()

    def each(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Tensors in memory where they are calculated with; copies, so that they are aligned as any tensor.

        Why: tensors in mapped files are aligned differently, and kernels round so.
        """
        lane = self._lane
        if lane is None:
            for tensor in tensors:
                yield tensor.clone()
            return
        coming: deque[tuple[Tensor, Any]] = deque()
        for tensor in tensors:
            coming.append(self._begin(lane, tensor))
            if len(coming) > 1:  # one is ahead
                yield self._arrived(lane, *coming.popleft())
        while coming:
            yield self._arrived(lane, *coming.popleft())

    def put(self, value: Tensor, target: Tensor) -> None:
        """Have a tensor that was calculated come into one in memory, some time before :meth:`finish` returns."""
        lane = self._lane
        if lane is None or value.device.type != lane.device.type:
            target.copy_(value)
            return
        value = value.contiguous()
        host = pinned(value.nbytes).view(value.dtype).view(value.shape)
        lane.follow()
        with lane.aside():
            lane.copy(host, value)
            lane.used_aside(value)
        self._going.append((lane.mark(), host, target))
        while len(self._going) > _UNDER_WAY:
            self._arrive(lane)

    def finish(self) -> None:
        """Return when everything has arrived."""
        while self._lane is not None and self._going:
            self._arrive(self._lane)

    @staticmethod
    def _begin(lane: Lane, tensor: Tensor) -> tuple[Tensor, Any]:
        host = pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        host.copy_(tensor)
        with lane.aside():
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=lane.device)
            lane.copy(value, host)
        return value, lane.mark()

    @staticmethod
    def _arrived(lane: Lane, value: Tensor, mark: Any) -> Tensor:
        lane.hold(mark)
        lane.used(value)
        return value

    def _arrive(self, lane: Lane) -> None:
        mark, host, target = self._going.popleft()
        lane.wait(mark)
        target.copy_(host)
