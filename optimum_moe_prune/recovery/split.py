# SPDX-License-Identifier: Apache-2.0
"""The samples of a recovery, in two parts: what weights are fitted to, and what decides whether it helped."""

from __future__ import annotations

from dataclasses import dataclass

from ..calibration.samples import CalibrationSet
from ..errors import RequestError

HELD_BACK = 0.2
"""The share of each domain's samples that is held back."""


@dataclass(frozen=True)
class Split:
    """Samples in two parts without a sample in common.

    Attributes:
        fit: What weights are fitted to.
        held_back: What nothing is fitted to: it decides about stops and acceptance, and is what is reported.
    """

    fit: CalibrationSet
    held_back: CalibrationSet


def split_samples(samples: CalibrationSet) -> Split:
    """Hold back a fifth of each domain's samples, and at least one; their hashes decide which.

    Raises:
        RequestError: If a domain has a single sample.
    """
    by_domain: dict[str, list[int]] = {}
    # By the ends of their hashes: beginnings decide elsewhere, such as on which samples divergences are measured.
    for number in sorted(range(len(samples)), key=lambda i: samples.samples[i].hash[::-1]):
        by_domain.setdefault(samples.samples[number].domain, []).append(number)
    held_back = []
    for domain, numbers in by_domain.items():
        if len(numbers) < 2:
            raise RequestError(
                f"recovery needs at least 2 samples of each domain, one to fit to and one to judge by; domain "
                f"{domain!r} has 1. Give more of it, or leave it out; recovery_samples, where it is set, is at least "
                "twice the number of domains."
            )
        held_back += numbers[: max(1, round(HELD_BACK * len(numbers)))]
    judged = set(held_back)
    fit = [number for number in range(len(samples)) if number not in judged]
    return Split(samples.picked(fit), samples.picked(sorted(held_back)))
