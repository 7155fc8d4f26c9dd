# SPDX-License-Identifier: Apache-2.0
"""JSON values and the versions of file formats."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError

Json = dict[str, Any]
"""A JSON object, or keyword arguments: plain values by name."""
Values = Mapping[str, Any]
"""The same, only read."""


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RequestError: If the file is missing, is not JSON, or holds something else than an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
    except FileNotFoundError as error:
        raise RequestError(f"{path} does not exist.") from error
    except IsADirectoryError as error:
        raise RequestError(f"{path} is a folder, and a file is needed.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} cannot be read as JSON: it is no text.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {_why(error)}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path} must hold a JSON object, and holds a {type(value).__name__}.")
    return value


def _why(error: Exception) -> str:
    """What is wrong with a file that is no JSON, in words where the usual reasons are."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if not error.doc.strip():
        return "it is empty."
    if error.msg == "Extra data":
        return f"it holds more than one value, the second from line {error.lineno}; is it one of JSON lines (.jsonl)?"
    return str(error)


@contextlib.contextmanager
def read_from(path: str | os.PathLike) -> Iterator[None]:
    """Name the file in what is refused of its values inside a ``with``.

    Raises:
        RequestError: As it was raised, with the file.
    """
    try:
        yield
    except RequestError as error:
        if str(path) in str(error):
            raise
        raise RequestError(f"{path}: {error}") from error


def check_version(values: Mapping[str, Any], newest: int, what: str) -> None:
    """Raise unless values read from a file are of a format this package reads.

    Raises:
        RequestError: If their ``format_version`` is newer, or none.
    """
    version = values.get("format_version")
    if type(version) is not int or not 1 <= version <= newest:
        raise RequestError(f"{what} has format version {version!r}; this package reads up to {newest}.")


def is_integer(value: Any) -> bool:
    """Whether a value read from JSON is an integer; Python counts truth values among them."""
    return isinstance(value, int) and not isinstance(value, bool)


_UNITS = {"": 1, "B": 1} | {
    prefix + end: base**power
    for power, prefix in enumerate("KMGT", 1)
    for end, base in (("", 1000), ("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]?I?B?)", re.IGNORECASE)


def size_bytes(size: str | int, what: str) -> int:
    """Bytes, of a number or a size in words: ``"24GB"``, ``"1.5 TB"``, ``"512MiB"``.

    Args:
        size: The size.
        what: Whose, for messages.

    Raises:
        RequestError: If it is no size, or not a whole byte.
    """
    match = _SIZE.fullmatch(str(size).strip())
    unit = "" if match is None else match[2].upper()
    nbytes = 0 if match is None or unit not in _UNITS else int(float(match[1]) * _UNITS[unit])
    if nbytes < 1 or isinstance(size, bool):
        raise RequestError(f"{what} is {size!r}; it must be a number of bytes, or one with KB, MB, GB, TB, or GiB.")
    return nbytes


def fraction(value: object) -> float:
    """A fraction as people write it: ``0.4``, ``"0.4"``, ``"40%"``.

    Raises:
        RequestError: If it is no number, or a percentage without its sign.
    """
    text = str(value).strip()
    percent = text.endswith("%")
    number = text.removesuffix("%").strip()
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", number):
        comma = re.fullmatch(r"(\d*),(\d+)", number)
        meant = f"; did you mean {comma[1] or 0}.{comma[2]}{'%' * percent}?" if comma else ", as 0.4 or 40%."
        raise RequestError(f"{value!r} is no fraction{meant}")
    if percent:
        return float(number) / 100
    if 2 <= float(number) <= 100:
        raise RequestError(
            f"{text} is more than the whole; write {text}% or {float(number) / 100:g} (fractions lie between 0 and 1)."
        )
    return float(number)


def no_constant(name: str) -> float:
    """For ``json.loads(parse_constant=...)``: NaN and infinity, which Python reads, are not JSON."""
    raise ValueError(f"{name} is not JSON")
