# SPDX-License-Identifier: Apache-2.0
"""Ranges of bytes copied from file to file, and looked at while they are at hand."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.cutting import Piece
from ..errors import RunError
from ..progress import Work
from ..storage.tensor_files import TORCH_DTYPES, all_finite, header_bytes, reserve, write_all

_BUFFER = 4 * 2**20  # bytes looked at, or copied by hand, at once
_TOGETHER = 32 * 2**20  # bytes of neighbouring ranges that are copied in one piece
_AT_ONCE = 4
_SAMPLE = 4096  # bytes compared at each end of a range
_NOT_HERE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def _write_file(path: Path, pieces: dict[str, Piece], checkpoint: Checkpoint, work: Work) -> None:
    """Write one file, and have the library check it."""
    # Wide dtypes first: then every tensor lies at a multiple of the size of its elements, as the library writes them.
    width = {name: _element_bits(piece) for name, piece in pieces.items()}
    pieces = {name: pieces[name] for name in sorted(pieces, key=lambda name: -width[name])}
    header = header_bytes(
        {name: (piece.dtype, piece.shape, piece.nbytes) for name, piece in pieces.items()},
        {**checkpoint.metadata, "format": "mlx" if checkpoint.metadata.get("format") == "mlx" else "pt"},
    )
    with contextlib.ExitStack() as files:
        target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        files.callback(os.close, target)
        size = len(header) + sum(piece.nbytes for piece in pieces.values())
        reserve(target, size)  # a full disk is met now, and what is reserved at once is written faster
        write_all(target, header)
        copy_ranges(target, _placed(_ranges(pieces, checkpoint), len(header)), checkpoint.opened, work)
    try:
        with safe_open(path, framework="pt") as written:
            found_shapes = {name: tuple(written.get_slice(name).get_shape()) for name in written.keys()}
    except SafetensorError as error:
        raise RunError(f"{path.name} was not written as it should be: {error}") from error
    if found_shapes != {name: piece.shape for name, piece in pieces.items()}:
        raise RunError(f"{path.name} was not written as it should be: it holds other tensors.")


@dataclass(frozen=True)
class Range:
    """Neighbouring bytes of a source file, of one tensor."""

    piece: Piece
    begin: int
    end: int


def copy_ranges(
    target: int, places: Iterable[tuple[str, list[Range], int]], opened: Callable[[str], int], work: Work
) -> None:
    """Copy ranges of files into an open file, and look at what was written.

    Args:
        target: A descriptor of it.
        places: The file that ranges are in, which are neighbours, and where they go; of a piece whose bytes are no
            source's, no file.
        opened: Makes descriptors of files; they are closed here.
        work: Told how many bytes are done.

    Raises:
        RunError: If a weight is NaN or infinite, or what was written is not what was read.
    """
    descriptors: dict[str, int] = {}
    waiting: deque[Future[int]] = deque()
    # Several at once, so that one reads while another writes. The pool ends before the files are closed.
    with contextlib.ExitStack() as files, ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            for file, ranges, position in places:
                made = ranges[0].piece.data
                if made is not None:
                    os.pwrite(target, made, position)
                    work.update(len(made))
                    continue
                if file not in descriptors:
                    descriptors[file] = opened(file)
                    files.callback(os.close, descriptors[file])
                waiting.append(pool.submit(_copied, descriptors[file], target, ranges, position, file))
                while len(waiting) > 2 * _AT_ONCE or (waiting and waiting[0].done()):
                    work.update(waiting.popleft().result())
            while waiting:
                work.update(waiting.popleft().result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def ranges_of(piece: Piece, begin: int, end: int, row: int) -> Iterator[Range]:
    """The ranges that a piece is of a source tensor, whose bytes it has.

    Args:
        piece: What is retained.
        begin: Where the tensor begins in its file.
        end: Where it ends.
        row: Bytes of a row of its first dimension.
    """
    if piece.rows is None:
        yield from _parts(Range(piece, begin, end))
    for r in piece.rows or ():
        yield from _parts(Range(piece, begin + row * r, begin + row * (r + 1)))


def gathered(found: Iterable[tuple[str, Range]]) -> Iterator[tuple[str, list[Range]]]:
    """Ranges by file, in their order; neighbours stand together, up to a bound.

    A piece whose bytes are not the source's is of no file, and stands alone.
    """
    file = ""
    together: list[Range] = []
    for name, part in found:
        apart = not name or name != file or (together and together[-1].end != part.begin)
        if together and (apart or part.end - together[0].begin > _TOGETHER):
            yield file, together
            together = []
        file = name
        together.append(part)
    if together:
        yield file, together


def _placed(gathered: Iterable[tuple[str, list[Range]]], position: int) -> Iterator[tuple[str, list[Range], int]]:
    """Ranges with their places, one after the other."""
    for file, ranges in gathered:
        yield file, ranges, position
        position += ranges[-1].end - ranges[0].begin


def _ranges(pieces: Mapping[str, Piece], checkpoint: Checkpoint) -> Iterator[tuple[str, list[Range]]]:
    """The ranges of source files that the pieces are, in their order."""

    def every() -> Iterator[tuple[str, Range]]:
        for piece in pieces.values():
            if piece.data is not None:
                yield "", Range(piece, 0, piece.nbytes)
                continue
            entry = checkpoint.entry(piece.source)
            row = 0 if piece.rows is None else entry.nbytes // entry.shape[0]
            for part in ranges_of(piece, entry.begin, entry.end, row):
                yield checkpoint.tensors[piece.source].file, part

    return gathered(every())


def _parts(whole: Range) -> Iterator[Range]:
    """A range cut into parts that are copied in one piece; a multiple of any element's size."""
    for begin in range(whole.begin, whole.end, _TOGETHER):
        yield Range(whole.piece, begin, min(begin + _TOGETHER, whole.end))


def _element_bits(piece: Piece) -> int:
    return 8 * piece.nbytes // max(1, math.prod(piece.shape))


def _copy(source: int, target: int, begin: int, count: int, position: int, file: str) -> None:
    """Copy bytes from file to file at given places, by the system where it can, without passing through memory."""
    by_system = hasattr(os, "copy_file_range")
    while count:
        done = 0
        if by_system:
            try:
                done = os.copy_file_range(source, target, count, begin, position)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
            by_system = done > 0  # some file systems say 0 for cannot
        if not by_system:
            data = os.pread(source, min(count, _BUFFER), begin)
            if not data:
                raise RunError(f"{file} became shorter while it was read.")
            done = os.pwrite(target, data, position)
        begin, position, count = begin + done, position + done, count - done


def _copied(source: int, target: int, ranges: list[Range], position: int, file: str) -> int:
    """Copy neighbouring ranges and look at what was written while it is at hand; how many bytes it was.

    Experts and routers must be finite, and the first and last bytes of every range those of the source.
    """
    begin, end = ranges[0].begin, ranges[-1].end
    if hasattr(os, "posix_fadvise"):  # else the system reads ahead into experts that are not retained
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(source, begin, end - begin, os.POSIX_FADV_WILLNEED)
    _copy(source, target, begin, end - begin, position, file)
    for found in ranges:
        _check_ends(source, target, found, position + found.begin - begin)
        if found.piece.checked:
            _check_finite(target, found, position + found.begin - begin, file)
    return end - begin


def _check_ends(source: int, target: int, found: Range, position: int) -> None:
    count = found.end - found.begin
    for offset in {0, max(0, count - _SAMPLE)}:
        wanted = min(_SAMPLE, count)
        if os.pread(source, wanted, found.begin + offset) != os.pread(target, wanted, position + offset):
            raise RunError(f"{found.piece.source} was not written as it should be: its bytes differ.")


def _check_finite(target: int, found: Range, position: int, file: str) -> None:
    dtype = TORCH_DTYPES.get(found.piece.dtype)
    if dtype is None or not dtype.is_floating_point:
        return
    count = found.end - found.begin
    buffer = bytearray(min(count, _BUFFER))
    for offset in range(0, count, _BUFFER):
        data = memoryview(buffer)[: min(count - offset, _BUFFER)]
        if os.preadv(target, [data], position + offset) < len(data):
            raise RunError(f"{found.piece.source} was not written as it should be: the file is too short.")
        if not all_finite(torch.frombuffer(data, dtype=dtype)):
            raise RunError(f"{file}: {found.piece.source} holds NaN or infinite weights; the checkpoint is damaged.")
