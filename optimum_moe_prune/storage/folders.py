# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import RequestError, RunError
from ..progress.pace import size
from .files import sync
from .outputs import is_output, list_files, output_fault
from .paths import nearest_existing, partial_folder, real_path
from .targets import check_target

logger = logging.getLogger(__name__)

_LOCK = "lock"
_OUTPUT = "output"
"""What is being written."""
_REPLACED = "replaced"
"""An earlier output, whole, from the first of the two renames by which it is replaced."""
_REMOVED = "removed"
"""An earlier output that is being removed."""


def check_space(folder: str | os.PathLike, nbytes: int) -> None:
    """Raise unless the disk of a folder, which may not exist yet, has room.

    Raises:
        RequestError: With what is needed and what is free.
    """
    free = shutil.disk_usage(nearest_existing(real_path(folder))).free
    if nbytes > free:
        raise RequestError(
            f"writing {folder} takes {size(nbytes)}, and {size(free)} are free there; make room, or "
            "name a folder on another disk."
        )


@contextlib.contextmanager
def working_on(folder: str | os.PathLike) -> Iterator[Path]:
    """Hold a target for this process inside a ``with``, and its sibling ``.<name>.partial`` for unfinished work.

    An earlier output that an interrupted run had moved aside is put back first, or removed if it had been replaced.

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
    foreign = partial.exists() and (
        not partial.is_dir() or (any(partial.iterdir()) and not (partial / _LOCK).exists())
    )
    if foreign or partial.is_symlink():
        raise RequestError(f"{partial} is in the way and was not made by this package; move it.")
    try:
        lock.acquire()  # makes the folder as well
    except Timeout as error:
        raise RequestError(f"another process is working on {folder}; wait for it, or name another folder.") from error
    except OSError as error:
        raise RunError(f"{partial} cannot be written: {error}.") from error
    try:
        _recover(target, partial)
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


def _recover(target: Path, partial: Path) -> None:
    """Finish what an interrupted run had begun to replace: put the earlier output back, or remove it.

    Raises:
        RunError: If that cannot be done.
    """
    for removed in partial.glob(f"{_REMOVED}*"):
        shutil.rmtree(removed, ignore_errors=True)
    try:
        moved = [partial / _REPLACED]
        beside = target.with_name(f".{target.name}.replaced")  # where it waited before
        if not beside.is_symlink() and is_output(beside):
            moved.append(beside)
        for earlier in filter(Path.exists, moved):
            if not target.exists() or (target.is_dir() and not any(target.iterdir())):
                earlier.rename(target)
            else:
                _discard(earlier, target, partial, "" if is_output(target) else f"{target} was put in its place")
    except OSError as error:
        raise RunError(f"the earlier output in {partial} cannot be put back: {error}.") from error


def _discard(earlier: Path, target: Path, partial: Path, reason: str = "") -> None:
    """Remove an earlier output that was replaced; one that holds something else by now is kept beside the target.

    It is renamed before anything in it is removed, so that what is half removed is never taken for an output. What
    cannot be removed is left to the next command with this target.

    Args:
        earlier: The folder.
        target: What is in its place now.
        partial: The sibling for unfinished work.
        reason: To keep it in any case.
    """
    if fault := reason or output_fault(earlier):
        aside = _free_name(target.with_name(f"{target.name}.earlier"))
        earlier.rename(aside)
        logger.warning("the earlier output is kept as %s: %s.", aside, fault)
        return
    removed = _free_name(partial / _REMOVED)
    earlier.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _set_modes(output: Path) -> None:
    """Let whoever may read the folder read its files; libraries make some for their owner alone."""
    mode = output.stat().st_mode & 0o666
    for path in output.rglob("*"):
        if path.is_file():
            with contextlib.suppress(OSError):  # not every file system has modes
                path.chmod(mode)


def _free_name(path: Path) -> Path:
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(free for free in map(path.with_name, names) if not os.path.lexists(free))


@contextlib.contextmanager
def written_folder(
    folder: str | os.PathLike,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike | None] = (),
    marker: str | None = None,
) -> Iterator[Path]:
    """A new folder beside the target, renamed to it when the block ends without an error.

    Args:
        folder: The target.
        overwrite: As in :func:`check_target`.
        sources: As in :func:`check_target`.
        marker: As in :func:`check_target`.

    Yields:
        The folder to write into, inside the sibling ``.<name>.partial``. After an error it is removed and the target
        is as it was; what else the sibling holds stays.

    Raises:
        RequestError: If the target is in the way (:func:`check_target`).
        RunError: If something cannot be written.
    """
    sources = list(sources)
    check_target(folder, overwrite, sources, marker)
    with working_on(folder) as partial:
        target = check_target(folder, overwrite, sources, marker)  # an earlier output may be there again
        output, replaced = partial / _OUTPUT, partial / _REPLACED
        try:
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir()
            yield output
            list_files(output)
            _set_modes(output)
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
            for above in (target.parent, partial):
                with contextlib.suppress(OSError):  # not every file system can; the output is whole in any case
                    sync(above)
            if earlier:
                with contextlib.suppress(OSError):  # the next command with this target tries again
                    _discard(replaced, target, partial)
        except OSError as error:
            raise RunError(f"writing {folder} failed: {error}. Nothing was left there.") from error
        finally:
            shutil.rmtree(output, ignore_errors=True)
