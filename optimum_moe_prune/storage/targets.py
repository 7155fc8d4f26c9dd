# SPDX-License-Identifier: Apache-2.0
"""Where an output is to be written, and whether it may."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import RequestError
from .outputs import output_fault


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
    target = real_path(folder)
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
        if fault := output_fault(target):
            raise RequestError(
                f"{folder} holds something else than an output of this package and is not replaced: {fault}. Name "
                "another folder."
            )
    check_parent(target)
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
