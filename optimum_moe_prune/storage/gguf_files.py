# SPDX-License-Identifier: Apache-2.0
"""GGUF files without their tensors in memory: where each key and each tensor lies.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header, keys with values of any type, what
each tensor is called and where it lies, and the tensors, each at a multiple of the alignment.

``gguf.GGUFReader`` makes an array object of every token of a vocabulary, 475 MB and 6 seconds for 150,000 tokens with
their merges, stops at a type of tensor that it does not know, and cannot say that a file ends too early. Here the same
takes 0.2 seconds and no memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
_BUFFER = 2**18
_MOST_DIMENSIONS = 4
_FEWEST_BYTES = {STRING: 8, ARRAY: 12}
_FEWEST_BYTES_OF_KEY, _FEWEST_BYTES_OF_TENSOR = 13, 24

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
        changed_at: When it was changed last, in nanoseconds.
        order: Of the bytes of a number: ``<`` or ``>``, as ``struct`` has it.
        version: Of the format.
        keys: By name, in the order of the file.
        tensors: Likewise.
        infos: The first byte of what is said of tensors, and one past its last.
        alignment: What the place of each tensor is a multiple of, counted from ``data``.
        data: Where tensors begin.
    """

    path: Path
    size: int
    changed_at: int
    order: str
    version: int
    keys: dict[str, GgufKey]
    tensors: dict[str, GgufTensor]
    infos: tuple[int, int]
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
        with open(path, "rb", buffering=_BUFFER) as file:
            if file.read(4) != MAGIC:
                raise RequestError(f"{path} is no GGUF file{_what_else(file)}.")
            return _Reader(path, file, os.fstat(file.fileno())).read()
    except FileNotFoundError as error:
        raise RequestError(f"{path} does not exist.") from error
    except IsADirectoryError as error:
        raise RequestError(f"{path} is a folder, and a GGUF file is needed.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
    except _TooShort as error:
        raise RequestError(
            f"{path} ends within its header ({path.stat().st_size} bytes): it is truncated. Fetch it again."
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


def header_digest(parts: Iterable[bytes]) -> str:
    """What tells headers apart: a digest of all keys but the plan's, each as it stands there, and of the tensors'."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def digest_of_header(path: str | os.PathLike) -> str:
    """The digest of a file's header (:func:`header_digest`).

    Raises:
        RequestError: If it cannot be read.
    """
    found = read_gguf(path)
    spans = [(key.begin, key.end) for name, key in found.keys.items() if name != GGUF_PLAN_KEY]
    with open(path, "rb") as file:
        return header_digest(_span(file, begin, end) for begin, end in (*spans, found.infos))


def _span(file: BinaryIO, begin: int, end: int) -> bytes:
    file.seek(begin)
    return file.read(end - begin)


def packed_string(text: str, order: str = "<") -> bytes:
    """A string as the format holds it: its length, and its bytes."""
    content = text.encode()
    return struct.pack(f"{order}Q", len(content)) + content


def packed_number(kind: int, value: int, order: str = "<") -> bytes:
    """A whole number as the format holds it, in the type of the one whose place it takes."""
    return struct.pack(f"{order}{_CODES[kind]}", value)


def _what_else(file: BinaryIO) -> str:
    file.seek(0)
    pointer = file.read(24).startswith(b"version https://git-lfs")
    return ", but a Git LFS pointer to one (git lfs pull)" if pointer else ""


class _TooShort(Exception):
    pass


class _Damaged(Exception):
    pass


class _Reader:
    """Walks through the header of a file, which is not mapped: one that became shorter would end the process."""

    def __init__(self, path: Path, file: BinaryIO, found: os.stat_result) -> None:
        self.path, self.file, self.size, self.changed_at = path, file, found.st_size, found.st_mtime_ns
        self.at = 4
        self.order = "<"

    def read(self) -> GgufFile:
        version = self.number("I")
        if version and version & 0xFFFF == 0:  # the other byte order
            self.order, self.at = ">", 4
            self.file.seek(4)
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
        begin = self.at
        for _ in range(num_tensors):
            self.tensor(found)
        data = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            if offset % alignment:
                raise _Damaged(f"{name} lies at {offset}, no multiple of {alignment}")
            tensors[name] = GgufTensor(kind, shape, data + offset)
        return GgufFile(
            path=self.path,
            size=self.size,
            changed_at=self.changed_at,
            order=self.order,
            version=version,
            keys=keys,
            tensors=tensors,
            infos=(begin, self.at),
            alignment=alignment,
            data=data,
        )

    def take(self, count: int) -> bytes:
        """The next bytes."""
        found = self.file.read(count) if count <= self.size - self.at else b""
        if len(found) < count:
            raise _TooShort
        self.at += count
        return found

    def skip(self, count: int) -> None:
        """Pass over some bytes."""
        if count > self.size - self.at:
            raise _TooShort
        self.file.seek(count, os.SEEK_CUR)
        self.at += count

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.take(struct.calcsize(self.order + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="surrogateescape")

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
            size = count * struct.calcsize(self.order + code)
            if count <= _LONGEST_ARRAY:
                return struct.unpack(f"{self.order}{count}{code}", self.take(size))
            self.skip(size)
            return None
        if kind not in (STRING, ARRAY):
            raise _Damaged(f"the key {name!r} has a value of type {kind}, which is not known")
        if count * _FEWEST_BYTES[kind] > self.size - self.at:
            raise _TooShort
        for _ in range(count):  # a vocabulary: hundreds of thousands
            if kind == STRING:
                self.skip(self.number("Q"))
            else:
                self.array(name, depth + 1)
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
