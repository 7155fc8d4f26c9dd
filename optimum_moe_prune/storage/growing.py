# SPDX-License-Identifier: Apache-2.0
"""Where a calibration grows: in memory, in files the system may page out, or in a folder where it can be continued."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError, RunError
from ..progress.pace import plural, size
from .checksums import file_checksum, is_sealed, sealed, tensor_checksum
from .differences import VERSIONS, differences
from .files import sync, write_json
from .folders import check_space
from .kept import PROCESS, PROGRESS_NAME
from .tensor_files import MappedTensors, Shapes, shapes_bytes
from .values import Json, Values, check_version, is_integer, read_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
IN_MEMORY_BYTES = 512 * 2**20
"""What a calibration keeps in memory at most; beyond it, its tensors live in files mapped into memory."""

Part = Callable[[Mapping[str, Tensor], int], Iterable[Tensor]]
"""What a step, by its number, finished for good in a file, of whose other values later steps may write some."""


class Store:
    """Makes the tensors of a calibration.

    Without a folder they are in memory up to ``IN_MEMORY_BYTES`` in all, and beyond that in temporary files that are
    mapped into memory and go away by themselves. Numbers do not depend on it.

    Args:
        folder: Where to keep them so that an interrupted calibration can be continued.
        of: What the calibration is of, as nested plain values: a later run with something else is refused.
        restart: Begin anew, whatever the folder holds.
        what: What it is called in messages.
        settings: By name of a value in ``of``, the settings that it follows from: they are named where it differs.
        look: Called when steps are finished, where others share the work: it raises if one of them has failed.

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
        settings: Values | None = None,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._look = look
        self._what = what
        self.finished = 0
        self.spilled = folder is not None
        self._in_memory = 0
        self._sizes: dict[str, int] = {}
        self._files: dict[str, MappedTensors] = {}
        self._parts: dict[str, Part] = {}
        self._checksums: dict[str, int] = {}
        self._of = json.loads(json.dumps(of or {}))
        self._settings = json.loads(json.dumps(settings or {}))
        self._steps, self._unit = 0, "step"
        if folder is None:
            return
        progress = None if restart else unfinished(folder)
        if progress is None:
            if not restart and (shared := sorted(folder.glob(f"{PROCESS}*/{PROGRESS_NAME}"))):
                raise RequestError(
                    f"{folder} holds an unfinished {what} of something else: processes is "
                    f"{read_json(shared[0]).get('of', {}).get('processes')} there and 1 now. Run the command that "
                    "began it to continue, or begin anew (restart=True)."
                )
            self._begin(folder)
            return
        there, self.finished = progress
        values = read_json(folder / PROGRESS_NAME)
        self._checksums = values["checksums"]
        if found := differences(there, self._of, values.get("settings") or {}, self._settings):
            versions = there.get(VERSIONS) != self._of.get(VERSIONS)
            raise RequestError(
                f"{folder} holds an unfinished {what} of something else: {'; '.join(found)}. Run the command that "
                f"began it{', with the versions it began with,' if versions else ''} to continue, or begin anew "
                "(restart=True)."
            )

    def _begin(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            sync(folder.parent)
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error}.") from error

    def inner(self, name: str, what: str) -> Store:
        """One for work that follows this, in a folder inside this one's, and for nothing else.

        Args:
            name: Of the folder.
            what: What the work is called in messages.
        """
        folder = None if self.folder is None else self.folder / name
        return Store(folder, self._of, what=what, settings=self._settings, look=self._look)

    def check_steps(self, steps: int, unit: str = "step") -> None:
        """Raise if more was finished than there is to do, and say from where it goes on.

        Args:
            steps: All there is to do.
            unit: What a step is.

        Raises:
            RequestError: The folder is damaged then.
        """
        if self.finished > steps:
            raise RequestError(
                f"the unfinished {self._what} in {self.folder} is damaged: it says that {self.finished} steps of "
                f"{steps} are finished. Begin anew (restart=True)."
            )
        self._steps, self._unit = steps, unit
        units = unit if steps == 1 else plural(unit)
        if self.finished == steps:
            logger.warning(
                "the %s in %s is finished: none of %d %s is done again.", self._what, self.folder, steps, units
            )
        elif self.finished:
            done = "is" if self.finished == 1 else "are"
            logger.warning(
                "continuing the unfinished %s in %s: %d of %d %s %s done.",
                self._what, self.folder, self.finished, steps, units, done,
            )  # fmt: skip

    def tensors(
        self, name: str, shapes: Shapes | None, keep: bool = False, part: Part | None = None
    ) -> Mapping[str, Tensor]:
        """Tensors of zeros, or what an earlier run left in them.

        Args:
            name: What they are, as the name of a file.
            shapes: Shape and dtype of each; None takes what is in the folder as it is.
            keep: Take what is in the folder.
            part: What each step finishes in it, where that is not the whole file (:meth:`commit`).

        Raises:
            RequestError: If what is there is damaged, or is not any more what was put there.
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
                    file = self._opened(name, part)
                    if shapes is not None and {key: (tuple(t.shape), t.dtype) for key, t in file.items()} != shapes:
                        raise RequestError(f"{path} holds other tensors than it should. Begin anew (restart=True).")
                else:
                    file = MappedTensors.create(path, shapes)
                self._files[name] = file
                if part is not None:
                    self._parts[name] = part
                return file
            assert shapes is not None
            self.spilled = True
            with tempfile.TemporaryDirectory(prefix="moe-prune-") as folder:  # the tensors outlive it
                return MappedTensors.create(Path(folder) / name, shapes)
        except OSError as error:
            where = self.folder or tempfile.gettempdir()
            raise RunError(f"the statistics ({size(nbytes)}) cannot be kept in {where}: {error}.") from error

    def _opened(self, name: str, part: Part | None) -> MappedTensors:
        """A file that an earlier run left, if it holds what its checksum says."""
        assert self.folder is not None
        path = self.folder / name
        try:
            found = file_checksum(path) if part is None and name in self._checksums else None
            file = MappedTensors.open(path)
            if part is not None:
                found = self._advanced(file, part, 0, self.finished, 0)
        except (OSError, RequestError, LookupError) as error:
            raise RequestError(f"{path} is damaged: {error} Begin anew (restart=True).") from error
        if found != self._checksums.get(name):
            raise RequestError(
                f"{path} is damaged: it is not any more what the unfinished {self._what} had written. Begin anew "
                "(restart=True)."
            )
        return file

    @staticmethod
    def _advanced(file: MappedTensors, part: Part, begin: int, end: int, before: int) -> int:
        """The checksum of what steps finished, of those before ``begin`` being given."""
        for step in range(begin, end):
            for tensor in part(file, step):
                before = tensor_checksum(tensor, before)
        return before

    def commit(self, finished: int, whole: Iterable[str] = ()) -> None:
        """Say that so many steps are finished, when what they wrote is on disk.

        Args:
            finished: Steps, all in all.
            whole: The files that nothing is written into until the next call. Of those that were asked for with a
                ``part`` only what the steps finished is remembered by a checksum, of other files nothing.
        """
        if self.folder is not None:
            try:
                for file in self._files.values():
                    file.sync()
                sync(self.folder)  # their names as well, before anything says that they are finished
            except OSError as error:
                raise RunError(f"{self.folder} cannot be written: {error}.") from error
            self._checksums = self._current_checksums(finished, whole)
            progress = {
                "format_version": FORMAT_VERSION,
                "what": self._what,
                "of": self._of,
                "settings": self._settings,
                "finished": finished,
                "steps": self._steps,
                "unit": self._unit,
                "checksums": self._checksums,
            }
            write_json(self.folder / PROGRESS_NAME, sealed(progress))
        self.finished = finished
        self._look()

    def _current_checksums(self, finished: int, whole: Iterable[str]) -> dict[str, int]:
        """By file; of one that was released it is known already."""
        assert self.folder is not None
        found = {}
        for name in whole:
            known = None if name in self._files else self._checksums.get(name)
            found[name] = file_checksum(self.folder / name) if known is None else known
        for name, part in self._parts.items():
            before = self._checksums.get(name, 0)
            found[name] = self._advanced(self._files[name], part, self.finished, finished, before)
        return found

    def release(self, name: str) -> None:
        """Forget a file that is finished; its tensors stay usable."""
        self._files.pop(name, None)
        self._parts.pop(name, None)

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


def process_folder(folder: Path, rank: int) -> Path:
    """Where one of several processes that share work keeps its part, by its number."""
    return folder / f"{PROCESS}{rank}"


def unfinished(folder: Path) -> tuple[Json, int] | None:
    """What the unfinished work in a folder is of, and how many steps are finished; None if there is none.

    Raises:
        RequestError: If it is damaged.
    """
    if not (folder / PROGRESS_NAME).is_file():
        return None
    advice = "Begin anew (restart=True)."
    try:
        progress = read_json(folder / PROGRESS_NAME)
        check_version(progress, FORMAT_VERSION, "it")
        of, finished = progress["of"], progress["finished"]
        if progress["format_version"] == 1:
            raise ValueError("it is of an earlier version, which kept no checksums")
        if not isinstance(of, dict) or not is_integer(finished) or finished < 0:
            raise ValueError(f"finished {finished!r}")
        if not isinstance(progress["checksums"], dict) or not is_sealed(progress):
            raise ValueError(f"{PROGRESS_NAME} is not any more what was written")
    except (RequestError, KeyError, ValueError) as error:
        raise RequestError(
            f"the unfinished work in {folder} is damaged: {str(error).rstrip('.')}. {advice}"
        ) from error
    return of, finished
