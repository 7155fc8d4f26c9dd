# SPDX-License-Identifier: Apache-2.0
"""A model in GGUF files: all its parts, where each tensor lies, and how many bytes it has."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ...errors import RequestError, RunError
from ...storage.gguf_files import GgufFile, GgufTensor, Value, read_gguf

ARCHITECTURE = "general.architecture"
SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS)
PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
_PLAIN = {"F16": "f2", "F32": "f4", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}
_WITHOUT_BLOCKS = {"BF16", *_PLAIN}
_MOST_PARTS = 99_999


@dataclass(frozen=True)
class Placed:
    """A tensor of a model.

    Attributes:
        part: The number of the file that it is in.
        tensor: Where it lies there.
        type_name: The name of its type, as ``Q4_K``.
        nbytes: Its bytes.
    """

    part: int
    tensor: GgufTensor
    type_name: str
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, outermost dimension first."""
        return self.tensor.shape

    @property
    def leading(self) -> int:
        """Dimensions before the one that can count experts: a bias may be a matrix with one row."""
        return len(self.shape) - 1 if set(self.shape[:-1]) == {1} else 0

    @property
    def rows(self) -> int:
        """Entries along the dimension that can count experts."""
        return self.shape[self.leading] if self.shape else 0

    @property
    def has_rows(self) -> bool:
        """Whether each of them has bytes of its own: blocks lie along the innermost dimension."""
        return len(self.shape) - self.leading > 1 or self.type_name in _WITHOUT_BLOCKS

    def with_rows(self, count: int) -> tuple[int, ...]:
        """The shape with another number of them."""
        return (*self.shape[: self.leading], count, *self.shape[self.leading + 1 :])


@dataclass(frozen=True)
class GgufModel:
    """A model in one file, or in several.

    Attributes:
        path: The first file, as it was named.
        parts: The files.
        architecture: As llama.cpp calls it (``qwen3moe``).
        tensors: Of all files, by name.
    """

    path: Path
    parts: tuple[GgufFile, ...]
    architecture: str
    tensors: dict[str, Placed] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(part.size for part in self.parts)

    def key(self, name: str) -> str:
        """A key of the architecture (``expert_count``) with its name in front."""
        return f"{self.architecture}.{name}"

    def value(self, name: str) -> Value:
        """The value of a key of the architecture; None where there is none."""
        return self.parts[0].value(self.key(name))

    def number(self, name: str, default: int = 0) -> int:
        """The same of a whole number.

        Raises:
            RequestError: If it is something else.
        """
        value = self.value(name)
        if value is None:
            return default
        if type(value) is not int:
            raise RequestError(f"{self.path} has {self.key(name)} = {_shown(value)}, and a whole number is needed.")
        return value

    def values(self, name: str) -> Tensor:
        """A tensor's numbers in float32, or as they are where they are whole; read and dequantised.

        Raises:
            RequestError: If its type cannot be read here.
            RunError: If the file cannot be read.
        """
        placed = self.tensors[name]
        part = self.parts[placed.part]
        try:
            with open(part.path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), placed.nbytes, placed.tensor.begin)
        except OSError as error:
            raise RunError(f"{part.path} cannot be read: {error.strerror}.") from error
        if len(data) < placed.nbytes:
            raise RunError(f"{part.path} became shorter while it was read.")
        if (code := _PLAIN.get(placed.type_name)) is not None:
            found = np.frombuffer(data, dtype=part.order + code).reshape(placed.shape)
            return torch.from_numpy(found.astype(code if code.startswith("i") else "f4"))
        return self._dequantised(name, data)

    def _dequantised(self, name: str, data: bytes) -> Tensor:
        placed, lib = self.tensors[name], library()
        unread = RequestError(
            f"{self.parts[placed.part].path}: {name} is of type {placed.type_name}, whose numbers cannot be read here."
        )
        if self.parts[0].order != "<":
            raise unread
        try:
            rows = np.frombuffer(data, dtype=np.uint8).reshape(math.prod(placed.shape[:-1]), -1)
            values = lib.quants.dequantize(rows, lib.GGMLQuantizationType(placed.tensor.kind))
        except NotImplementedError as error:
            raise unread from error
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(placed.shape)


def library() -> ModuleType:
    """The package ``gguf``, which knows types and names of tensors.

    Raises:
        RequestError: If it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise RequestError("a GGUF file needs the [gguf] extra: pip install 'optimum-moe-prune[gguf]'.") from error
    return gguf


def open_model(path: str | os.PathLike) -> GgufModel:
    """A model by the name of its file, of several that of the first. No tensor is read.

    Raises:
        RequestError: If a file is missing, damaged or truncated, or has a tensor of a type that is not known.
    """
    library()
    parts = _parts(Path(path))
    architecture = parts[0].value(ARCHITECTURE)
    if not isinstance(architecture, str) or not architecture:
        raise RequestError(f"{path} has no {ARCHITECTURE}: it holds no model.")
    if (kind := parts[0].value("general.type")) not in (None, "model"):
        raise RequestError(f"{path} is of type {_shown(kind)} (general.type), and a model is needed.")
    tensors: dict[str, Placed] = {}
    for number, part in enumerate(parts):
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise RequestError(f"{part.path} holds {name}, and an earlier part holds it as well.")
            tensors[name] = _placed(part, number, name, tensor)
    expected = parts[0].value(SPLIT_TENSORS) if len(parts) > 1 else None
    if expected is not None and expected != len(tensors):
        raise RequestError(
            f"the {len(parts)} parts of {path} hold {len(tensors)} tensors, and its {SPLIT_TENSORS} says {expected}: "
            "they are not of one model. Fetch them again."
        )
    return GgufModel(Path(path), parts, architecture, tensors)


def _parts(path: Path) -> tuple[GgufFile, ...]:
    """The files of a model, by the name of the first."""
    first = read_gguf(path)
    count = first.value(SPLIT_COUNT)
    if count is None or (type(count) is int and count < 2):
        return (first,)
    name = PART_NAME.fullmatch(path.name)
    if type(count) is not int or count > _MOST_PARTS or name is None or int(name[3]) != count:
        raise RequestError(
            f"{path} is one of {_shown(count)} parts, and its name does not say where the others are; give them the "
            "names they were published under (NAME-00001-of-00003.gguf)."
        )
    names = [path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    if first.value(SPLIT_NUMBER) != 0 or path != names[0]:
        raise RequestError(f"{path} is a later part of a model of {count} files; name the first ({names[0].name}).")
    for missing in (other for other in names if not other.is_file()):
        raise RequestError(f"{missing} is missing: {path} is the first of {count} parts. Fetch all of them.")
    parts = (first, *map(read_gguf, names[1:]))
    for number, part in enumerate(parts):
        if (part.value(SPLIT_COUNT), part.value(SPLIT_NUMBER), part.order) != (count, number, first.order):
            raise RequestError(f"{part.path} is not part {number + 1} of {count} of {path}. Fetch it again.")
    return parts


def _placed(part: GgufFile, number: int, name: str, tensor: GgufTensor) -> Placed:
    lib = library()
    try:
        kind = lib.GGMLQuantizationType(tensor.kind)
        block, size = lib.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        version = importlib.metadata.version("gguf")
        raise RequestError(
            f"{part.path}: {name} is of the tensor type {tensor.kind}, which gguf {version} does not know; install a "
            "newer gguf if there is one that does, or quantise the model anew."
        ) from error
    row = tensor.shape[-1] if tensor.shape else 1
    if row % block:
        raise RequestError(
            f"{part.path} is damaged: rows of {name} have {row} numbers, and {kind.name} has blocks of {block}."
        )
    nbytes = math.prod(tensor.shape) // block * size
    if tensor.begin + nbytes > part.size:
        raise RequestError(
            f"{part.path} is truncated: it has {part.size} bytes, and {name} ends at {tensor.begin + nbytes}. Fetch "
            "it again."
        )
    return Placed(number, tensor, kind.name, nbytes)


def _shown(value: Value) -> str:
    return repr(list(value[:4]) if isinstance(value, tuple) else value)
