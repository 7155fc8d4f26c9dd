# SPDX-License-Identifier: Apache-2.0
"""GGUF files without their tensors in memory: where each key and each tensor lies.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header, keys with values of any type, what
each tensor is called and where it lies, and the tensors, each at a multiple of the alignment. ``gguf.GGUFReader`` makes
an array object of every token of a vocabulary, 475 MB and 6 seconds for 150,000 tokens with their merges, stops at a
type of tensor that it does not know, and cannot say that a file ends too early. Here only what is asked for is read.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..names import GGUF_PLAN_KEY
from .values import Json, no_constant

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
"""Types of values, as the format numbers them."""
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", FLOAT32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_ARRAY = 65536
"""Numbers of an array that are read; longer ones are vocabularies."""
_DEEPEST = 8
_MOST_DIMENSIONS = 4
_FEWEST_BYTES_OF_KEY, _FEWEST_BYTES_OF_TENSOR = 13, 32

Value = bool | int | float | str | tuple[Any, ...] | None


@dataclass(frozen=True)
class GgufKey:
    """A key with its value.

    Attributes:
        kind: The type of the value, as the format numbers it.
        value: The value; of an array of numbers a tuple, of other arrays None.
        begin: The first byte of the key, counted from the beginning of the file.
        at: The first byte of the value, after its type.
        end: One past its last.
    """

    kind: int
    value: Value
    begin: int
    at: int
    end: int


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a file.

    Attributes:
        kind: The number of its type.
        shape: Its shape, outermost dimension first; the format itself counts them the other way round.
        begin: Its first byte, counted from the beginning of the file.
    """

    kind: int
    shape: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class GgufFile:
    """What a file says of itself.

    Attributes:
        path: The file.
        size: Its bytes.
        order: Of the bytes of a number: ``<`` or ``>``, as ``struct`` has it.
        version: Of the format.
        keys: By name, in the order of the file.
        tensors: Likewise.
        alignment: What the place of each tensor is a multiple of, counted from ``data``.
        data: Where tensors begin.
    """

    path: Path
    size: int
    order: str
    version: int
    keys: dict[str, GgufKey]
    tensors: dict[str, GgufTensor]
    alignment: int
    data: int

    def value(self, name: str) -> Value:
        """The value of a key; None where there is none."""
        key = self.keys.get(name)
        return None if key is None else key.value


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike) -> GgufFile:
    """What a GGUF file says of itself. No tensor is read.

    Raises:
        RequestError: If it is missing, no GGUF file, of a version that is not known, damaged, or ends in its header.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise RequestError(f"{path} is no GGUF file.")
            size = os.fstat(file.fileno()).st_size
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).read()
    except FileNotFoundError as error:
        raise RequestError(f"{path} does not exist.") from error
    except IsADirectoryError as error:
        raise RequestError(f"{path} is a folder, and a GGUF file is needed.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    except _TooShort as error:
        raise RequestError(
            f"{path} ends within its header ({size} bytes): it is truncated. Fetch it again."
        ) from error
    except _Damaged as error:
        raise RequestError(f"{path} is damaged: {error}. Fetch it again.") from error


def read_gguf_plan(path: str | os.PathLike) -> Json:
    """The plan, as plain values, by which this package made a GGUF file.

    Raises:
        RequestError: If it cannot be read, or has none.
    """
    text = read_gguf(path).value(GGUF_PLAN_KEY)
    if not isinstance(text, str):
        raise RequestError(f"{path} has no key {GGUF_PLAN_KEY}: it was not pruned by this package.")
    try:
        values = json.loads(text, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: the key {GGUF_PLAN_KEY} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path}: the key {GGUF_PLAN_KEY} must hold a JSON object.")
    return values


def packed_string(text: str, order: str = "<") -> bytes:
    """A string as the format holds it: its length, and its bytes."""
    content = text.encode()
    return struct.pack(f"{order}Q", len(content)) + content


def packed_number(kind: int, value: int, order: str = "<") -> bytes:
    """A whole number as the format holds it, in the type of the one whose place it takes."""
    return struct.pack(f"{order}{_CODES[kind]}", value)


class _TooShort(Exception):
    pass


class _Damaged(Exception):
    pass


class _Reader:
    """Walks through the header of a file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size = path, data, size
        self.at = 4
        self.order = "<"

    def read(self) -> GgufFile:
        version = self.number("I")
        if version and version & 0xFFFF == 0:  # the other byte order
            self.order, self.at = ">", 4
            version = self.number("I")
        if version not in VERSIONS:
            raise RequestError(
                f"{self.path} is a GGUF file of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read. "
                "Convert the model anew with a llama.cpp of today."
            )
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        least = _FEWEST_BYTES_OF_KEY * num_keys + _FEWEST_BYTES_OF_TENSOR * num_tensors
        if least > self.size:
            raise _TooShort
        keys: dict[str, GgufKey] = {}
        for _ in range(num_keys):
            self.key(keys)
        alignment = 32
        if (given := keys.get(ALIGNMENT_KEY)) is not None:
            alignment = given.value if type(given.value) is int else 0
            if alignment < 1 or alignment & (alignment - 1):
                raise _Damaged(f"its {ALIGNMENT_KEY} is {given.value!r}, and must be a power of two")
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(num_tensors):
            self.tensor(found)
        data = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            if offset % alignment:
                raise _Damaged(f"{name} lies at {offset}, no multiple of {alignment}")
            tensors[name] = GgufTensor(kind, shape, data + offset)
        return GgufFile(self.path, self.size, self.order, version, keys, tensors, alignment, data)

    def take(self, count: int) -> int:
        """The place before some bytes, which are passed over."""
        at = self.at
        if count > self.size - at:
            raise _TooShort
        self.at += count
        return at

    def number(self, code: str) -> Any:
        at = self.take(struct.calcsize(code))
        return struct.unpack_from(self.order + code, self.data, at)[0]

    def string(self) -> str:
        count = self.number("Q")
        at = self.take(count)
        return self.data[at : at + count].decode(errors="surrogateescape")

    def key(self, keys: dict[str, GgufKey]) -> None:
        begin = self.at
        name = self.string()
        if name in keys:
            raise _Damaged(f"it has the key {name!r} twice")
        kind = self.number("I")
        at = self.at
        keys[name] = GgufKey(kind, self.value(kind, name), begin, at, self.at)

    def value(self, kind: int, name: str) -> Value:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(name, 0)
        if kind not in _CODES:
            raise _Damaged(f"the key {name!r} has a value of type {kind}, which is not known")
        return self.number(_CODES[kind])

    def array(self, name: str, depth: int) -> Value:
        kind, count = self.number("I"), self.number("Q")
        if depth > _DEEPEST:
            raise _Damaged(f"the key {name!r} holds arrays in arrays in arrays")
        if kind in _CODES:
            code = _CODES[kind]
            if count > self.size:
                raise _TooShort
            at = self.take(count * struct.calcsize(code))
            return struct.unpack_from(f"{self.order}{count}{code}", self.data, at) if count <= _LONGEST_ARRAY else None
        if kind not in (STRING, ARRAY):
            raise _Damaged(f"the key {name!r} has a value of type {kind}, which is not known")
        if count * (8 if kind == STRING else 12) > self.size - self.at:
            raise _TooShort
        if kind == ARRAY:
            for _ in range(count):
                self.array(name, depth + 1)
            return None
        unpack, size, at = struct.Struct(f"{self.order}Q").unpack_from, self.size, self.at
        for _ in range(count):  # a vocabulary: hundreds of thousands
            if at + 8 > size:
                raise _TooShort
            at += 8 + unpack(self.data, at)[0]
        if at > size:
            raise _TooShort
        self.at = at
        return None

    def tensor(self, tensors: dict[str, tuple[tuple[int, ...], int, int]]) -> None:
        name = self.string()
        if name in tensors:
            raise _Damaged(f"it names the tensor {name!r} twice")
        dimensions = self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _Damaged(f"{name} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if math.prod(shape) > 2**62:
            raise _Damaged(f"{name} has the shape {list(shape)}")
        tensors[name] = shape, self.number("I"), self.number("Q")
