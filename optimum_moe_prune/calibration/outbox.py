# SPDX-License-Identifier: Apache-2.0
"""How what a layer gave on a device comes to the host: never inside a layer, and without a device that waits.

Large tensors set out when they are made, through pinned memory and beside what the device computes. What is small
stays until the batch is over, and goes out in one piece. On the host a thread of its own puts both where they belong.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.transfers import Lane, lane_of

_MOST_BYTES = 512 * 2**20  # that are on their way; beyond it the next waits for the first

Take = Callable[[Tensor], None]
"""Puts values where they belong; called with a tensor of the host."""


@dataclass(frozen=True)
class _Held:
    values: Tensor
    take: Take


class Outbox:
    """Brings values from devices to the host.

    Values of the host are handed over at once, in the order in which they come.
    """

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._lanes: dict[torch.device, Lane | None] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._begun = self._before = 0  # how many set out, in all and before the latest batch

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.shutdown(cancel_futures=True)
        self._held.clear()
        self._under_way.clear()

    def send(self, values: Tensor, take: Take) -> None:
        """Have large values taken, some time before :meth:`wait` returns."""
        if self._is_of_host(values):
            take(values)
        else:
            self._begin(values, [_Held(values, take)])

    def hold(self, values: Tensor, take: Take) -> None:
        """Have small values taken after the batch; as float64, if they come from a device."""
        if self._is_of_host(values):
            take(values)
        else:
            self._held.append(_Held(values, take))

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """What is computed for a batch, inside a ``with``: at its end the values that were held go out.

        An error of its own waits for those of its values: what went wrong first names itself.
        """
        try:
            yield
        except Exception:
            self._send_held()
            self.wait()
            raise
        self._send_held()
        while self._begun - len(self._under_way) < self._before:  # the latest stays under way: the device has work
            self._take_first()
        self._before = self._begun

    def wait(self) -> None:
        """Return when everything is taken.

        Raises:
            Exception: The first that a ``take`` raised, in the order of the values.
        """
        while self._under_way:
            self._take_first()

    def _is_of_host(self, values: Tensor) -> bool:
        return values.device.type == "cpu"

    def _send_held(self) -> None:
        by_device: dict[torch.device, list[_Held]] = {}
        for held in self._held:
            by_device.setdefault(held.values.device, []).append(held)
        self._held = []
        for together in by_device.values():
            self._begin(torch.cat([held.values.reshape(-1).double() for held in together]), together)

    def _begin(self, values: Tensor, parts: list[_Held]) -> None:
        """Set out; the parts are those that the values consist of, in their order."""
        while self._under_way and sum(size for size, _ in self._under_way) + values.nbytes > _MOST_BYTES:
            self._take_first()
        shapes = [part.values.shape for part in parts]
        takes = [part.take for part in parts]
        host, arrived = self._copy(values)

        def put() -> None:
            arrived()
            sizes = list(map(math.prod, shapes))
            with torch.inference_mode():  # a thread's own; in it both kinds of tensors can be written to
                pieces = host.reshape(-1).split(sizes) if len(sizes) > 1 else [host]
                for piece, shape, take in zip(pieces, shapes, takes, strict=True):
                    take(piece.view(shape))

        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "statistics")
        self._under_way.append((values.nbytes, self._writer.submit(put)))
        self._begun += 1

    def _take_first(self) -> None:
        self._under_way.popleft()[1].result()

    def _copy(self, values: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """A copy on the host, and what waits for it."""
        if values.device not in self._lanes:
            self._lanes[values.device] = lane_of(values.device)
        lane = self._lanes[values.device]
        if lane is None:
            return values.cpu(), lambda: None
        lane.follow()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        with lane.aside():
            lane.copy(host, values)
        lane.used_aside(values)
        return host, functools.partial(lane.wait, lane.mark())
