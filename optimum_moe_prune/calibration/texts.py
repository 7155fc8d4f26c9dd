# SPDX-License-Identifier: Apache-2.0
"""Calibration input of every kind -> records: text, chat messages or token ids, with a domain."""

from __future__ import annotations

import contextlib
import logging
import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..storage.contents import content_digest
from ..storage.values import Json
from .counts import Tally
from .presets import PREFIX, Part, preset_parts
from .readers import domain_of, rows_of, without_nulls
from .records import DEFAULT_DOMAIN, BadRecord, Origin, Reading, Record, record_of, said_domain

logger = logging.getLogger(__name__)

POOL_ROWS = 10_000
"""The most rows that are read of a dataset on the Hub for which no number is given."""
LARGE_FILE = 64 * 2**20
"""Of files of more bytes no more is read than is used, where their first records say no domain."""

UNREACHABLE = frozenset({"ConnectionError", "ConnectError", "TimeoutException", "Timeout", "TimeoutError"})
"""Errors, by name, where the Hub does not answer."""

Row = tuple[Origin, Any, str]
"""Where it stands, what it holds, and its domain if it does not say one."""


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
            ``preset:NAME`` and ``preset:NAME:samples`` stand for the datasets of a preset (``calibration.presets``).
    """

    mixture: str

    @property
    def sources(self) -> tuple[str, ...]:
        """As the command line names it."""
        if PREFIX not in self.mixture:
            return (f"hub:{self.mixture}",)
        parts = map(str.strip, self.mixture.split(","))
        return tuple(part if part.startswith(PREFIX) else f"hub:{part}" for part in parts)


def resolved(source: Any) -> Any:
    """The source that is meant: of ``"hub:..."`` and ``"preset:..."`` the mixture on the Hub."""
    if isinstance(source, str) and source.startswith(("hub:", PREFIX)) and not os.path.isfile(source):
        return HubMixture(source.removeprefix("hub:"))
    return source


def source_names(source: Any) -> tuple[str, ...]:
    """Names of the files of a calibration, whose folders are nobody else's business; or a mixture on the Hub."""
    if isinstance(source, HubMixture):
        return source.sources
    return tuple(path.name for path in _files(source))


def _files(source: Any) -> list[Path]:
    paths = source if isinstance(source, (list, tuple)) else [source]
    files = [path for path in paths if isinstance(path, PathLike) or (path is source and isinstance(path, str))]
    return [Path(path) for path in files]


def file_hashes(source: Any) -> dict[str, str]:
    """A hash of each file of a calibration, by its name, of large ones not of all; of a mixture its name alone."""
    hashes = dict.fromkeys(source_names(source), "") if isinstance(source, HubMixture) else {}
    for path in _files(source):
        with contextlib.suppress(OSError, ValueError):  # what is no file is refused where it is read
            if path.is_file():  # a pipe can be read once
                hashes[path.name] = hashes.get(path.name, "") + content_digest(path)
    return hashes


def needs_tokenizer(source: Any) -> bool:
    """Whether a calibration is text, and not token ids."""
    if isinstance(source, (list, tuple)):
        return not source or not all(isinstance(item, Tensor) for item in source)
    return not isinstance(source, Tensor) and not hasattr(source, "token_ids")


def records(rows: Iterable[Row], reading: Reading, tally: Tally) -> Iterator[Record]:
    """The records in rows; blank ones are left out, and with ``skip_bad`` those that cannot be used.

    Args:
        rows: As :func:`rows_of_source` gives them.
        reading: How they are read.
        tally: Counts them.

    Raises:
        BadRecord: If one cannot be used.
    """
    for origin, row, domain in rows:
        tally.numbers["read"] += 1
        try:
            if isinstance(row, BadRecord):
                raise row
            is_tensor = isinstance(row, Tensor)
            record = Record(origin, row, domain) if is_tensor else record_of(row, origin, domain, reading)
        except BadRecord as error:
            if not reading.skip_bad:
                raise
            if isinstance(row, Mapping):
                label = said_domain(row)
                tally.domains.setdefault(domain if label is None else str(label))
            tally.leave_out("bad", error)
            continue
        tally.domains.setdefault(record.domain)
        if record.is_blank:
            tally.leave_out("blank", BadRecord(origin, "is blank."))
        else:
            yield record


def rows_of_source(
    source: Any, reading: Reading, tally: Tally, is_enough: Callable[[str], bool] = lambda domain: False
) -> Iterator[Row]:
    """The rows of a calibration that is no mixture on the Hub.

    Args:
        source: See ``CalibrationInput``.
        reading: How files are read.
        tally: Takes a remark where a file is not read to its end.
        is_enough: Whether no further records of a domain are needed. Large files of one domain are then not read on.

    Raises:
        RequestError: If it is nothing of the kind, or a file cannot be read.
    """
    if isinstance(source, (str, PathLike)):
        yield from _file_rows(Path(source), reading, tally, is_enough)
    elif isinstance(source, Tensor):
        rows = source[None] if source.ndim == 1 else source
        if rows.ndim != 2:
            raise RequestError(
                f"token tensors have shape (tokens,) or (samples, tokens), and this one {tuple(source.shape)}."
            )
        yield from (_token_row(row, number) for number, row in enumerate(rows))
    elif hasattr(source, "column_names"):  # datasets.Dataset, without importing it
        if isinstance(source, Mapping):
            raise RequestError(f"the calibration is a dataset of several splits; pass one ({', '.join(source)}).")
        for number, row in enumerate(source):
            yield Origin(f"dataset row {number}"), without_nulls(row), DEFAULT_DOMAIN
    elif isinstance(source, (list, tuple)):
        yield from _list_rows(source, reading, tally, is_enough)
    else:
        raise RequestError(
            f"calibration of type {type(source).__name__} is not understood; give texts, files, records with 'text', "
            "or token tensors."
        )


def _list_rows(
    items: Sequence[Any], reading: Reading, tally: Tally, is_enough: Callable[[str], bool]
) -> Iterator[Row]:
    kinds = {type(item).__name__ for item in items}
    if all(isinstance(item, str) for item in items):
        if items and all(map(os.path.isfile, items)):
            raise RequestError(
                f"the calibration is a list of strings, which are texts, but each names a file ({items[0]}); pass "
                "pathlib.Path objects to read files."
            )
        yield from ((Origin(f"text {number}"), text, DEFAULT_DOMAIN) for number, text in enumerate(items))
    elif all(isinstance(item, PathLike) for item in items):
        for item in items:
            yield from _file_rows(Path(item), reading, tally, is_enough)
    elif all(isinstance(item, (Mapping, list)) for item in items):  # records, or chats
        yield from ((Origin(f"record {number}"), item, DEFAULT_DOMAIN) for number, item in enumerate(items))
    elif all(isinstance(item, Tensor) and item.ndim == 1 for item in items):
        yield from (_token_row(item, number) for number, item in enumerate(items))
    else:
        raise RequestError(f"a calibration list must hold one kind of thing, and holds {', '.join(sorted(kinds))}.")


def _token_row(ids: Tensor, number: int) -> Row:
    if ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise RequestError(f"token tensor {number} has dtype {ids.dtype}; token ids are integers.")
    return Origin(f"token sample {number}"), ids.detach().cpu(), DEFAULT_DOMAIN


def _file_rows(path: Path, reading: Reading, tally: Tally, is_enough: Callable[[str], bool]) -> Iterator[Row]:
    domain, large = domain_of(path), False
    with contextlib.suppress(OSError, ValueError):  # what is wrong with the file is said when it is read
        large = path.stat().st_size > LARGE_FILE
    for number, (origin, row) in enumerate(rows_of(path, reading), 1):
        large = large and not (isinstance(row, Mapping) and said_domain(row) is not None)
        yield origin, row, domain
        if large and is_enough(domain):
            tally.remarks.append(f"{path.name} was read as far as it was used, {number} records that say no domain.")
            return


# ------------------------------------------------------------------------------------------------------- the Hub

_HUB_PART = re.compile(r"^(?P<name>[^\[\](),:]+)(\[(?P<config>[^\]]+)\])?(\((?P<split>[^)]+)\))?(:(?P<count>\d+))?$")


def hub_parts(mixture: str) -> list[Part]:
    """The datasets of a mixture (:class:`HubMixture`).

    Raises:
        RequestError: If it cannot be read.
    """
    parts: list[Part] = []
    for text in map(str.strip, mixture.removeprefix("hub:").split(",")):
        if text.startswith(PREFIX):
            parts += preset_parts(text)
            continue
        match = _HUB_PART.match(text)
        if match is None:
            raise RequestError(f"{text!r} is not of the form name[config](split):samples.")
        count = None if match["count"] is None else int(match["count"])
        parts.append(Part(match["name"], match["config"], match["split"] or "train", count, match["name"]))
    return parts


def hub_remarks(parts: Sequence[Part]) -> list[str]:
    """What is read from the Hub and under which licences, where they are known."""
    told = "; ".join(f"{part.spec}, {part.licence}" for part in parts if part.licence)
    return [f"Read from the Hub: {told}."] if told else []


def hub_records(mixture: str, usable: int | None = None, everything: bool = True) -> list[Json]:
    """Records of a mixture: the rows of :func:`hub_rows`, each with its domain."""
    return [{"domain": domain, **row} for _, row, domain in hub_rows(hub_parts(mixture), usable, everything)]


def hub_rows(
    parts: Sequence[Part], usable: int | None = None, everything: bool = True, reading: Reading = Reading()
) -> Iterator[Row]:
    """Rows of datasets on the Hub.

    Args:
        parts: The datasets.
        usable: The most records of a domain that can be used, which are its first; None where it may be any.
        everything: Whether all rows are asked for: a dataset of more than ``POOL_ROWS`` is then refused, if no number
            is given for it, and not cut.
        reading: How records are read.

    Raises:
        RequestError: If a dataset cannot be reached or read, a number is missing, or the ``[datasets]`` extra.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RequestError(
            "Hub datasets need the [datasets] extra: pip install 'optimum-moe-prune[datasets]'."
        ) from error
    for part in parts:
        try:
            with _no_retries_shown():
                rows = load_dataset(part.name, part.config, split=part.split, streaming=True)
            for number, row in enumerate(_usable_rows(rows, part, usable, everything, reading)):
                yield Origin(f"{part.name} row {number}"), without_nulls(row), part.domain
        except RequestError:
            raise
        except Exception as error:  # of the Hub, of the network and of every format that a dataset may have
            raise _not_read(part, error) from error


def _usable_rows(
    rows: Iterable[Any], part: Part, count: int | None, everything: bool, reading: Reading
) -> Iterator[Any]:
    """The first rows of a dataset, as far as they can be used."""
    name = part.name
    taken: Counter[str] = Counter()
    for number, row in enumerate(islice(rows, part.count)):
        if part.count is None and number == POOL_ROWS:
            if everything:
                raise RequestError(
                    f"the dataset {name} has more than {POOL_ROWS} rows, and all of them are asked for; say how many "
                    f"to read ({name}:{POOL_ROWS}), or how many samples to use (num_samples)."
                )
            logger.warning("samples are chosen among the first %d rows of %s; %s:N takes N.", POOL_ROWS, name, name)
            return
        domain = str(row.get("domain"))
        is_used = _is_used(row, reading)
        taken[domain] += is_used
        if count is None or taken[domain] <= count:
            yield row
        if is_used and taken[domain] == count and "domain" not in row:  # nor in the others: they are one domain
            return


@contextlib.contextmanager
def _no_retries_shown() -> Iterator[None]:
    """What the Hub's client says of each try is left out: what comes of them is said once."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _is_used(row: Any, reading: Reading) -> bool:
    """Whether a row makes a sample, as told without a tokenizer."""
    try:
        record = record_of(without_nulls(row), Origin(""), DEFAULT_DOMAIN, reading)
    except BadRecord:
        return not reading.skip_bad
    return not record.is_blank and record.is_likely()


def _not_read(part: Part, error: Exception) -> RequestError:
    """What a person can do about a dataset that is not read."""
    name = part.spec.removesuffix("(train)")
    chain: list[BaseException] = [error]
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if kinds & UNREACHABLE:
        return RequestError(
            f"the dataset {name} is not on this machine, and the Hub cannot be reached. Download it where there is a "
            f"network (hf download {part.name} --repo-type dataset) and name one of its files, or name a file of "
            "your own (.jsonl, .txt, .parquet ...)."
        )
    said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if kinds & {"DatasetNotFoundError", "GatedRepoError", "RepositoryNotFoundError"}:
        return RequestError(
            f"the dataset {name} is not on the Hub, or to be read only by those who accepted its terms and are "
            f"logged in (hf auth login): {said}."
        )
    return RequestError(f"the dataset {name} cannot be read: {said}.")
