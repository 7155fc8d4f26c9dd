# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import RequestError, RunError
from .files import sync

try:
    import fcntl
except ImportError:  # Windows: two processes on one target are not noticed there
    fcntl = None  # type: ignore[assignment]


MARKERS = ("moe_pruning_plan.json", "stats.json")
"""Files that show a folder to be an output of this package; only such a folder is ever replaced."""


_LOCK = "lock"


_held: set[Path] = set()


def check_target(
    folder: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike | None] = ()
) -> Path:
    """The target as a path, if it may be written.

    Args:
        folder: The target.
        overwrite: Whether an earlier output there may be replaced.
        sources: What is read to make the output, and must outlive it.

    Raises:
        RequestError: If it exists and is not an empty folder, unless ``overwrite`` allows replacing an earlier output;
            if it is a source, or holds one; or if it may not be written.
    """
    folder = Path(folder)
    target = _place(folder)
    for source in sources:
        if source is not None and os.path.exists(source) and Path(source).resolve().is_relative_to(target):
            raise RequestError(f"{folder} is or holds {source}, which is read; name another folder.")
    if target.exists() and not target.is_dir():
        raise RequestError(f"{folder} is a file; name a folder that is absent or empty.")
    if os.path.ismount(target):
        raise RequestError(f"{folder} is where a disk is mounted, and cannot be renamed into; name a folder in it.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise RequestError(
                f"{folder} exists and is not empty; name another folder, or allow replacing it (overwrite=True)."
            )
        if not any((target / marker).is_file() for marker in MARKERS):
            raise RequestError(
                f"{folder} holds something else than an output of this package and is not replaced; name another "
                "folder."
            )
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RequestError(f"{folder} cannot be written: {above} is not a folder that may be written to.")
    return target


def partial_folder(folder: str | os.PathLike) -> Path:
    """The sibling of a target that holds unfinished work."""
    target = _place(folder)
    return target.with_name(f".{target.name}.partial")


def _place(folder: str | os.PathLike) -> Path:
    """Where a target really is: renaming onto a link would put the output where the link is."""
    return Path(os.path.realpath(folder))


def check_space(folder: str | os.PathLike, nbytes: int) -> None:
    """Raise unless the disk of a folder, which may not exist yet, has room.

    Raises:
        RequestError: With what is needed and what is free.
    """
    target = _place(folder)
    above = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if nbytes > free:
        raise RequestError(
            f"writing {folder} takes {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or "
            "name a folder on another disk."
        )


@contextlib.contextmanager
def working_on(folder: str | os.PathLike) -> Iterator[Path]:
    """Hold a target for this process inside a ``with``, and its sibling ``.<name>.partial`` for unfinished work.

    An earlier output that an interrupted run had moved aside is put back first.

    Args:
        folder: The target.

    Yields:
        The sibling. It is removed in the end unless something is left in it.

    Raises:
        RequestError: If another process works on the target, or the sibling is something else.
        RunError: If something cannot be written.
    """
    target = _place(folder)
    partial = partial_folder(target)
    if partial in _held:  # by a caller
        yield partial
        return
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    if partial.exists() and any(partial.iterdir()) and not (partial / _LOCK).exists():
        raise RequestError(f"{partial} is in the way and was not made by this package; move it.")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _locked(partial / _LOCK)
    except OSError as error:
        raise RunError(f"{partial} cannot be written: {error}.") from error
    if lock is None:
        raise RequestError(f"another process is working on {folder}; wait for it, or name another folder.")
    _held.add(partial)
    try:
        _put_back(target)
        yield partial
    finally:
        _held.discard(partial)
        with contextlib.suppress(OSError):
            if [path.name for path in partial.iterdir()] == [_LOCK]:
                (partial / _LOCK).unlink()
            partial.rmdir()
            for path in made[1:]:  # folders above, of no use without the target
                path.rmdir()
        os.close(lock)


def _locked(path: Path) -> int | None:
    """An open lock, or None if another process has it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if fcntl is None:
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
        os.close(lock)  # whoever had it removed it in the meantime
        path.parent.mkdir(parents=True, exist_ok=True)


def _put_back(target: Path) -> None:
    """Put an earlier output back that an interrupted run had moved aside, and remove one that was replaced."""
    moved = _replaced(target)
    if not any((moved / marker).is_file() for marker in MARKERS):
        return
    try:
        if target.exists():
            shutil.rmtree(moved, ignore_errors=True)
        else:
            moved.rename(target)
    except OSError as error:
        raise RunError(f"{moved}, the earlier output, cannot be put back: {error}.") from error


@contextlib.contextmanager
def written_folder(
    folder: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike | None] = ()
) -> Iterator[Path]:
    """A new folder beside the target, renamed to it when the block ends without an error.

    Args:
        folder: The target.
        overwrite: As in :func:`check_target`.
        sources: As in :func:`check_target`.

    Yields:
        The folder to write into, inside the sibling ``.<name>.partial``. After an error it is removed and the target
        is as it was; what else the sibling holds stays.

    Raises:
        RequestError: If the target is in the way (:func:`check_target`).
        RunError: If something cannot be written.
    """
    check_target(folder, overwrite, sources)
    with working_on(folder) as partial:
        target = check_target(folder, overwrite, sources)  # an earlier output may be there again
        output, replaced = partial / "output", _replaced(target)
        try:
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            yield output
            for path in sorted(output.rglob("*"), reverse=True):
                sync(path)
            sync(output)
            earlier = target.exists() and any(target.iterdir())
            try:
                if earlier:
                    target.rename(replaced)
                output.rename(target)
            except BaseException:
                if replaced.exists() and not target.exists():
                    replaced.rename(target)
                raise
            with contextlib.suppress(OSError):  # not every file system can; the output is whole in any case
                sync(target.parent)
            if earlier:
                shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            raise RunError(f"writing {folder} failed: {error}. Nothing was left there.") from error
        finally:
            shutil.rmtree(output, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where an earlier output waits while it is replaced."""
    return target.with_name(f".{target.name}.replaced")
