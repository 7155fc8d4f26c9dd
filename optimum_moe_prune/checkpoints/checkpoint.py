# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a model: which tensors there are, and where; in a local folder or on the Hub.

Of a local folder only headers are read. Of a Hub repository the headers come over the network, and a file is
downloaded when its bytes are first asked for, into the cache of ``huggingface_hub`` and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError, RunError
from ..progress import working
from ..storage.tensor_files import TORCH_DTYPES, TensorEntry, all_finite, read_header, read_tensor
from ..storage.values import Json, read_json
from .folders import no_weights, not_downloaded, unfinished_download
from .source import Source

logger = logging.getLogger(__name__)

ReadTensor = Callable[[int, TensorEntry], Tensor]
"""Reads a tensor of an open file."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint.

    Attributes:
        file: The file that holds it.
        dtype: As the format names it (``BF16``).
        shape: Its shape.
        nbytes: Its size in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass
class Checkpoint:
    """A model's safetensors files.

    Attributes:
        source: The folder or Hub id, and how it is reached.
        tensors: By name, file after file in the order they lie in.
        metadata: Of the first file.
        index_metadata: Of the index, where there is one.
    """

    source: Source
    tensors: dict[str, SourceTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    index_metadata: Json = field(default_factory=dict)
    _entries: dict[str, dict[str, TensorEntry]] = field(default_factory=dict, repr=False)
    _stamps: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, source: Source | str | os.PathLike) -> Checkpoint:
        """Read the index and the headers, and check them against each other.

        Args:
            source: The model's folder or Hub id.

        Raises:
            RequestError: If there are no safetensors files, one is missing or damaged, or the index and they disagree.
        """
        checkpoint = cls(Source.of(source))
        name_or_path = checkpoint.name_or_path
        if checkpoint.is_local:
            single = (Path(name_or_path) / SINGLE_FILE).is_file()
        else:
            single = SINGLE_FILE in checkpoint.source.files()
        weight_map: dict[str, str] = {}
        if single:
            files = [SINGLE_FILE]
        else:
            weight_map, checkpoint.index_metadata = checkpoint._index()
            files = sorted(set(weight_map.values()))
        for file in files:
            for name, tensor in checkpoint._header(file, first=file == files[0]).items():
                if name in checkpoint.tensors:
                    before = checkpoint.tensors[name].file
                    raise RequestError(f"{name} is in two files of {name_or_path}, {before} and {file}.")
                checkpoint.tensors[name] = tensor
        for name, file in weight_map.items():
            if name not in checkpoint.tensors or checkpoint.tensors[name].file != file:
                raise RequestError(
                    f"{INDEX_FILE} of {name_or_path} says that {name} is in {file}, and it is not. The checkpoint is "
                    "damaged; fetch it again."
                )
        beside = {
            name for name in checkpoint.source.files() if "/" not in name and name.endswith(".safetensors")
        } - set(files)
        if beside:
            logger.warning(
                "%s of %s belongs to no model that transformers loads from there, and is not looked at.",
                ", ".join(sorted(beside)),
                name_or_path,
            )
        if not checkpoint.tensors:
            raise RequestError(f"the safetensors files of {name_or_path} hold no tensors.")
        return checkpoint

    @property
    def name_or_path(self) -> str:
        """The folder or Hub id."""
        return self.source.name_or_path

    @property
    def is_local(self) -> bool:
        """Whether it is a folder; then nothing touches the network."""
        return self.source.is_local

    @property
    def files(self) -> list[str]:
        """The files with the tensors."""
        return list(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def path(self, file: str) -> Path:
        """Where a file lies; one on the Hub is downloaded first.

        Raises:
            RequestError: If it is missing.
            RunError: If it cannot be downloaded.
        """
        try:
            with self._lock, self._fetching(file):
                found = self.source.find(file)
        except OSError as error:
            raise RunError(f"{file} of {self.name_or_path} cannot be fetched: {str(error).splitlines()[0]}") from error
        if found is None:
            raise RequestError(f"{file} of {self.name_or_path} is missing.")
        return found

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies in its file; one on the Hub is downloaded first."""
        file = self.tensors[name].file
        if file not in self._entries:
            self._read(file)
        return self._entries[file][name]

    def opened(self, file: str, since: bool = True) -> int:
        """A descriptor to read a file's bytes from, which the caller closes.

        Args:
            file: The file.
            since: Whether nothing may have been written to it since; else it may not be another, or of another length.

        Raises:
            RunError: If it is not the file any more whose header was read.
        """
        if file not in self._entries:
            self._read(file)
        descriptor = os.open(self.path(file), os.O_RDONLY)
        compared = slice(None if since else _SAME_FILE)
        if _stamp(os.fstat(descriptor))[compared] != self._stamps[file][compared]:
            os.close(descriptor)
            raise RunError(f"{file} of {self.name_or_path} was changed while it was read.")
        return descriptor

    def check_unchanged(self) -> None:
        """Raise if a file that was read is not the same any more.

        Raises:
            RunError: Naming it.
        """
        for file in self._stamps:
            os.close(self.opened(file))

    def check_finite(self) -> None:
        """Raise if a tensor holds NaN or infinity. Reads all of them.

        Raises:
            RunError: Naming it and its file.
        """
        with self.reader() as read:
            for name in self.tensors:
                self.finite(name, read(name))

    def finite(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that was read, if all of it is finite.

        Raises:
            RunError: Naming it and its file.
        """
        if tensor.is_floating_point() and not all_finite(tensor):
            raise RunError(
                f"{self.tensors[name].file}: {name} holds NaN or infinite weights; the checkpoint is damaged."
            )
        return tensor

    @contextlib.contextmanager
    def reader(self, read: ReadTensor = read_tensor) -> Iterator[Callable[[str], Tensor]]:
        """A function from names to tensors, read from their files; files stay open inside the ``with``.

        Args:
            read: Reads a tensor of an open file; by default into memory.
        """
        with contextlib.closing(_Files(self, read)) as files:
            yield files.read

    def held_open(self) -> Callable[[str], Tensor]:
        """As :meth:`reader`, for several threads; files stay open as long as anything refers to the function.

        Why: a file that one thread reads from cannot be closed by another, as happens where loading fails.
        """
        return _Files(self).read

    def floating_dtype(self) -> torch.dtype:
        """The dtype of the first tensor of floating point; float32 where there is none."""
        for tensor in self.tensors.values():
            dtype = TORCH_DTYPES.get(tensor.dtype)
            if dtype is not None and dtype.is_floating_point:
                return dtype
        return torch.float32

    # -- helpers

    def _index(self) -> tuple[dict[str, str], Json]:
        path = self.source.find(INDEX_FILE)
        if path is None:
            raise RequestError(no_weights(self.name_or_path, self.source.names()))
        if pointer := not_downloaded(path):
            raise RequestError(pointer)
        index = read_json(path)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RequestError(f"{path} has no weight_map; the checkpoint is damaged.")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
                raise RequestError(f"{path} says that {name} is in {file!r}, which is no safetensors file beside it.")
        metadata = index.get("metadata")
        if self.is_local:
            for file in sorted(set(weight_map.values())):
                if not (Path(self.name_or_path) / file).is_file():
                    tensors = [name for name, where in weight_map.items() if where == file]
                    raise RequestError(
                        f"{Path(self.name_or_path) / file} is missing; the index says that it holds {tensors[0]} and "
                        f"{len(tensors) - 1} more. {unfinished_download(self.name_or_path) or ''}".strip()
                    )
        return weight_map, metadata if isinstance(metadata, dict) else {}

    def _header(self, file: str, first: bool) -> dict[str, SourceTensor]:
        """The tensors of a file; of one on the Hub that is not here yet, by its header alone."""
        if not self.is_local and not self._is_cached(file):
            from huggingface_hub import HfApi

            try:
                remote = HfApi().parse_safetensors_file_metadata(
                    self.name_or_path, file, revision=self.source.revision, token=self.source.token
                )
                if first:
                    self.metadata = dict(remote.metadata)
                return {
                    name: SourceTensor(
                        file, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0]
                    )
                    for name, info in sorted(remote.tensors.items(), key=lambda item: tuple(item[1].data_offsets))
                }
            except Exception as error:  # a server that cannot give parts of files; the whole file can be had
                logger.info("the header of %s cannot be read alone: %s", file, error)
        metadata = self._read(file)
        if first:
            self.metadata = metadata
        return {
            name: SourceTensor(file, entry.dtype, entry.shape, entry.nbytes)
            for name, entry in self._entries[file].items()
        }

    def _read(self, file: str) -> dict[str, str]:
        """Read a file's header; its metadata."""
        path = self.path(file)
        if pointer := not_downloaded(path):
            raise RequestError(pointer)
        self._entries[file], metadata = read_header(path)
        self._stamps[file] = _stamp(os.stat(path))
        return metadata

    def _fetching(self, file: str) -> contextlib.AbstractContextManager[object]:
        """Shows that a file is downloaded; what is here already takes no time."""
        if self.is_local or self._is_cached(file):
            return contextlib.nullcontext()
        return working(f"downloading {file}", None, did=f"downloaded {file}")

    def _is_cached(self, file: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.name_or_path, file, cache_dir=self.source.cache_dir, revision=self.source.revision
        )
        return isinstance(found, str)


class _Files:
    """Files that tensors are read from, each opened once.

    They are read and not mapped into memory: where a file that is mapped becomes shorter, as one does that is fetched
    again, the system ends the process that looks at it, without a word.
    """

    def __init__(self, checkpoint: Checkpoint, read: ReadTensor = read_tensor) -> None:
        self._checkpoint = checkpoint
        self._read_tensor = read
        self._opened: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            RunError: If the file cannot be read, or is not the one any more whose header was read.
        """
        file = self._checkpoint.tensors[name].file
        with self._lock:
            if file not in self._opened:
                self._opened[file] = self._checkpoint.opened(file, since=False)
        try:
            return self._read_tensor(self._opened[file], self._checkpoint.entry(name))
        except EOFError as error:
            raise RunError(f"{file} of {self._checkpoint.name_or_path} became shorter while it was read.") from error
        except OSError as error:
            raise RunError(f"{file} of {self._checkpoint.name_or_path} cannot be read: {error}.") from error

    def close(self) -> None:
        with self._lock:
            while self._opened:
                os.close(self._opened.popitem()[1])

    __del__ = close


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


_SAME_FILE = 3
"""So many of these values say that a file is the same, and as long."""
