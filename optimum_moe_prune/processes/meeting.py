# SPDX-License-Identifier: Apache-2.0
"""How processes agree: small values in the store by which torch.distributed has made them known to one another.

A process that fails comes to its next meeting with its error in place of a value, so that nobody waits for it; one
that ended is missed. Nothing goes through the devices, so that there is no limit to how long others may calculate.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import socket
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ..compat.distributed import default_store
from ..errors import MoEPruneError, RequestError, RunError, one_line
from ..progress import unseen
from .place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

PATIENCE_SECONDS = 1800.0
"""In which all have to begin shared work."""
GRACE_SECONDS = 10.0
"""In which the main process says what another failed with, before that one says it itself."""
_MISSED_SECONDS = 1.0
_LONGEST_WAIT = 0.2
_PIECE = 2**20

_PREFIX = "optimum_moe_prune"
_TOLD = "_others_know"  # an attribute of errors


def meet(processes: Place, value: T, patience: float | None = None) -> list[T]:
    """See :meth:`Processes.meet`.

    Args:
        processes: Which of them this is.
        value: What this one says.
        patience: Seconds to wait at most.
    """
    with _reachable(processes):
        store = _store(processes)
        number = _arrive(store, processes, ("fine", value))
        _wait(store, processes, number, patience)
        values = [_got(store, _key(number, rank))[1] for rank in range(processes.count)]
        if number > 1:  # whoever is here has read what was said there
            _drop(store, _key(number - 1, processes.rank))
        _have_read(store, processes, number, GRACE_SECONDS)
    return values


def look(processes: Place) -> None:
    """See :meth:`Processes.look`."""
    with _reachable(processes):
        store = _store(processes)
        number = store.add(f"{processes.rank}/met", 0) + 1
        if store.check([_failed(number)]):
            store.add(f"{processes.rank}/met", 1)
            raise _failure(store, processes, number)


@contextlib.contextmanager
def together(processes: Place) -> Iterator[None]:
    """See :meth:`Processes.together`."""
    try:
        meet(processes, None, PATIENCE_SECONDS)
        with contextlib.nullcontext() if processes.is_main else unseen():
            yield
    except BaseException as error:
        if not _is_told(error):
            with contextlib.suppress(Exception):  # they will miss it
                _tell(processes, error)
        raise


# ------------------------------------------------------------------------------------------- who says it


def says(processes: Place) -> bool:
    """See ``processes.says``: the main process, if it comes to it within some seconds."""
    if not _is_connected():  # they could not reach one another
        return True
    try:
        store = _store(processes)
        until = time.monotonic() + (0 if processes.is_main else GRACE_SECONDS)
        while time.monotonic() < until and not store.add("said", 0) and not _is_gone(store, 0):
            time.sleep(_LONGEST_WAIT / 2)
        return store.add("said", 1) == 1
    except Exception:  # the store went with the main process
        return processes.is_main


def missed(processes: Place) -> str | None:
    """Which of the others ended before the work was done, in words; None where none did."""
    if processes.is_alone or not _is_connected():
        return None
    with contextlib.suppress(Exception):
        return _gone(_store(processes), processes, range(processes.count))
    return None


def leave(processes: Place, wait: bool) -> None:
    """Take no further part, at the end of a program.

    Args:
        processes: Which of them this is.
        wait: Have the main process, with which the store may go, wait for the others for some seconds.
    """
    import torch.distributed as dist

    if not _is_connected():
        return
    with contextlib.suppress(Exception):
        store = _store(processes)
        store.set(f"{processes.rank}/left", "")
        others = [f"{rank}/left" for rank in range(1, processes.count)]
        until = time.monotonic() + (GRACE_SECONDS if wait and processes.is_main else 0)
        while time.monotonic() < until and not store.check(others):
            time.sleep(_LONGEST_WAIT / 20)
        dist.destroy_process_group()


def leave_word(processes: Place, value: object) -> None:
    """Leave something for the main process."""
    if not _is_connected():
        return
    with contextlib.suppress(Exception):
        _put(_store(processes), f"{processes.rank}/word", value)


def words(processes: Place) -> dict[int, Any]:
    """What the others have left for the main process, by rank."""
    found: dict[int, Any] = {}
    if not _is_connected():
        return found
    with contextlib.suppress(Exception):
        store = _store(processes)
        for rank in range(1, processes.count):
            if store.check([f"{rank}/word"]):
                found[rank] = _got(store, f"{rank}/word")
    return found


# ------------------------------------------------------------------------------------------- the store


def _is_connected() -> bool:
    """Whether the processes know one another."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def connect(processes: Place) -> None:
    """Have the processes know one another, by accelerate, unless they do.

    Raises:
        RunError: If they cannot reach one another.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise RunError("this build of torch lacks torch.distributed; start one process alone.")
    if dist.is_initialized():
        return
    from accelerate import PartialState

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    try:
        PartialState(cpu=devices < processes.local_count)
        if not dist.is_initialized():  # accelerate was asked before, and took this one to be alone
            dist.init_process_group("gloo")
    except (RuntimeError, ValueError, OSError) as error:
        said = one_line(str(error).splitlines()[0] if str(error) else type(error).__name__).rstrip(".")
        raise RunError(f"the {processes.count} processes cannot reach one another: {said}.") from error


def _store(processes: Place) -> Store:
    from torch.distributed import PrefixStore

    connect(processes)
    return PrefixStore(_PREFIX, default_store())


@contextlib.contextmanager
def _reachable(processes: Place) -> Iterator[None]:
    """Say of a store that is gone that the main process is."""
    try:
        yield
    except MoEPruneError:
        raise
    except RuntimeError as error:  # torch's, of connections
        who = "the main process" if not processes.is_main else "the launcher"
        raise RunError(f"{who} ended before the work was done.") from error


def _put(store: Store, key: str, value: object) -> None:
    """Put something into the store, which takes text, and no more than 8 MiB at once."""
    text = base64.b64encode(pickle.dumps(value)).decode()
    pieces = [text[first : first + _PIECE] for first in range(0, len(text), _PIECE)]
    for number, piece in enumerate(pieces[1:], 1):
        store.set(f"{key}/{number}", piece)
    store.set(key, f"{len(pieces)} {pieces[0]}")  # last: it says that all are there


def _got(store: Store, key: str) -> Any:
    """What :func:`_put` has put there."""
    count, _, text = store.get(key).partition(b" ")
    return pickle.loads(base64.b64decode(b"".join([text, *(store.get(f"{key}/{n}") for n in range(1, int(count)))])))


def _drop(store: Store, key: str) -> None:
    """Remove it; of a meeting to which this process came late there is none."""
    if not store.check([key]):
        return
    count, _, _ = store.get(key).partition(b" ")
    for name in (key, *(f"{key}/{number}" for number in range(1, int(count)))):
        store.delete_key(name)


def _key(number: int, rank: int) -> str:
    return f"{number}/{rank}"


def _failed(number: int) -> str:
    return f"{number}/failed"


def _arrive(store: Store, processes: Place, said: tuple[str, Any]) -> int:
    """Come to the next meeting; its number."""
    number = store.add(f"{processes.rank}/met", 1)
    if number == 1:
        _put(store, f"{processes.rank}/where", (_machine(), os.getpid()))
    _put(store, _key(number, processes.rank), said)
    return number


def _wait(store: Store, processes: Place, number: int, patience: float | None) -> None:
    """Return when all have come.

    Raises:
        MoEPruneError: If one has failed, is gone, or does not come.
    """
    began = looked = time.monotonic()
    pause = 0.001
    while True:
        if store.check([_failed(number)]):
            raise _failure(store, processes, number)
        if store.check([_key(number, rank) for rank in range(processes.count)]):
            return
        now = time.monotonic()
        if now - looked >= _MISSED_SECONDS:
            looked = now
            absent = [rank for rank in range(processes.count) if not store.check([_key(number, rank)])]
            if said := _gone(store, processes, absent):
                raise RunError(f"{said}.")
            if absent and patience is not None and now - began > patience:
                raise RunError(
                    f"process {absent[0]} of {processes.count} has not come to the shared work for "
                    f"{patience / 60:.0f} minutes; all processes have to make this call, or the one that makes it has "
                    "to say that it works alone (processes=ALONE, of optimum_moe_prune.processes)."
                )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_WAIT)


def _have_read(store: Store, processes: Place, number: int, seconds: float) -> None:
    """Have the main process, with which the store may go, wait for a while until all have read what was said."""
    read = store.add(f"{number}/read", 1)
    until = time.monotonic() + (seconds if processes.is_main else 0)
    pause = 0.0005
    while read < processes.count and time.monotonic() < until:
        time.sleep(pause)
        read, pause = store.add(f"{number}/read", 0), min(2 * pause, _LONGEST_WAIT)


# ------------------------------------------------------------------------------------------- failures


def _tell(processes: Place, error: BaseException) -> None:
    """Come to the next meeting with an error."""
    kind = "request" if isinstance(error, RequestError) else "run"
    if isinstance(error, MoEPruneError):
        message = str(error)
    elif isinstance(error, KeyboardInterrupt):
        message = "it was interrupted"
    else:
        message = f"{type(error).__name__}: {error}"
    setattr(error, _TOLD, True)
    store = _store(processes)
    number = _arrive(store, processes, ("failed", None))
    _put(store, _failed(number), (processes.rank, kind, message))
    _have_read(store, processes, number, _MISSED_SECONDS)


def _failure(store: Store, processes: Place, number: int) -> MoEPruneError:
    """What another process has failed with."""
    rank, kind, message = _got(store, _failed(number))
    store.add(f"{number}/read", 1)
    error = RequestError if kind == "request" else RunError
    found = error(f"process {rank} of {processes.count}: {message}")
    setattr(found, _TOLD, True)
    return found


def _is_told(error: BaseException | None) -> bool:
    """Whether the others know of an error, or of the one that it was made of."""
    while error is not None:
        if getattr(error, _TOLD, False):
            return True
        error = error.__cause__
    return False


def _machine() -> tuple[str, str]:
    """Where numbers of processes mean the same."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return socket.gethostname(), space


def _gone(store: Store, processes: Place, ranks: Iterable[int]) -> str | None:
    """Which of some processes is not there any more, in words."""
    gone = [rank for rank in ranks if rank != processes.rank and _is_gone(store, rank)]
    if not gone:
        return None
    return f"process {gone[0]} of {processes.count} ended before its work was done (was it killed, or out of memory?)"


def _is_gone(store: Store, rank: int) -> bool:
    """Whether a process of this machine is not there any more, or dead and not yet buried."""
    if not store.check([f"{rank}/where"]):
        return False
    machine, pid = _got(store, f"{rank}/where")
    if machine != _machine():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False
