# SPDX-License-Identifier: Apache-2.0
"""What is kept of unfinished work beside a target, in words."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..progress.pace import plural
from .paths import partial_folder
from .values import is_integer, read_json

PROGRESS_NAME = "progress.json"
"""In a folder of unfinished work: what it is of, and how far it is."""
PROCESS = "process-"
"""Folders of processes that share work are called so, and by a number."""


@dataclass(frozen=True)
class Kept:
    """Work of which some is kept.

    Attributes:
        what: What it is, as ``"calibration"``.
        finished: Steps that are finished.
        steps: All of them.
        unit: What a step is.
    """

    what: str
    finished: int
    steps: int
    unit: str

    @property
    def is_whole(self) -> bool:
        """Whether all of it is kept."""
        return self.finished >= self.steps

    def joined(self, other: Kept) -> Kept:
        """With what another process keeps of the same work: of batches each has its own, of layers all have all."""
        if self.unit == "batch":
            return replace(self, finished=self.finished + other.finished, steps=self.steps + other.steps)
        return replace(self, finished=min(self.finished, other.finished))

    def __str__(self) -> str:
        unit = self.unit if self.steps == 1 else plural(self.unit)
        if self.is_whole:
            return f"the whole {self.what} ({self.steps} {unit})"
        return f"{self.finished} of {self.steps} {unit} of the {self.what}"


def kept_beside(target: str | os.PathLike) -> list[Kept]:
    """What is kept beside a target; what cannot be read is not named."""
    found: dict[tuple[str, ...], Kept] = {}
    folder = partial_folder(target)
    for path in sorted(folder.rglob(PROGRESS_NAME)):
        try:
            values = read_json(path)
        except RequestError:
            continue
        finished: Any = values.get("finished")
        steps: Any = values.get("steps")
        if is_integer(finished) and is_integer(steps) and finished > 0:
            kept = Kept(str(values.get("what")), finished, steps, str(values.get("unit")))
            parts = path.parent.relative_to(folder).parts
            place = tuple(part for part in parts if not part.startswith(PROCESS))
            if len(place) < len(parts) and place in found:  # a part of one of several processes
                kept = found[place].joined(kept)
            found[place] = kept
    return list(found.values())


def kept_sentence(kept: list[Kept], target: str | os.PathLike) -> str:
    """``7 of 24 layers of the calibration are kept in .OUT.partial``."""
    partial = partial_folder(target)
    beside = Path(target).with_name(partial.name)  # as the target was written
    several = len(kept) > 1 or not kept[0].is_whole
    return f"{' and '.join(map(str, kept))} {'are' if several else 'is'} kept in " + str(
        beside if beside.exists() else partial
    )
