# SPDX-License-Identifier: Apache-2.0
"""Measured samples in two halves: one chooses, and on the other what was chosen is judged."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.samples import CalibrationSet


@dataclass(frozen=True)
class Halves:
    """Two halves of the samples that are measured, with every domain in both.

    Attributes:
        measured: Both together.
        choosing: That decides.
        judging: The hashes of the samples in the other.
        alone: Domains with no sample to judge on.
    """

    measured: CalibrationSet
    choosing: CalibrationSet
    judging: frozenset[str]
    alone: tuple[str, ...]


def halves(samples: CalibrationSet, number: int) -> Halves:
    """At most ``number`` samples that decide, in equal shares of the domains, and at most as many to judge on.

    Fewer than there are domains are raised to one of each. Their hashes say which is which, so samples that are the
    same are in the same half. A domain's only sample decides.

    Args:
        samples: Those there are.
        number: The most in each half.
    """
    measured = samples.take(2 * max(number, len({sample.domain for sample in samples.samples})))
    hashes: dict[str, list[str]] = {}
    for sample in measured.samples:
        hashes.setdefault(sample.domain, []).append(sample.hash)
    deciding: set[str] = set()
    judging: set[str] = set()
    odd = 0
    for _, own in sorted(hashes.items()):
        unique = sorted(set(own) - judging - deciding)
        first = 1  # the first of two decides
        if len(unique) % 2 and len(unique) > 1:  # the domains with one more give it to each half in turn
            first, odd = 1 - odd % 2, odd + 1
        judging |= set(unique[first::2])
        deciding |= set(unique) - judging
    rows = [row for row, sample in enumerate(measured.samples) if sample.hash not in judging]
    choosing = measured.picked(rows, {"sensitivity_samples": number})
    alone = tuple(domain for domain, own in sorted(hashes.items()) if not judging & set(own))
    return Halves(measured, choosing, frozenset(judging), alone)
