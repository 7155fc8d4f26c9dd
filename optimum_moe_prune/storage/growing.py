# SPDX-License-Identifier: Apache-2.0
"""Where a calibration grows: in memory, in files the system may page out, or in a folder where it can be continued."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError, RunError
from .files import sync, write_json
from .folders import check_space
from .tensor_files import MappedTensors, Shapes, shapes_bytes
from .values import Json, Values, check_version, is_integer, read_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
IN_MEMORY_BYTES = 512 * 2**20
"""What a calibration keeps in memory at most; beyond it, its tensors live in files mapped into memory."""

_PROGRESS = "progress.json"


class Store:
    """Makes the tensors of a calibration.

    Without a folder they are in memory up to ``IN_MEMORY_BYTES`` in all, and beyond that in temporary files that are
    mapped into memory and go away by themselves. Numbers do not depend on it.

    Args:
        folder: Where to keep them so that an interrupted calibration can be continued.
        of: What the calibration is of, as nested plain values: a later run with something else is refused.
        restart: Begin anew, whatever the folder holds.
        what: What it is called in messages.

    Attributes:
        finished: How many steps an earlier run had finished, and this one since.
        spilled: Whether anything is in files.

    Raises:
        RequestError: If the folder holds an unfinished calibration of something else, or a damaged one.
        RunError: If the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path | None = None,
        of: Values | None = None,
        restart: bool = False,
        what: str = "calibration",
    ) -> None:
        self.folder = folder
        self._what = what
        self.finished = 0
        self.spilled = folder is not None
        self._in_memory = 0
        self._sizes: dict[str, int] = {}
        self._files: dict[str, MappedTensors] = {}
        self._of = json.loads(json.dumps(of or {}))
        if folder is None:
            return
        progress = None if restart else unfinished(folder)
        if progress is None:
            self._begin(folder)
            return
        there, self.finished = progress
        if differences := list(_differences(there, self._of)):
            raise RequestError(
                f"{folder} holds an unfinished {what} of something else: {'; '.join(differences)}. Run the "
                "command that began it to continue, or begin anew (restart=True)."
            )
        if self.finished:
            logger.warning("continuing the unfinished %s in %s.", what, folder)

    def _begin(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            sync(folder.parent)
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error}.") from error

    def check_steps(self, steps: int) -> None:
        """Raise if more was finished than there is to do.

        Raises:
            RequestError: The folder is damaged then.
        """
        if self.finished > steps:
            raise RequestError(
                f"the unfinished {self._what} in {self.folder} is damaged: it says that {self.finished} steps of "
                f"{steps} are finished. Begin anew (restart=True)."
            )

    def tensors(self, name: str, shapes: Shapes | None, keep: bool = False) -> Mapping[str, Tensor]:
        """Tensors of zeros, or what an earlier run left in them.

        Args:
            name: What they are, as the name of a file.
            shapes: Shape and dtype of each; None takes what is in the folder as it is.
            keep: Take what is in the folder.

        Raises:
            RequestError: If what is there is damaged.
            RunError: If the disk is full.
        """
        nbytes = shapes_bytes(shapes or {})
        if self.folder is None and shapes is not None and self._in_memory + nbytes <= IN_MEMORY_BYTES:
            self._in_memory += nbytes
            self._sizes[name] = nbytes
            return {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in shapes.items()}
        try:
            if self.folder is not None:
                path = self.folder / name
                if shapes is None or keep:
                    file = MappedTensors.open(path)
                    if shapes is not None and {key: (tuple(t.shape), t.dtype) for key, t in file.items()} != shapes:
                        raise RequestError(f"{path} holds other tensors than it should. Begin anew (restart=True).")
                else:
                    file = MappedTensors.create(path, shapes)
                self._files[name] = file
                return file
            assert shapes is not None
            self.spilled = True
            with tempfile.TemporaryDirectory(prefix="moe-prune-") as folder:  # the tensors outlive it
                return MappedTensors.create(Path(folder) / name, shapes)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise RunError(f"the statistics ({nbytes / 1e9:.1f} GB) cannot be kept in {where}: {error}.") from error

    def commit(self, finished: int) -> None:
        """Say that so many steps are finished, when what they wrote is on disk."""
        if self.folder is not None:
            try:
                for file in self._files.values():
                    file.sync()
                sync(self.folder)  # their names as well, before anything says that they are finished
            except OSError as error:
                raise RunError(f"{self.folder} cannot be written: {error}.") from error
            progress = {"format_version": FORMAT_VERSION, "of": self._of, "finished": finished}
            write_json(self.folder / _PROGRESS, progress)
        self.finished = finished

    def release(self, name: str) -> None:
        """Forget a file that is finished; its tensors stay usable."""
        self._files.pop(name, None)

    def remove(self, name: str) -> None:
        """Forget a file and remove it from the folder: what it held is needed no more."""
        self.release(name)
        self._in_memory -= self._sizes.pop(name, 0)
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)

    def check_space(self, nbytes: int) -> None:
        """Raise unless the folder's disk has room for so much."""
        if self.folder is not None and not self.finished:
            check_space(self.folder, nbytes)

    def close(self) -> None:
        """Remove a folder in which nothing is finished: there is nothing to continue."""
        if self.folder is not None and not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)


def unfinished(folder: Path) -> tuple[Json, int] | None:
    """What the unfinished work in a folder is of, and how many steps are finished; None if there is none.

    Raises:
        RequestError: If it is damaged.
    """
    if not (folder / _PROGRESS).is_file():
        return None
    advice = "Begin anew (restart=True)."
    try:
        progress = read_json(folder / _PROGRESS)
        check_version(progress, FORMAT_VERSION, "it")
        of, finished = progress["of"], progress["finished"]
        if not isinstance(of, dict) or not is_integer(finished) or finished < 0:
            raise ValueError(f"finished {finished!r}")
    except (RequestError, KeyError, ValueError) as error:
        raise RequestError(
            f"the unfinished work in {folder} is damaged: {str(error).rstrip('.')}. {advice}"
        ) from error
    return of, finished


def _differences(there: Values, now: Values, inside: str = "") -> Iterator[str]:
    """What differs between two nested mappings, one by one."""
    for name in sorted(set(there) | set(now)):
        old, new = there.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{inside}{name}: ")
        elif old != new:
            yield f"{inside}{name} is {_short(old)} there and {_short(new)} now"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
