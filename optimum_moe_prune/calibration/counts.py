# SPDX-License-Identifier: Apache-2.0
"""What became of the records of a calibration, in numbers and as sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from ..errors import RequestError
from ..statistics.samples import Sample
from ..storage.values import Json
from .records import BadRecord


class Samples(Protocol):
    """What the counts say of the samples themselves."""

    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def truncated(self) -> int: ...


@dataclass(frozen=True)
class Counts:
    """What became of the records that were read.

    Attributes:
        read: Records that were read.
        blank: Left out, since there is nothing in them.
        too_short: Left out, since they have less than two tokens.
        bad: Left out, since they cannot be used (``skip_bad``).
        first_bad: The first of these: where it stands and what is wrong with it.
        duplicates: Samples left out, since the same tokens were there already.
        truncated: Samples that were cut.
        max_length: At how many tokens.
        requested: How many samples were asked for; None for all.
        samples: How many there are.
        empty_domains: Domains that no sample comes from.
        remarks: Further sentences.
    """

    read: int = 0
    blank: int = 0
    too_short: int = 0
    bad: int = 0
    first_bad: str = ""
    duplicates: int = 0
    truncated: int = 0
    max_length: int | None = None
    requested: int | None = None
    samples: int = 0
    empty_domains: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> Json:
        """As plain JSON values."""
        values = asdict(self)
        return {**values, "empty_domains": list(self.empty_domains), "remarks": list(self.remarks)}

    def notes(self) -> tuple[str, ...]:
        """What a person must know of it, as sentences."""
        if self.requested is None or self.samples >= self.requested:
            return self.warnings()
        return (
            *self.warnings(),
            f"{_plural(self.samples, 'sample')} of the {self.requested} asked for: there are no more.",
        )

    def warnings(self) -> tuple[str, ...]:
        """Of these sentences, those that nobody expects."""
        notes = []
        if self.truncated:
            notes.append(
                f"{self.truncated} of {self.samples} samples are longer than {self.max_length} tokens and were cut."
            )
        if self.duplicates:
            notes.append(f"{self.duplicates} samples have the same tokens as another one and were left out.")
        left_out = ((self.blank, "blank"), (self.too_short, "shorter than two tokens"))
        notes += [f"{_records(n, self.read)} {what} and left out." for n, what in left_out if n]
        if self.bad:
            notes.append(f"{_records(self.bad, self.read)} left out as unusable; the first: {self.first_bad}")
        if self.empty_domains:
            names = ", ".join(map(repr, self.empty_domains[:10])) + (" ..." if len(self.empty_domains) > 10 else "")
            notes.append(
                f"No sample comes from {_plural(len(self.empty_domains), 'domain')} {names}: what only they need may "
                "be pruned."
            )
        return (*notes, *self.remarks)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _records(count: int, total: int) -> str:
    return f"{count} of {_plural(total, 'record')} {'is' if count == 1 else 'are'}"


@dataclass
class Tally:
    """Counts while records are read.

    Attributes:
        numbers: By the names of ``Counts``.
        first: Where the first record of each kind stands that was left out, with what is wrong with it.
        domains: All that were met.
        remarks: Sentences.
    """

    numbers: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    first_public: dict[str, str] = field(default_factory=dict)
    domains: dict[str, None] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def leave_out(self, kind: str, error: BadRecord) -> None:
        """Count a record that is left out."""
        self.numbers[kind] += 1
        self.first.setdefault(kind, f"{error.origin} {error.reason}")
        self.first_public.setdefault(kind, f"{error.origin.public} {error.reason}")

    def counts(self, found: Samples, max_length: int, requested: int | None) -> Counts:
        """The counts when all is read and chosen.

        Args:
            found: The samples, with how many were cut and left out as duplicates.
            max_length: At how many tokens they were cut.
            requested: How many were asked for.
        """
        has_some = {sample.domain for sample in found.samples}
        return Counts(
            read=self.numbers["read"],
            blank=self.numbers["blank"],
            too_short=self.numbers["too_short"],
            bad=self.numbers["bad"],
            first_bad=self.first_public.get("bad", ""),
            duplicates=found.duplicates,
            truncated=found.truncated,
            max_length=max_length,
            requested=requested,
            samples=len(found.samples),
            empty_domains=tuple(domain for domain in self.domains if domain not in has_some),
            remarks=tuple(self.remarks),
        )

    def nothing_left(self) -> RequestError:
        """Why there is no sample."""
        read = self.numbers["read"]
        if not read or not self.first:
            return RequestError(
                "the calibration holds no samples; give texts, a .jsonl or .txt file, or token tensors."
            )
        kinds = {"blank": "blank", "too_short": "shorter than two tokens", "bad": "unusable"}
        told = ", ".join(f"{self.numbers[kind]} {what}" for kind, what in kinds.items() if self.numbers[kind])
        return RequestError(
            f"the calibration holds no samples: of {_plural(read, 'record')} {told}; the first: "
            f"{next(iter(self.first.values()))}"
        )
