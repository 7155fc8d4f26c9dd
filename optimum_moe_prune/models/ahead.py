# SPDX-License-Identifier: Apache-2.0
"""The next layer is read while one runs: into the system's cache, or all the way onto a card."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.checkpoint import Checkpoint
from ..errors import MoEPruneError
from .transfers import Lane

logger = logging.getLogger(__name__)

_READ_AHEAD_BYTES = 8 * 2**20

Values = dict[str, Tensor]
"""A layer's parameters on a card, by name."""


class Stopped(Exception):
    """What is being read is not needed any more."""


class ReadAhead:
    """Reads bytes of files into the system's cache, in a thread; a file on the Hub is downloaded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(1)
        self._stop = False

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = True
        self._pool.shutdown(cancel_futures=True)

    def read(self, names: Sequence[str]) -> None:
        """Begin to read tensors."""
        self._pool.submit(self._read, names)

    def _read(self, names: Sequence[str]) -> None:
        buffer = memoryview(bytearray(_READ_AHEAD_BYTES))
        for name in names:
            try:
                entry = self._checkpoint.entry(name)
                file = os.open(self._checkpoint.path(self._checkpoint.tensors[name].file), os.O_RDONLY)
            except (OSError, MoEPruneError) as error:  # whoever needs the tensor meets it again
                logger.debug("reading ahead: %s", error)
                return
            try:
                for begin in range(entry.begin, entry.end, len(buffer)):
                    if self._stop:
                        return
                    os.preadv(file, [buffer[: entry.end - begin]], begin)
            finally:
                os.close(file)


class LayersAhead:
    """Makes the next layer on a card, in a thread, while one runs there. An error waits until the layer is asked for.

    Args:
        lane: To the card.
        make: Makes parameters by name; called in the thread with what raises :class:`Stopped` when they are not
            needed any more.
    """

    def __init__(self, lane: Lane, make: Callable[[Sequence[str], Callable[[], None]], Values]) -> None:
        self._lane = lane
        self._make = make
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="next layer")
        self._over = threading.Event()
        self._begun: dict[int, Future[tuple[Values, Any]]] = {}

    def __enter__(self) -> LayersAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._pool.shutdown(cancel_futures=True)
        self._begun.clear()

    def begin(self, index: int, names: Sequence[str], nbytes: int) -> bool:
        """Begin to make a layer.

        Returns:
            Whether there is room for it.
        """
        if not self._lane.has_room(nbytes):
            return False
        self._begun[index] = self._pool.submit(self._made, names)
        return True

    def take(self, index: int) -> Values | None:
        """A layer that was begun, when it is there; None where it was not, or turned out to find no room.

        Raises:
            MoEPruneError: Whatever reading it raised.
        """
        future = self._begun.pop(index, None)
        if future is None:
            return None
        try:
            values, mark = future.result()
        except torch.OutOfMemoryError:
            logger.debug("no room for layer %d beside the one before", index)
            return None
        self._lane.hold(mark)
        for value in values.values():
            self._lane.used(value)
        return values

    def _made(self, names: Sequence[str]) -> tuple[Values, Any]:
        with self._lane.aside():
            values = self._make(names, self._check)
            return values, self._lane.mark()

    def _check(self) -> None:
        if self._over.is_set():
            raise Stopped
