# SPDX-License-Identifier: Apache-2.0
"""Calibration input of every kind -> records: text, chat messages or token ids, with a domain."""

from __future__ import annotations

import json
import logging
import os.path
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..storage.values import Json

logger = logging.getLogger(__name__)

DEFAULT_DOMAIN = "default"
POOL_ROWS = 10_000
"""The most rows that are read of a dataset on the Hub for which no number is given."""


@dataclass(frozen=True)
class HubMixture:
    """Datasets on the Hub as a calibration; they are read when samples are chosen (needs the ``[datasets]`` extra).

    ``:samples`` says among how many of a dataset's first rows the samples are chosen. Without it, choosing the first
    ``num_samples`` ends when it has them; any other choice (``"random"``, ``"kmeans"``, packed samples) is made among
    the first ``POOL_ROWS`` rows, with a warning where there are more; and all rows (no ``num_samples``) are taken of
    datasets up to that size.

    Attributes:
        mixture: Comma-separated ``name[config](split):samples``; ``[config]`` and ``:samples`` may be left out, the
            split is ``train`` by default. Each dataset is a domain of its name, unless it has a ``domain`` column.
    """

    mixture: str


@dataclass(frozen=True)
class _Record:
    """One sample before tokenisation: text, chat messages or token ids, and where it came from."""

    origin: str
    content: str | list[Any] | Tensor
    domain: str


def _sources(source: Any) -> tuple[str, ...]:
    """Names of the files of a calibration, whose folders are nobody else's business; or a mixture on the Hub."""
    if isinstance(source, HubMixture):
        return (f"hub:{source.mixture}",)
    paths = source if isinstance(source, (list, tuple)) else [source]
    files = [path for path in paths if isinstance(path, PathLike) or (path is source and isinstance(path, str))]
    return tuple(Path(path).name for path in files)


def _records(source: Any) -> Iterator[_Record]:
    if isinstance(source, (str, PathLike)):
        yield from _file_records(Path(source))
    elif isinstance(source, Tensor):
        rows = source[None] if source.ndim == 1 else source
        if rows.ndim != 2:
            raise RequestError(
                f"token tensors have shape (tokens,) or (samples, tokens), and this one {tuple(source.shape)}."
            )
        yield from (_token_record(row, number) for number, row in enumerate(rows))
    elif hasattr(source, "column_names"):  # datasets.Dataset, without importing it
        yield from (_mapping_record(row, f"dataset row {number}", DEFAULT_DOMAIN) for number, row in enumerate(source))
    elif isinstance(source, (list, tuple)):
        yield from _list_records(source)
    else:
        raise RequestError(
            f"calibration of type {type(source).__name__} is not understood; give texts, files, records with 'text', "
            "or token tensors."
        )


def _list_records(items: Sequence[Any]) -> Iterator[_Record]:
    kinds = {type(item).__name__ for item in items}
    if all(isinstance(item, str) for item in items):
        if items and all(map(os.path.isfile, items)):
            raise RequestError(
                f"the calibration is a list of strings, which are texts, but each names a file ({items[0]}); pass "
                "pathlib.Path objects to read files."
            )
        yield from (_Record(f"text {number}", text, DEFAULT_DOMAIN) for number, text in enumerate(items))
    elif all(isinstance(item, PathLike) for item in items):
        for item in items:
            yield from _file_records(Path(item))
    elif all(isinstance(item, Mapping) for item in items):
        yield from (_mapping_record(item, f"record {number}", DEFAULT_DOMAIN) for number, item in enumerate(items))
    elif all(isinstance(item, Tensor) and item.ndim == 1 for item in items):
        yield from (_token_record(item, number) for number, item in enumerate(items))
    else:
        raise RequestError(f"a calibration list must hold one kind of thing, and holds {', '.join(sorted(kinds))}.")


def _token_record(ids: Tensor, number: int) -> _Record:
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise RequestError(f"token tensor {number} has dtype {ids.dtype}; token ids are integers.")
    return _Record(f"token sample {number}", ids.detach().cpu(), DEFAULT_DOMAIN)


def _mapping_record(record: Any, origin: str, domain: str) -> _Record:
    if not isinstance(record, Mapping):
        raise RequestError(f"{origin} must be an object with 'text' or 'messages', and is a {type(record).__name__}.")
    text, messages = record.get("text"), record.get("messages")
    content = text if isinstance(text, str) else messages if text is None and isinstance(messages, list) else None
    if content is None:
        keys = ", ".join(map(str, record)) or "none"
        raise RequestError(f"{origin} must have 'text' (a string) or 'messages' (a list); its keys: {keys}.")
    label = record.get("domain", domain)
    label = str(domain if label is None else label)
    _check_unicode(label, f"the domain of {origin}")
    return _Record(origin, content, label)


def _check_unicode(text: str, what: str) -> None:
    """Refuse half characters, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what} is not valid Unicode text: {error.reason}.") from error


def _file_records(path: Path) -> Iterator[_Record]:
    if os.path.isdir(path):
        raise RequestError(f"{path} is a folder; name the .jsonl or .txt files in it.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RequestError(f"the file {path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not a text file (no UTF-8 at byte {error.start}); give .jsonl or .txt."
        ) from error
    except (OSError, ValueError) as error:
        name = str(path) if len(str(path)) <= 60 else f"{str(path)[:60]}..."
        raise RequestError(
            f"no file {name!r} can be read ({error.__class__.__name__}); to pass a text and not a file's name, put it "
            "in a list."
        ) from error
    if not text.strip():
        raise RequestError(f"{path} is empty.")
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{path}, line {number} is not JSON: {error}.") from error
            yield _mapping_record(record, f"{path}, line {number}", path.stem)
    elif path.suffix == ".txt":
        for number, document in enumerate(re.split(r"\n[ \t]*\n", text), 1):
            if document.strip():
                yield _Record(f"{path}, document {number}", document.strip("\n"), path.stem)
    else:
        raise RequestError(
            f"{path} ends in {path.suffix or 'nothing'!r}; .jsonl (one record a line) and .txt are read."
        )


_HUB_PART = re.compile(r"^(?P<name>[^\[\](),:]+)(\[(?P<config>[^\]]+)\])?(\((?P<split>[^)]+)\))?(:(?P<count>\d+))?$")


def hub_records(mixture: str, usable: int | None = None, everything: bool = True) -> list[Json]:
    """Records of a mixture (:class:`HubMixture`).

    Args:
        mixture: The mixture.
        usable: The most records of a domain that can be used, which are its first; None where it may be any.
        everything: Whether all rows are asked for: a dataset of more than ``POOL_ROWS`` is then refused, if no number
            is given for it, and not cut.

    Raises:
        RequestError: If the mixture cannot be read, a number is missing, or the ``[datasets]`` extra.
    """
    parts: list[Json] = []
    for text in mixture.split(","):
        match = _HUB_PART.match(text.strip())
        if match is None:
            raise RequestError(f"{text.strip()!r} is not of the form name[config](split):samples.")
        parts.append(match.groupdict())
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RequestError(
            "Hub datasets need the [datasets] extra: pip install 'optimum-moe-prune[datasets]'."
        ) from error
    records = []
    for part in parts:
        rows = load_dataset(part["name"], part["config"], split=part["split"] or "train", streaming=True)
        count = None if part["count"] is None else int(part["count"])
        usable_rows = _usable_rows(rows, part["name"], count, usable, everything)
        records += [{"domain": part["name"], **row} for row in usable_rows]
    return records


def _usable_rows(
    rows: Iterable[Any], name: str, count: int | None, usable: int | None, everything: bool
) -> Iterator[Any]:
    """The first rows of a dataset, as far as they can be used."""
    taken: Counter[str] = Counter()
    for number, row in enumerate(islice(rows, count)):
        if count is None and number == POOL_ROWS:
            if everything:
                raise RequestError(
                    f"the dataset {name} has more than {POOL_ROWS} rows, and all of them are asked for; say how many "
                    f"to read ({name}:{POOL_ROWS}), or how many samples to use (num_samples)."
                )
            logger.warning("samples are chosen among the first %d rows of %s; %s:N takes N.", POOL_ROWS, name, name)
            return
        domain = str(row.get("domain"))
        taken[domain] += 1
        if usable is None or taken[domain] <= usable:
            yield row
        if taken[domain] == usable and "domain" not in row:  # nor in the others: they are one domain, which has enough
            return
