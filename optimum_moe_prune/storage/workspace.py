# SPDX-License-Identifier: Apache-2.0
"""Where unfinished work is kept, so that it can go on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from .paths import partial_folder


@dataclass(frozen=True)
class Workspace:
    """A folder for unfinished work.

    Attributes:
        folder: Where it is kept, and continued by a later call for the same; None keeps nothing.
        restart: Begin anew, whatever the folder holds.
    """

    folder: Path | None = None
    restart: bool = False

    @classmethod
    def beside(cls, output: str | os.PathLike, restart: bool = False) -> Workspace:
        """The one of an output: the sibling ``.<name>.partial``, of which each kind of work takes a part."""
        return cls(partial_folder(output), restart)

    def part(self, name: str) -> Workspace:
        """One for a part of the work."""
        return self if self.folder is None else replace(self, folder=self.folder / name)

    def clear(self) -> None:
        """Remove what is kept: the work is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
