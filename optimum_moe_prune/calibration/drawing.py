# SPDX-License-Identifier: Apache-2.0
"""Rows -> the token ids of those that are chosen: one record a sample, or packed into samples of one length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from ..statistics.samples import equal_shares
from .counts import Tally
from .records import BadRecord, Origin, Record
from .selection import Candidates, random_candidates, shuffled_within
from .texts import Row, records
from .tokens import Encoder

Tokens = tuple[Origin, Tensor, str]
"""Where a sample comes from, its token ids, and its domain."""


@dataclass(frozen=True)
class Draw:
    """What samples are drawn from.

    Attributes:
        rows: Gives the rows, for a tally of what is read and a function that says which domains have enough.
        encoder: Makes tokens of them.
        tally: What became of them.
        max_length: Tokens of a sample that are used.
    """

    rows: Callable[[Tally, Callable[[str], bool]], Iterable[Row]]
    encoder: Encoder
    tally: Tally
    max_length: int

    def single(self, count: int | None, selection: str, seed: int) -> Iterator[Tokens]:
        """A sample of each chosen record; of a record of less than two tokens none, and the next one is chosen.

        Args:
            count: How many are chosen; None for all.
            selection: ``"first"`` or ``"random"``.
            seed: For the latter.
        """
        if count is None:
            yield from (found for record in self._records() if (found := self._take(record)) is not None)
        elif selection == "random":

            def read(again: bool) -> Iterator[Record]:
                return self._records(tally=Tally() if again else None)

            yield from random_candidates(count, seed, read, self.encoder.reading.skip_bad).dealt(self._take)
        else:
            candidates = Candidates(count, self.encoder.reading.skip_bad)
            yield from candidates.fill(self._records(candidates.is_full)).dealt(self._take)

    def packed(self, count: int | None, selection: str, seed: int) -> list[Tokens]:
        """Samples of exactly ``max_length`` tokens, each from one domain; a rest that fills none is left out.

        Args:
            count: How many are chosen; None for all.
            selection: ``"first"``, ``"random"``, or ``"kmeans"``, for which all are made.
            seed: For a random choice.

        Raises:
            RequestError: If the text does not fill one.
        """
        first = count is not None and selection == "first"
        needed = count * self.max_length if count is not None and first else None
        streams: dict[str, list[Tensor]] = {}
        held: Counter[str] = Counter()

        def is_enough(domain: str) -> bool:
            return needed is not None and held[domain] >= needed

        for record in self._records(is_enough):
            if is_enough(record.domain):
                continue
            ids = self._encoded(record, None if needed is None else needed - held[record.domain])
            if ids is not None:
                streams.setdefault(record.domain, []).append(ids)
                held[record.domain] += len(ids)
        rows = [
            (Origin(f"packed sample {number} of {domain!r}"), row, domain)
            for domain, parts in streams.items()
            for number, row in enumerate(torch.cat(parts).split(self.max_length))
            if len(row) == self.max_length
        ]
        if streams and not rows:
            raise RequestError(
                f"packing leaves no sample of {self.max_length} tokens; lower max_length or give more text."
            )
        if count is None or selection == "kmeans" or len(rows) <= count:
            return rows
        domains = [domain for *_, domain in rows]
        rows = shuffled_within(rows, domains, seed) if selection == "random" else rows
        return [rows[place] for place in equal_shares(domains, count)]

    def _records(
        self, is_enough: Callable[[str], bool] = lambda domain: False, tally: Tally | None = None
    ) -> Iterator[Record]:
        tally = self.tally if tally is None else tally
        return records(self.rows(tally, is_enough), self.encoder.reading, tally)

    def _take(self, record: Record) -> Tokens | None:
        """The tokens of a record, or None, counted, if it is left out."""
        ids = self._encoded(record, self.max_length)
        if ids is None:
            return None
        if len(ids) < 2:
            told = f"has {len(ids)} token{'' if len(ids) == 1 else 's'}; a sample needs at least 2."
            self.tally.leave_out("too_short", BadRecord(record.origin, told))
            return None
        return record.origin, ids, record.domain

    def _encoded(self, record: Record, limit: int | None) -> Tensor | None:
        try:
            return self.encoder.encode(record, limit)
        except BadRecord as error:
            if not self.encoder.reading.skip_bad:
                raise
            self.tally.leave_out("bad", error)
            return None
