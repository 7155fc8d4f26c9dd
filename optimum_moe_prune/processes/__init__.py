# SPDX-License-Identifier: Apache-2.0
"""Several processes that share the work of one: which of them this is, and how they agree.

``accelerate launch`` and ``torchrun`` start a program several times, and say in the environment which is which. It is
read when work begins and not before; a process that is alone imports nothing for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from ..errors import RequestError
from .place import Place

P = ParamSpec("P")
T = TypeVar("T")

_NAMES = {
    "count": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "rank": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "local_rank": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "local_count": ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
"""What torchrun and accelerate, and launchers of MPI that accelerate knows, call each number."""


@dataclass(frozen=True)
class Processes(Place):
    """The processes that share work, and which of them this is; attributes are those of ``place.Place``."""

    def share(self, steps: int) -> range:
        """The numbers of the steps that are this process's, of so many: every count-th, since neighbours are alike."""
        return range(self.rank, steps, self.count)

    def meet(self, value: T) -> list[T]:
        """The values of all processes, by rank: each comes here with its own, and goes on when all are there.

        Raises:
            MoEPruneError: What another process failed with, or that it ended.
        """
        if self.is_alone:
            return [value]
        from . import meeting

        return meeting.meet(self, value)

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes; the others wait for it, and make nothing."""
        if self.is_alone:
            return make()
        made: Any = make() if self.is_main else None
        said: Any = self.meet(made)[0]
        return made if self.is_main else said

    def once(self, do: Callable[[], T]) -> T:
        """As :meth:`from_main`, when all are there: for what changes things that the others look at before."""
        self.meet(None)
        return self.from_main(do)

    def look(self) -> None:
        """Raise where another process has failed already, without waiting for anybody.

        Raises:
            MoEPruneError: What it failed with.
        """
        if not self.is_alone:
            from . import meeting

            meeting.look(self)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Have a failure of one process end the work of all, inside a ``with`` that all of them enter.

        Of processes that are not the main one no progress is shown.

        Raises:
            RunError: If not all of them enter it within half an hour.
        """
        if self.is_alone:
            yield
            return
        from . import meeting

        with meeting.together(self):
            yield


ALONE = Processes()


def shared(work: Callable[P, T]) -> Callable[P, T]:
    """Have a failure of one process end a function's work for all that share it (:meth:`Processes.together`).

    Which they are says its keyword ``processes``, or its keyword ``compute``; by default all that were launched.
    """

    @functools.wraps(work)
    def together(*args: P.args, **settings: P.kwargs) -> T:
        compute: Any = settings.get("compute")
        processes: Any = settings.get("processes") or (launched() if compute is None else compute.together)
        with processes.together():
            return work(*args, **settings)

    return together


def launched() -> Processes:
    """The processes that this one was started with, as torch.distributed or the environment say.

    Raises:
        RequestError: If the environment says that there are several, and not which one this is.
    """
    distributed = sys.modules.get("torch.distributed")
    local = {name: _number(name) for name in ("local_rank", "local_count")}
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, count = distributed.get_rank(), distributed.get_world_size()
    else:
        rank, count = _number("rank"), _number("count") or 1
    if count <= 1:
        return ALONE
    if rank is None or not 0 <= rank < count:
        said = "is not set" if rank is None else f"is {rank}"
        raise RequestError(
            f"WORLD_SIZE says that {count} processes share the work, and RANK {said}; start them by torchrun or "
            "accelerate launch, or unset WORLD_SIZE to work alone."
        )
    local_rank = rank if local["local_rank"] is None else local["local_rank"]
    return Processes(rank, count, local_rank, local["local_count"] or count)


def launch_note() -> str | None:
    """What is to be said where accelerate was asked for several processes and started one; None elsewhere."""
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") and "MASTER_ADDR" in os.environ
    if not asked or launched() != ALONE or _number("count") is not None:
        return None
    return (
        "this is one process: on CPUs accelerate launch starts several by MPI alone (--mpirun_hostfile). torchrun "
        "--nproc-per-node N starts several."
    )


def says(processes: Processes) -> bool:
    """Whether this is the process that tells people what all of them fail with; one of them is."""
    if processes.is_alone:
        return True
    from . import meeting

    return meeting.says(processes)


def cause(processes: Processes) -> str | None:
    """Why a launcher ends this process, where another one of this machine is gone; None elsewhere."""
    if processes.is_alone:
        return None
    from . import meeting

    return meeting.missed(processes)


def _number(name: str) -> int | None:
    """A number of the environment; None where nothing says it.

    Raises:
        RequestError: If it is none.
    """
    found = next(((variable, os.environ[variable]) for variable in _NAMES[name] if os.environ.get(variable)), None)
    if found is None:
        return None
    try:
        return int(found[1])
    except ValueError as error:
        raise RequestError(f"{found[0]} is {found[1]!r} in the environment, and has to be a number.") from error
