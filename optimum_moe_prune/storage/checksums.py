# SPDX-License-Identifier: Apache-2.0
"""Checksums of unfinished work: whether files still hold what was put into them, at the speed of reading them.

CRC-32 finds every flipped bit and every burst of up to 32; it is no defence against a person.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .values import Json, Values

_PART = 16 * 2**20
_AT_ONCE = min(8, os.cpu_count() or 1)
_KEY = "checksum"


def file_checksum(path: str | os.PathLike) -> int:
    """The checksum of a whole file, its parts read at once by several threads.

    Raises:
        OSError: If it cannot be read.
    """
    size = Path(path).stat().st_size

    def part(begin: int) -> int:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            left, found = min(_PART, size - begin), 0
            while left and (data := file.read(min(left, 2**20))):
                found = zlib.crc32(data, found)
                left -= len(data)
            return found

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        parts = list(pool.map(part, range(0, size, _PART)))
    return zlib.crc32(json.dumps([size, *parts]).encode())


def tensor_checksum(tensor: Tensor, before: int = 0) -> int:
    """The checksum of a tensor's values, after what was checked before."""
    if not tensor.numel():
        return before
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return zlib.crc32(flat.numpy().data, before)


def sealed(values: Values) -> Json:
    """Plain values with a checksum of them."""
    return {**values, _KEY: _of_values(values)}


def is_sealed(values: Values) -> bool:
    """Whether plain values still are what the checksum among them was made of."""
    return values.get(_KEY) == _of_values({key: value for key, value in values.items() if key != _KEY})


def _of_values(values: Values) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
