# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import RequestError, RunError
from .files import sync
from .outputs import is_output
from .targets import check_target, nearest_existing, partial_folder, real_path

_LOCK = "lock"


def check_space(folder: str | os.PathLike, nbytes: int) -> None:
    """Raise unless the disk of a folder, which may not exist yet, has room.

    Raises:
        RequestError: With what is needed and what is free.
    """
    free = shutil.disk_usage(nearest_existing(real_path(folder))).free
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
    target, partial = real_path(folder), partial_folder(folder)
    lock = FileLock(partial / _LOCK, timeout=0, is_singleton=True)
    if lock.is_locked:  # by a caller
        yield partial
        return
    made = [path for path in (partial, *partial.parents) if not path.exists()]
    if partial.exists() and any(partial.iterdir()) and not (partial / _LOCK).exists():
        raise RequestError(f"{partial} is in the way and was not made by this package; move it.")
    try:
        lock.acquire()  # makes the folder as well
    except Timeout as error:
        raise RequestError(f"another process is working on {folder}; wait for it, or name another folder.") from error
    except OSError as error:
        raise RunError(f"{partial} cannot be written: {error}.") from error
    try:
        _put_back(target)
        yield partial
    finally:
        unfinished = [path for path in partial.glob("*") if path.name != _LOCK]
        with contextlib.suppress(OSError):
            if not unfinished:
                (partial / _LOCK).unlink()
        lock.release()
        with contextlib.suppress(OSError):
            if unfinished:
                (partial / _LOCK).touch()  # some versions of filelock remove it; it shows whose folder this is
            partial.rmdir()
            for path in made[1:]:  # folders above, of no use without the target
                path.rmdir()


def _put_back(target: Path) -> None:
    """Put an earlier output back that an interrupted run had moved aside, and remove one that was replaced."""
    moved = _replaced(target)
    if not is_output(moved):
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
    sources = list(sources)
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
