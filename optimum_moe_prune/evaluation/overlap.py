# SPDX-License-Identifier: Apache-2.0
"""Which of the samples a model is judged on it was calibrated on: what it lost there says little about other text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..calibration.samples import CalibrationSet
from ..plan import PruningPlan
from ..statistics.passages import Passages, remembered
from ..storage.values import Json, is_integer

HELD_OUT = "held-out text"
PARTLY = "text that was partly calibrated on"
CALIBRATED_ON = "text that was calibrated on"
UNKNOWN = "text of which it is not known whether it was calibrated on"


@dataclass(frozen=True)
class Overlap:
    """Samples that a plan, or one before it, was made with.

    Attributes:
        samples: Of the evaluation.
        calibrated_on: Of these, how many were calibrated on, or measured on for a sensitivity.
        domains: How many by domain, where there are any.
        is_complete: Whether every calibration left by what its text is known again. Earlier versions did not.
    """

    samples: int
    calibrated_on: int
    domains: dict[str, int]
    is_complete: bool = True

    @property
    def kind(self) -> str:
        """What to call the text."""
        if self.calibrated_on:
            return CALIBRATED_ON if self.calibrated_on == self.samples else PARTLY
        return HELD_OUT if self.is_complete else UNKNOWN

    def sentence(self, name: str = "") -> str:
        """What a person must know; nothing where the text was held out.

        Args:
            name: The model's, where there are several.
        """
        whose = f" for {name}" if name else ""
        if self.calibrated_on:
            counts = f"{self.calibrated_on} of {self.samples} evaluation samples were calibrated on{whose}"
            where = ", ".join(f"{domain} {count}" for domain, count in self.domains.items())
            where = f" ({where})" if self.calibrated_on < self.samples else ""
            return f"{counts}{where}: on other text more may be lost."
        if self.is_complete:
            return ""
        return (
            f"Whether the evaluation samples were calibrated on{whose} is not known: its plan was made by an earlier "
            "version, which did not remember by what a text is known again."
        )

    def to_dict(self) -> Json:
        """As plain JSON values."""
        return {
            "samples": self.samples,
            "calibrated_on": self.calibrated_on,
            "domains": self.domains,
            "is_complete": self.is_complete,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Overlap:
        """From plain values.

        Raises:
            ValueError: If they are damaged.
        """
        counts = [values["samples"], values["calibrated_on"], *values["domains"].values()]
        if not all(is_integer(count) and 0 <= count <= counts[0] for count in counts):
            raise ValueError(f"samples that were calibrated on: {values!r}")
        domains = {str(domain): count for domain, count in values["domains"].items()}
        return cls(counts[0], counts[1], domains, bool(values.get("is_complete", True)))


def overlap_of(
    plan: PruningPlan | None, samples: CalibrationSet, others: Sequence[CalibrationSet] = ()
) -> Overlap | None:
    """Which samples a plan was made with; None where there is neither a plan nor other text.

    Args:
        plan: Of the model; those before it count as well.
        samples: That it is judged on.
        others: What else the model is made with, or will be.
    """
    if plan is None and not others:
        return None
    before = [] if plan is None else [*_texts_of(plan)]
    is_complete = plan is None or _is_complete(plan.provenance)
    return overlap_with([*before, *(other.passages for other in others)], samples, is_complete)


def overlap_with(texts: Iterable[Any], samples: CalibrationSet, is_complete: bool = True) -> Overlap:
    """Which samples are among texts of which something is remembered.

    Args:
        texts: What is remembered of each calibration, as plain values or as it is.
        samples: That a model is judged on.
        is_complete: Whether that is all of its calibrations.
    """
    found = [False] * len(samples)
    for text in texts:
        try:
            known = (text if isinstance(text, Passages) else Passages.from_dict(text)).known(samples.token_ids)
        except ValueError:  # a plan that was edited or damaged there is as good as an early one
            is_complete = False
            continue
        found = [a or b for a, b in zip(found, known, strict=True)]
    domains: dict[str, int] = {}
    for sample, is_known in zip(samples.samples, found, strict=True):
        if is_known:
            domains[sample.domain] = domains.get(sample.domain, 0) + 1
    return Overlap(len(samples), sum(found), dict(sorted(domains.items())), is_complete)


def _texts_of(plan: PruningPlan) -> Iterator[Any]:
    seen = set()
    for text in remembered(plan.provenance):
        if (key := repr(text)) not in seen:  # merged statistics have the first one's twice
            seen.add(key)
            yield text


def _is_complete(provenance: Any) -> bool:
    """Whether each plan, from this one to the first, remembers the text of its calibration."""
    while isinstance(provenance, dict):
        calibration = provenance.get("calibration")
        samples = calibration.get("samples") if isinstance(calibration, dict) else None
        if samples and not any(True for _ in remembered(calibration)):
            return False
        parent = provenance.get("parent")
        provenance = parent.get("provenance") if isinstance(parent, dict) else None
    return True
