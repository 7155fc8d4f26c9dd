# SPDX-License-Identifier: Apache-2.0
"""Which records become samples: of each domain the first, or a seeded choice, dealt out in equal shares.

Nothing but the records that may be chosen is held: calibrations can be larger than memory.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .records import Record

T = TypeVar("T")

SPARE = 1000
"""So many more records are held, and four times as many as are asked for, where most have less than two tokens."""


@dataclass
class Candidates:
    """The records that may be chosen, by domain, in the order of the domains' first ones.

    Attributes:
        count: How many are to be chosen.
        skip_bad: Whether chats that do not suit the template are left out.
        queues: Numbers and records of each domain, as they are to be chosen.
        total: How many there were.
    """

    count: int
    skip_bad: bool = False
    queues: dict[str, list[tuple[int, Record]]] = field(default_factory=dict)
    total: int = 0
    _likely: Counter[str] = field(default_factory=Counter)

    def is_full(self, domain: str) -> bool:
        """Whether no further records of a domain can be chosen."""
        held = self._likely[domain]
        return held >= self.count or len(self.queues.get(domain, ())) >= 4 * self.count + SPARE

    def add(self, number: int, record: Record) -> None:
        """Hold a record, if it may be chosen."""
        if not self.is_full(record.domain):
            self.queues.setdefault(record.domain, []).append((number, record))
            self._likely[record.domain] += record.is_likely(self.skip_bad)

    def fill(self, records: Iterable[Record]) -> Candidates:
        """Hold the first of each domain."""
        for number, record in enumerate(records):
            self.total += 1
            self.add(number, record)
        return self

    def in_order(self) -> list[Record]:
        """All records in the order they were read."""
        every = sorted((entry for queue in self.queues.values() for entry in queue), key=lambda entry: entry[0])
        return [record for _, record in every]

    def dealt(self, take: Callable[[Record], T | None]) -> Iterator[T]:
        """What ``take`` makes of the chosen ones: of one that it makes nothing of, the next of its domain is taken."""
        if self.total <= self.count:
            yield from (found for record in self.in_order() if (found := take(record)) is not None)
            return
        queues = {domain: iter(queue) for domain, queue in self.queues.items()}
        left = self.count
        while queues and left:
            for domain in list(queues):
                found = next((f for _, record in queues[domain] if (f := take(record)) is not None), None)
                if found is None:
                    del queues[domain]
                    continue
                yield found
                left -= 1
                if not left:
                    break


def random_candidates(
    count: int, seed: int, read: Callable[[bool], Iterable[Record]], skip_bad: bool = False
) -> Candidates:
    """A seeded choice of the records of each domain.

    Args:
        count: How many are to be chosen.
        seed: Another seed chooses others.
        read: Gives the records; it is called twice, the second time with True.
        skip_bad: As for ``Candidates``.
    """
    numbers: dict[str, array[int]] = {}
    likely, total = bytearray(), 0
    for record in read(False):
        numbers.setdefault(record.domain, array("q")).append(total)
        likely.append(record.is_likely(skip_bad))
        total += 1
    if total > count:
        generator = random.Random(seed)
        for domain in sorted(numbers):
            generator.shuffle(numbers[domain])
    wanted = {domain: _beginning(queue, likely, count) for domain, queue in numbers.items()}
    found = _with_numbers(read(True), {number for queue in wanted.values() for number in queue})
    queues = {domain: [(n, found[n]) for n in queue if n in found] for domain, queue in wanted.items()}
    return Candidates(count, skip_bad, queues, total)


def shuffled_within(entries: Sequence[T], domains: Sequence[str], seed: int) -> list[T]:
    """The entries, those of each domain in a seeded order on the places that the domain has."""
    places: dict[str, list[int]] = {}
    for place, domain in enumerate(domains):
        places.setdefault(domain, []).append(place)
    generator, found = random.Random(seed), list(entries)
    for domain in sorted(places):
        mixed = list(places[domain])
        generator.shuffle(mixed)
        for place, other in zip(places[domain], mixed, strict=True):
            found[place] = entries[other]
    return found


def _beginning(queue: array[int], likely: bytearray, count: int) -> list[int]:
    """As much of a queue as may be chosen."""
    held, most = 0, 4 * count + SPARE
    chosen: list[int] = []
    for number in queue:
        if held >= count or len(chosen) >= most:
            break
        chosen.append(number)
        held += likely[number]
    return chosen


def _with_numbers(records: Iterable[Record], wanted: set[int]) -> Mapping[int, Record]:
    return {number: record for number, record in enumerate(records) if number in wanted}
