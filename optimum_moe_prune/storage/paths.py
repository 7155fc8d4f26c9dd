# SPDX-License-Identifier: Apache-2.0
"""Paths that an output may have, whatever lies there."""

from __future__ import annotations

import contextlib
import errno
import os
import unicodedata
from pathlib import Path

from ..errors import RequestError

_LONGEST = 64
"""Characters that the path of a file in an output is longer than that of the output, at most."""


def check_name(path: str | os.PathLike) -> Path:
    """The path of an output, if it names one.

    Raises:
        RequestError: If it is empty, as an unset variable of a shell is, or begins with a ``~``, a name no shell read.
    """
    name = os.fspath(path)
    if not name.strip() or "\0" in name:
        raise RequestError(
            f"the output's name is {name!r}, and names nothing (is a variable of the shell unset?); name what to "
            "write."
        )
    if os.path.expanduser(name) != name:
        raise RequestError(f"{name} is not the home folder: only a shell puts that in place of ~; write it in full.")
    return Path(path)


def check_spelling(path: str | os.PathLike) -> Path:
    """The path of an output as a person gave it, if files can be made there.

    Raises:
        RequestError: As :func:`check_name`, or if it holds what libraries cannot write to, or a terminal would obey;
            or if it is too long, or would be with what unfinished work is called.
    """
    name = os.fspath(check_name(path))
    if odd := next((c for c in name if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")), None):
        raise RequestError(f"the output's name {name!r} holds {odd!r}, which is no text; name another.")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):  # a root has no sibling
            os.lstat(partial_folder(name) / ("x" * _LONGEST))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RequestError(f"the output's name is too long ({name[:60]}...); name a shorter one.") from error
    return Path(path)


def check_place(folder: str | os.PathLike) -> Path:
    """Where a folder to write really is, if it may be put there as a whole.

    Raises:
        RequestError: If it is the folder one stands in, the home folder, or holds one of them: it would be replaced.
    """
    check_spelling(folder)
    try:
        target, here = real_path(folder), real_path(os.getcwd())
    except FileNotFoundError as error:
        raise RequestError(f"{folder} cannot be written: the current folder is not there any more.") from error
    for place, what in ((here, "the current folder"), (real_path(Path.home()), "the home folder")):
        if place.is_relative_to(target):
            verb = "is" if place == target else "holds"
            raise RequestError(f"the output {str(folder)!r} {verb} {what}; name a folder of its own for the output.")
    return target


def check_parent(path: Path) -> None:
    """Raise unless what will hold a file or folder may be written to.

    Raises:
        RequestError: Naming it.
    """
    above = nearest_existing(path.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RequestError(f"{path} cannot be written: {above} is not a folder that may be written to.")


def real_path(folder: str | os.PathLike) -> Path:
    """Where a target really is: renaming onto a link would put the output where the link is."""
    return Path(os.path.realpath(folder))


def partial_folder(folder: str | os.PathLike) -> Path:
    """The sibling of a target that holds unfinished work."""
    target = real_path(folder)
    return target.with_name(f".{target.name}.partial")


def nearest_existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    return next(above for above in (path, *path.parents) if above.exists())
