# SPDX-License-Identifier: Apache-2.0
"""safetensors files without their tensors in memory: where each tensor lies, and files that are written in place.

The library reads and checks files; what it lacks is here. ``save_file`` wants all tensors of a file in memory, and
gives no offsets. The format: the header's length in 8 bytes, a JSON header, and the tensors' bytes one after another
(https://github.com/huggingface/safetensors, Format).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RequestError
from .files import sync
from .values import Json, Values

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
}
"""Of the format's names of dtypes, those whose values are looked at here."""
ALL_DTYPES = {
    **TORCH_DTYPES,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    **{
        name: getattr(torch, own)
        for name, own in (
            ("U16", "uint16"),
            ("U32", "uint32"),
            ("U64", "uint64"),
            ("F8_E8M0", "float8_e8m0fnu"),
            ("F8_E4M3FNUZ", "float8_e4m3fnuz"),
            ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        )
        if hasattr(torch, own)
    },
}
"""All dtypes of the format that can be read."""
_NAMES = {dtype: name for name, dtype in ALL_DTYPES.items()}
_HEADER_ALIGNMENT = 64
_READ_BYTES = 2**30  # at once; the system takes no more than 2 GiB


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by name."""


def shapes_bytes(shapes: Shapes) -> int:
    """Bytes of all tensors of such shapes."""
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in shapes.values())


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file.

    Attributes:
        dtype: As the format names it (``BF16``).
        shape: Its shape.
        begin: Its first byte, counted from the beginning of the file.
        end: One past its last.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def read_header(path: str | os.PathLike) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of a file in the order they lie in it, and its metadata.

    The library checks the header, and that the file is as long as the header says.

    Raises:
        RequestError: If the file is missing, truncated or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as raw:  # says why it cannot be opened; the library calls every such file missing
            beginning = raw.read(40)
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
            length = int.from_bytes(beginning[:8], "little")
            raw.seek(8)
            header = json.loads(raw.read(length), object_pairs_hook=_no_duplicates)
    except FileNotFoundError as error:
        raise RequestError(f"{path} is missing.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    except (SafetensorError, ValueError) as error:
        pointer = beginning.startswith(b"version https://git-lfs")
        why = "is a Git LFS pointer and not the file itself (git lfs pull)" if pointer else f"is damaged: {error}"
        raise RequestError(f"{path} {why}. Fetch it again.") from error
    header.pop("__metadata__", None)
    return parse_entries(header, 8 + length), metadata


def parse_entries(header: Values, start: int) -> dict[str, TensorEntry]:
    """The entries of a header, in the order they lie in the file.

    Args:
        header: By name ``dtype``, ``shape`` and ``data_offsets``, of a header that was checked.
        start: Where the tensors begin in the file.
    """
    entries = {
        name: TensorEntry(
            entry["dtype"],
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
            start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }
    return dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))


def read_tensor(file: int, entry: TensorEntry) -> Tensor:
    """A tensor of an open file, in memory of its own.

    Raises:
        EOFError: If the file has become too short.
        OSError: If it cannot be read.
        RequestError: If torch has no such dtype.
    """
    dtype = dtype_of(entry)
    made = torch.empty(entry.nbytes, dtype=torch.uint8)
    read_into(made.numpy().data, file, entry.begin)
    return made.view(dtype).view(entry.shape)


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """The dtype of a tensor in a file.

    Raises:
        RequestError: If torch has no such dtype.
    """
    dtype = ALL_DTYPES.get(entry.dtype)
    if dtype is None:
        raise RequestError(f"tensors of dtype {entry.dtype} cannot be read by this version of torch.")
    return dtype


def read_into(view: memoryview, file: int, begin: int) -> None:
    """Fill some memory with an open file's bytes from a place on.

    Raises:
        EOFError: If the file has become too short.
        OSError: If it cannot be read.
    """
    while view:
        count = os.preadv(file, [view[:_READ_BYTES]], begin)
        if not count:
            raise EOFError
        view, begin = view[count:], begin + count


def read_tensors(path: str | os.PathLike, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file by name, in memory of their own.

    Raises:
        RequestError: If the file is missing, truncated or damaged, or lacks one.
    """
    entries, _ = read_header(path)
    try:
        with open(path, "rb", buffering=0) as file:
            return {name: read_tensor(file.fileno(), entries[name]) for name in names}
    except KeyError as error:
        raise RequestError(f"{path} is damaged: it lacks {error}.") from error
    except (OSError, EOFError) as error:
        raise RequestError(f"{path} cannot be read: {error or 'it became shorter while it was read'}.") from error


def map_tensor(path: str | os.PathLike, name: str) -> Tensor:
    """A tensor of a file as the file's pages, which are read when they are touched. What is written to it is lost.

    Raises:
        RequestError: If the file is missing, truncated or damaged, or lacks it.
    """
    entries, _ = read_header(path)
    entry = entries.get(name)
    dtype = None if entry is None else ALL_DTYPES.get(entry.dtype)
    if entry is None or dtype is None or not entry.nbytes or entry.begin % dtype.itemsize:
        return read_tensors(path, [name])[name]
    try:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that can be written
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(entry.shape), offset=entry.begin).view(entry.shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twice!r} twice")
    return found


def header_bytes(
    tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The beginning of a file whose tensors follow in the given order.

    Args:
        tensors: The dtype as the format names it, shape and bytes of each tensor.
        metadata: Strings to keep in the header.
    """
    header: Json = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class MappedTensors(Mapping[str, Tensor]):
    """Tensors in a safetensors file that is mapped into memory: writing to them writes to the file.

    The system keeps of them in memory what fits and moves the rest to disk; they count as the file's pages and not as
    memory of the process. They stay usable when the file is removed.

    Attributes:
        path: Where the file was made or opened.
    """

    def __init__(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self.path = path
        self._tensors = {}
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)  # the tensors keep it alive
        for name, entry in entries.items():
            dtype, count = ALL_DTYPES[entry.dtype], math.prod(entry.shape)
            flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.begin) if count else torch.empty(0)
            self._tensors[name] = flat.to(dtype).view(entry.shape)

    @classmethod
    def create(cls, path: str | os.PathLike, shapes: Shapes) -> MappedTensors:
        """Make a file with tensors of zeros.

        The disk space is taken at once, since writing to a mapped file on a full disk would end the process.

        Args:
            path: The file; one that is there is replaced.
            shapes: Shape and dtype of each tensor.

        Raises:
            OSError: If the disk is full.
        """
        largest_first = sorted(shapes.items(), key=lambda item: -item[1][1].itemsize)  # so that all are aligned
        header = header_bytes(
            {n: (_NAMES[dtype], shape, dtype.itemsize * math.prod(shape)) for n, (shape, dtype) in largest_first}
        )
        with open(path, "wb", buffering=0) as file:
            reserve(file.fileno(), len(header) + shapes_bytes(shapes))
            write_all(file.fileno(), header)
        return cls(Path(path), parse_entries(json.loads(header[8:]), len(header)))

    @classmethod
    def open(cls, path: str | os.PathLike) -> MappedTensors:
        """Map a file that was made before.

        Raises:
            RequestError: If the file is missing or damaged.
        """
        entries, _ = read_header(path)
        unknown = {entry.dtype for entry in entries.values()} - set(ALL_DTYPES)
        if unknown:
            raise RequestError(f"{path} is damaged: it holds {min(unknown)}.")
        return cls(Path(path), entries)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def sync(self) -> None:
        """Return when everything written so far is on disk."""
        sync(self.path)


def write_all(file: int, data: bytes) -> None:
    """Write all of some bytes, which the system may take in parts."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def reserve(file: int, size: int) -> None:
    """Make a file so long, its disk space taken.

    Raises:
        OSError: If the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS, Windows
        os.truncate(file, size)


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite, without a mask of their size."""
    return bool(finite_flag(values))


def finite_flag(values: Tensor) -> Tensor:
    """The same as a tensor ``()`` where the values are, which nobody has waited for."""
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    if values.element_size() == 1:  # float8 has few operations
        values = values.float()
    low, high = torch.aminmax(values)
    return torch.isfinite(low) & torch.isfinite(high)
