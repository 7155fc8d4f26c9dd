# SPDX-License-Identifier: Apache-2.0
"""Files as people have them -> rows, one at a time: JSON lines, JSON, CSV, Parquet and text, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RequestError
from ..storage.kinds import kind_of
from .naming import not_there
from .records import COLUMNS, BadRecord, Origin, Reading

Rows = Iterator[tuple[Origin, Any]]
"""Rows with where they stand; in place of one that cannot be read, the ``BadRecord``."""

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READABLE = ".jsonl (one record a line), .json, .csv, .tsv, .parquet, .md and .txt are read"
UNPACKED = {".zst": "zstd -d", ".zip": "unzip", ".7z": "7z x", ".tar": "tar -xf", ".tgz": "tar -xf"}
"""Packed files that are not read, and what unpacks them."""
MOST_BYTES_IN_FIELD = 2**31 - 1
_BOMS = ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def domain_of(path: Path) -> str:
    """The file's name without its endings, which is the domain of what is in it."""
    return path.with_suffix("").stem if path.suffix.lower() in COMPRESSED else path.stem


def rows_of(path: Path, reading: Reading = Reading()) -> Rows:
    """The rows of a file, as its ending says.

    Raises:
        RequestError: If it is no such file, is damaged or has nothing in it.
    """
    if os.path.isdir(path):
        raise RequestError(_folder(path))
    kind = _kind(path)
    if kind is None:
        _check_there(path)
        if command := UNPACKED.get(path.suffix.lower()):
            raise RequestError(f"{path} is packed in a way that is not read; unpack it first ({command}).")
        if _no_utf8_at(path) is not None:
            raise _no_text(path)
        raise RequestError(f"{path} ends in {path.suffix or 'nothing'!r}; {READABLE}.")
    if path.exists() and not path.is_file():  # it would be gone when it has been read once
        raise RequestError(f"{path} is a pipe or a device; write what it gives into a file first.")
    empty = True
    try:
        with contextlib.closing(_FORMATS[kind](path, reading)) as rows:
            for row in rows:
                empty = False
                yield row
    except FileNotFoundError as error:
        raise RequestError(not_there(path)) from error
    except UnicodeDecodeError as error:
        raise _no_text(path) from error
    except RequestError:
        raise
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except (OSError, ValueError) as error:
        packed = path.suffix.lower() in COMPRESSED and getattr(error, "errno", None) is None
        raise (_damaged if packed else _unreadable)(path, error) from error
    if empty:
        raise RequestError(f"{path} is empty.")


def _kind(path: Path) -> str | None:
    """The format that a file's name says."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _FORMATS else None


def _folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file() and _kind(entry) is not None)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if (kind := kind_of(path)) is not None:
        return f"{path} is {kind}, and texts are needed: .jsonl or .txt files."
    return f"{path} is a folder; name the .jsonl or .txt files in it ({'there are ' + shown if names else 'none'})."


def _check_there(path: Path) -> None:
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise RequestError(not_there(path)) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RequestError:
    name = str(path) if len(str(path)) <= 60 else f"{str(path)[:60]}..."
    return RequestError(
        f"no file {name!r} can be read ({error.__class__.__name__}); to pass a text and not a file's name, put it "
        "in a list."
    )


def _no_text(path: Path) -> RequestError:
    kind = None if path.suffix.lower() in COMPRESSED else kind_of(path)
    is_text = kind is None and _kind(path) is not None
    way = f" and is {kind}" if kind else ""
    way += "; save it as UTF-8." if is_text else "; give .jsonl or .txt."
    return RequestError(f"{path} is not a text file (no UTF-8 at byte {_no_utf8_at(path)}){way}")


def _damaged(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path} is damaged or not {path.suffix}: {error}.")


# ------------------------------------------------------------------------------------------------ bytes and text


def _bytes(path: Path) -> BinaryIO:
    opened: BinaryIO = COMPRESSED.get(path.suffix.lower(), open)(path, "rb")
    return opened


def _text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """The file as text: UTF-8, with or without a mark before it, or UTF-16 with one."""
    with _bytes(path) as file:
        start = file.read(4)
    encoding = next((name for mark, name in _BOMS if start.startswith(mark)), "utf-8-sig")
    return io.TextIOWrapper(_bytes(path), encoding=encoding, newline=newline)


def _no_utf8_at(path: Path) -> int | None:
    """The byte from which a file is no UTF-8; None if it is."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with _bytes(path) as file:
        while chunk := file.read(2**20):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return at - held + error.start
            at += len(chunk)
    return at if decoder.getstate()[0] else None


# ------------------------------------------------------------------------------------------------------- formats


def _json_lines(path: Path, reading: Reading) -> Rows:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_line(line, Origin(f"line {number}", path))


def _json_line(line: str, origin: Origin) -> tuple[Origin, Any]:
    try:
        return origin, json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = "; a file of one array is named .json" if line.lstrip()[:1] == "[" else ""
        return origin, BadRecord(origin, f"is not JSON: {error}{hint}.")


def _json(path: Path, reading: Reading) -> Rows:
    """An array of records, an object with one under ``data``, one record, or, whatever it is called, JSON lines."""
    with _text(path) as file:
        text = file.read()
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].strip()[-1] == "}":
            yield from _json_lines(path, reading)
            return
        raise RequestError(f"{path} is not JSON: {error}.") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    elif isinstance(value, dict):
        named = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        known = COLUMNS | {reading.text_column}
        is_named = len(named) == 1 and len(value) == 1 and not known & set(value)
        if not is_named and not known & set(value) and (kind := kind_of(path)) is not None:
            raise RequestError(f"{path} is {kind}, and texts are needed: .jsonl or .txt files.")
        value = named[0] if is_named else [value]
    if not isinstance(value, list):
        raise RequestError(f"{path} holds a {type(value).__name__}, and not an array of records.")
    yield from ((Origin(f"record {number}", path), row) for number, row in enumerate(value, 1))


def _table(path: Path, reading: Reading) -> Rows:
    """A table with a head; of fields that belong to no column, the row is named."""
    with _text(path, newline="") as file:
        head = file.readline()
        file.seek(0)
        usual = "\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ","
        delimiter = next((sign for sign in (usual, ",", ";", "\t", "|") if sign in head), usual)
        before = csv.field_size_limit(MOST_BYTES_IN_FIELD)
        try:
            rows, line = csv.DictReader(file, delimiter=delimiter), 1
            while True:
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    origin = Origin(f"line {line + 1}", path)
                    yield origin, BadRecord(origin, f"is not a row of a table: {error}.")
                    continue
                if row is None:
                    return
                origin, line = Origin(f"line {line + 1}", path), rows.line_num
                if None in row:
                    fields = len(row) - 1 + len(row.pop(None))
                    yield origin, BadRecord(origin, f"has {fields} fields, and the head {len(row)}.")
                else:
                    yield origin, row
        finally:
            csv.field_size_limit(before)


def _parquet(path: Path, reading: Reading) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError(
            f"{path}: .parquet needs the [datasets] extra: pip install 'optimum-moe-prune[datasets]'."
        ) from error
    try:
        with _bytes(path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            names = file.schema_arrow.names
            wanted = COLUMNS | {reading.text_column}
            columns = [name for name in names if name in wanted]
            if not set(columns) - {"domain"}:
                columns = names  # the error names them
            number = 0
            for batch in file.iter_batches(64, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield Origin(f"row {number}", path), without_nulls(row)
    except pyarrow.ArrowException as error:
        raise RequestError(f"{path} is damaged or not .parquet: {str(error).splitlines()[0]}") from error


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table whose objects lack the keys that the table had to fill in: those of other rows' objects."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_nulls(v) for key, v in value.items() if v is not None}
        return {**kept, "content": None} if "content" in value and "content" not in kept else kept
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _documents(path: Path, reading: Reading) -> Rows:
    """Documents with blank lines between them."""
    with _text(path) as file:
        number, lines = 1, list[str]()
        for line in file:
            if lines and line.endswith("\n") and not line.strip(" \t\n"):  # the end of one, and its line's too
                yield from _document(lines, number, path)
                number, lines = number + 1, []
            else:
                lines.append(line)
        yield from _document(lines, number, path)


def _document(lines: list[str], number: int, path: Path) -> Rows:
    document = "".join(lines)
    if document.strip():
        yield Origin(f"document {number}", path), document.strip("\n")


def _whole(path: Path, reading: Reading) -> Rows:
    """The file as one document."""
    with _text(path) as file:
        document = file.read()
    if document.strip():
        yield Origin("the whole file", path), document.strip("\n")


_FORMATS: dict[str, Callable[[Path, Reading], Any]] = {
    ".jsonl": _json_lines,
    ".jsonlines": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".txt": _documents,
    ".md": _whole,
    ".markdown": _whole,
}
