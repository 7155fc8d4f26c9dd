# SPDX-License-Identifier: Apache-2.0
"""Where an output is to be written, and whether it may."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import RequestError
from ..names import PLAN_NAME, STATS_NAME
from .outputs import output_fault
from .paths import check_parent, check_place, nearest_existing, partial_folder, real_path

_KINDS = {PLAN_NAME: "a pruned checkpoint", STATS_NAME: "statistics"}

__all__ = ["check_parent", "check_target", "nearest_existing", "partial_folder", "real_path"]


def check_target(
    folder: str | os.PathLike,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike | None] = (),
    marker: str | None = None,
) -> Path:
    """The target as a path, if it may be written.

    Args:
        folder: The target.
        overwrite: Whether an earlier output there may be replaced.
        sources: What is read to make the output, and must outlive it.
        marker: The file that marks what is to be written (``outputs.MARKERS``): an output of another kind, hours of
            calibration perhaps, is not replaced by it.

    Raises:
        RequestError: If it exists and is not an empty folder, unless ``overwrite`` allows replacing an earlier output
            that holds nothing else; if it is a source, or holds one; if it is the current or the home folder, or holds
            one; or if it may not be written.
    """
    target = check_place(folder)
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
                "another folder, or move what is to be kept."
            )
        if marker is not None and not (target / marker).is_file():
            raise RequestError(
                f"{folder} holds {_KINDS[STATS_NAME if marker == PLAN_NAME else PLAN_NAME]}, which {_KINDS[marker]} "
                "would replace; name another folder."
            )
    check_parent(target)
    return target
