# SPDX-License-Identifier: Apache-2.0
"""A GGUF file written anew: the keys as they are in the source, byte for byte, and tensors copied from file to file.

``gguf.GGUFWriter`` wants every value as a Python object and leaves out empty strings and arrays, so a file that goes
through it does not keep all its keys; and it holds tensors in memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoints.cutting import Piece
from ...errors import RequestError, RunError
from ...names import GGUF_PLAN_KEY
from ...plan import PruningPlan
from ...progress import working
from ...storage.gguf_files import (
    MAGIC,
    STRING,
    GgufFile,
    digest_of_header,
    header_digest,
    packed_number,
    packed_string,
    read_gguf,
    read_gguf_plan,
)
from ...storage.tensor_files import reserve, write_all
from ...surgery.copying import Range, copy_ranges, gathered, ranges_of
from .model import SPLIT_KEYS, GgufModel
from .tensors import COUNT


@dataclass(frozen=True)
class NewTensor:
    """A tensor of the output.

    Attributes:
        kind: The number of its type.
        piece: What it is of which tensor of the source.
    """

    kind: int
    piece: Piece


@dataclass(frozen=True)
class Output:
    """A file to write.

    Attributes:
        model: The source.
        tensors: What is written, by name, in its order.
        count: Experts of each layer.
        plan: The plan.
    """

    model: GgufModel
    tensors: Mapping[str, NewTensor]
    count: int
    plan: PruningPlan

    @functools.cached_property
    def header(self) -> bytes:
        """Everything before the tensors: keys as they are, but for what counts experts, and with the plan."""
        first, order = self.model.parts[0], self.model.parts[0].order
        keys, infos = list(self._keys()), b"".join(_infos(self.tensors, first))
        written = {"form": "GGUF", "header": header_digest([*keys, infos])}
        plan = replace(self.plan, provenance={**self.plan.provenance, "output": written})
        text = packed_string(json.dumps(plan.to_dict()), order)
        keys.append(packed_string(GGUF_PLAN_KEY, order) + struct.pack(f"{order}I", STRING) + text)
        counts = struct.pack(f"{order}IQQ", first.version, len(self.tensors), len(keys))
        header = b"".join([MAGIC, counts, *keys, infos])
        return header + bytes(-len(header) % first.alignment)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        alignment = self.model.parts[0].alignment
        return len(self.header) + sum(_padded(new.piece.nbytes, alignment) for new in self.tensors.values())

    def _keys(self) -> Iterator[bytes]:
        """The keys of the source, each with its value."""
        model, first = self.model, self.model.parts[0]
        left_out = {GGUF_PLAN_KEY, *(SPLIT_KEYS if len(model.parts) > 1 else ())}
        with open(first.path, "rb") as file:
            for name, key in first.keys.items():
                if name in left_out:
                    continue
                file.seek(key.begin)
                content = file.read(key.end - key.begin)
                if name == model.key(COUNT):
                    content = content[: key.at - key.begin] + packed_number(key.kind, self.count, first.order)
                yield content

    def write(self, path: Path) -> None:
        """Write it.

        Args:
            path: The file, absent.

        Raises:
            RunError: If a retained weight is NaN or infinite, or a source was changed while it was read.
        """
        model, tensors = self.model, self.tensors
        places, position = {}, len(self.header)
        for name, new in tensors.items():
            places[name] = position
            position += _padded(new.piece.nbytes, model.parts[0].alignment)
        parts = {str(part.path): part for part in model.parts}
        total = sum(new.piece.nbytes for new in tensors.values())
        with contextlib.ExitStack() as files:
            target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            files.callback(os.close, target)
            reserve(target, position)
            write_all(target, self.header)
            with working("writing the GGUF file", total, "B", "wrote") as work:
                copy_ranges(target, _placed(model, tensors, places), lambda file: _opened(parts[file]), work)
        for part in model.parts:
            os.close(_opened(part))
        _check_written(path, tensors, places)


def own_plan(path: str | os.PathLike) -> PruningPlan:
    """The plan of a file that this package wrote, and nobody changed since: quantised anew it is another's work.

    Raises:
        RequestError: If it is something else.
    """
    plan = PruningPlan.from_dict(read_gguf_plan(path))
    written = plan.provenance.get("output")
    if not isinstance(written, dict) or written.get("header") != digest_of_header(path):
        raise RequestError(f"{path} was changed since this package wrote it.")
    return plan


def _infos(tensors: Mapping[str, NewTensor], first: GgufFile) -> Iterator[bytes]:
    """What each tensor is called, its shape, its type, and where it lies."""
    offset = 0
    for name, new in tensors.items():
        shape = new.piece.shape[::-1]
        yield packed_string(name, first.order)
        yield struct.pack(f"{first.order}I{len(shape)}QIQ", len(shape), *shape, new.kind, offset)
        offset += _padded(new.piece.nbytes, first.alignment)


def _placed(
    model: GgufModel, tensors: Mapping[str, NewTensor], places: Mapping[str, int]
) -> Iterator[tuple[str, list[Range], int]]:
    """The ranges of the source's files that the tensors are, with their places in the output."""
    for name, new in tensors.items():
        position, piece = places[name], new.piece
        if piece.data is not None:
            yield "", [Range(piece, 0, piece.nbytes)], position
            continue
        placed = model.tensors[piece.source]
        file, begin = str(model.parts[placed.part].path), placed.tensor.begin
        row = 0 if piece.rows is None else placed.nbytes // placed.rows
        for _, ranges in gathered((file, part) for part in ranges_of(piece, begin, begin + placed.nbytes, row)):
            yield file, ranges, position
            position += ranges[-1].end - ranges[0].begin


def _opened(part: GgufFile) -> int:
    """A descriptor of a file whose header was read, if it is still the same.

    Raises:
        RunError: If it is not.
    """
    descriptor = os.open(part.path, os.O_RDONLY)
    found = os.fstat(descriptor)
    if (found.st_size, found.st_mtime_ns) != (part.size, part.changed_at):
        os.close(descriptor)
        raise RunError(f"{part.path} was changed while it was read.")
    return descriptor


def _check_written(path: Path, tensors: Mapping[str, NewTensor], places: Mapping[str, int]) -> None:
    try:
        written = read_gguf(path).tensors
    except RequestError as error:
        raise RunError(f"the output was not written as it should be: {error}") from error
    expected = {name: (new.kind, new.piece.shape, places[name]) for name, new in tensors.items()}
    if {name: (found.kind, found.shape, found.begin) for name, found in written.items()} != expected:
        raise RunError("the output was not written as it should be: it holds other tensors.")


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
