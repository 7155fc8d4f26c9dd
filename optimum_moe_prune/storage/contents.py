# SPDX-License-Identifier: Apache-2.0
"""What files hold, in a few bytes: whether one is still the one it was, without reading all of a large one.

Of a file up to ``WHOLE_BYTES`` every byte counts. Of a larger one its length counts, and blocks of 4 KiB: of a
safetensors file the header, and blocks of every tensor, of each expert where a tensor holds several (of each row of
the first of three dimensions), and of every 16 MiB; of another file one of every MiB. So weights that were trained
further, merged, or replaced, be it those of one expert in one layer, are noticed; a change of single numbers in a
large file may not be.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WHOLE_BYTES = 64 * 2**20
_BLOCK = 4096
_APART = 16 * 2**20
_READ = 2**20
_AT_ONCE = 8


def content_digest(path: str | os.PathLike) -> str:
    """A hash of what a file holds, as far as the module says.

    Raises:
        OSError: If it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(file).st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        for begin, count in _blocks(file, size, str(path)):
            _add(digest, file, begin, count)
        return digest.hexdigest()
    finally:
        os.close(file)


def content_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """The same of several files."""
    paths = list(paths)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(paths, pool.map(content_digest, paths), strict=True))


def bytes_digest(content: bytes) -> str:
    """As :func:`content_digest`, of a file with this content of at most ``WHOLE_BYTES``."""
    digest = hashlib.blake2b(str(len(content)).encode(), digest_size=16)
    digest.update(content)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, file: int, begin: int, count: int) -> None:
    os.lseek(file, begin, os.SEEK_SET)
    while count and (data := os.read(file, min(count, _READ))):
        digest.update(data)
        count -= len(data)


def _blocks(file: int, size: int, path: str) -> Iterator[tuple[int, int]]:
    """Beginning and length of what is looked at."""
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    tensors = _tensors(file, size) if path.endswith(".safetensors") else None
    if tensors is None:
        yield from ((begin, _BLOCK) for begin in range(0, size, 2**20))
        return
    start, entries = tensors
    yield 0, start
    for name, begin, end, rows in entries:
        length = end - begin
        rows = max(rows, -(-length // _APART))
        step = length // rows
        if step <= 2 * _BLOCK:
            yield begin, length
            continue
        for row in range(rows):  # somewhere in it: rows may begin alike
            yield begin + row * step + zlib.crc32(f"{name} {row}".encode()) % (step - _BLOCK), _BLOCK


def _tensors(file: int, size: int) -> tuple[int, list[tuple[str, int, int, int]]] | None:
    """Where the tensors begin, and each with its name, first byte, one past its last, and how many parts it has.

    None if the header cannot be read.
    """
    start = 8 + int.from_bytes(os.read(file, 8), "little")
    if start > min(size, 100 * 2**20):
        return None
    try:
        header = json.loads(os.read(file, start - 8))
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            rows = entry["shape"][0] if len(entry["shape"]) > 2 else 1
            if not 0 <= begin <= end <= size - start or not 0 <= rows <= size:
                return None
            entries.append((name, start + begin, start + end, max(1, rows)))
        return start, sorted(entries, key=lambda entry: entry[1])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
