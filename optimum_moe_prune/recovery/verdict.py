# SPDX-License-Identifier: Apache-2.0
"""Whether a recovery helped: ``KL(original || pruned)`` on text that was held back, before and after, by domain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..config_checks import RECOVER
from ..plan import PruningPlan
from ..planning.sensitivity import ALL
from ..storage.values import Json, is_integer
from .steps import KL, NOTHING, by_domain, worse_domains

FEWEST = 8
"""Samples from which an interval can be told."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Verdict:
    """What was measured of a step of a recovery, or of all.

    Attributes:
        kl_before: Nats per predicted token, by domain and ``"all"``.
        kl_after: Of the recovered model.
        interval: 95% interval of the share of the divergence that is left; None of few samples.
        sums: Divergences summed over the predicted tokens of each sample ``(S,)``, before and after.
        kl_first: Of the pruned model before any step, where others were kept before this one: no domain may become
            much worse by all of them together.
    """

    kl_before: KL
    kl_after: KL
    interval: tuple[float, float] | None = None
    sums: tuple[Tensor, ...] = ()
    kl_first: KL | None = None

    @classmethod
    def of(
        cls, samples: CalibrationSet, before: Tensor, after: Tensor, seed: int = 0, kl_first: KL | None = None
    ) -> Verdict:
        """From what was summed over the predicted tokens of each sample ``(S,)``.

        Args:
            samples: The samples held back.
            before: Divergences of the pruned model.
            after: Of the recovered one.
            seed: Of the resamples.
            kl_first: See the class.
        """
        interval = _interval(before.numpy(), after.numpy(), seed)
        return cls(by_domain(samples, before), by_domain(samples, after), interval, (before, after), kl_first)

    @property
    def reason(self) -> str:
        """Why the recovered weights are not kept; empty where they are."""
        before, after = self.kl_before[ALL], self.kl_after[ALL]
        if after >= before - NOTHING * min(1.0, before):
            return f"on text held back it left {after:.4f} of {before:.4f} nats per token"
        for first in (self.kl_before, self.kl_first or {}):
            if not (worse := worse_domains(first, self.kl_after)):
                continue
            shown = ", ".join(f"{name} {first[name]:.4f} to {self.kl_after[name]:.4f}" for name in worse)
            return f"it made text held back worse by more than 5% ({shown} nats per token)"
        return ""

    @property
    def is_better(self) -> bool:
        """Whether the recovered weights are kept."""
        return not self.reason

    def to_dict(self) -> Json:
        """As plain JSON values."""
        values: Json = {"kl_before": self.kl_before, "kl_after": self.kl_after}
        if self.interval is not None:
            values["left_interval"] = list(self.interval)
        return values


def _interval(before: np.ndarray, after: np.ndarray, seed: int) -> tuple[float, float] | None:
    """Of the share that is left, by a paired bootstrap over samples."""
    if len(before) < FEWEST or not before.sum() > 0:
        return None

    def left(before: np.ndarray, after: np.ndarray, axis: int) -> np.ndarray:
        return after.sum(axis) / np.maximum(before.sum(axis), 1e-12)

    found = bootstrap(
        (before, after),
        left,
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, 2**20 // len(before)),
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def recovery_of(plan: PruningPlan) -> Json | None:
    """What a plan remembers of its recovery; None where there was none, or it was edited past reading."""
    found = plan.provenance.get("recovery")
    if not isinstance(found, dict):
        return None
    try:
        before, after, accepted = found["kl_before"], found["kl_after"], found["accepted"]
        interval = found.get("left_interval")
        numbers = [*before.values(), *(after[name] for name in before), *(interval or (0, 0))]
        counts = [found["samples"][part] for part in ("fit", "held_back")]
        steps = found["steps"]
        known = (
            ALL in before
            and all(isinstance(number, float) or is_integer(number) for number in numbers)
            and all(math.isfinite(number) and number >= 0 for number in numbers)
            and len(numbers) == 2 * len(before) + 2
            and all(is_integer(count) and count >= 0 for count in counts)
            and (isinstance(steps, list) and steps and all(step in RECOVER for step in steps))
            and isinstance(accepted, bool)
            and not (accepted and not before[ALL] > 0)
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return {**found, "reason": str(found.get("reason", ""))} if known else None


def table_of(recovery: Mapping[str, Any]) -> list[list[str]]:
    """What the cut cost each domain and what is left of it, as rows of text; the first names the columns.

    Args:
        recovery: What a plan remembers of its recovery.
    """
    before, after = recovery["kl_before"], recovery["kl_after"]
    rows = [["held-back text", "lost by the cut", "after recovery", "left"]]
    for name in sorted(before, key=lambda name: (name == ALL, name)):
        left = f"{after[name] / before[name]:.0%}" if before[name] > NOTHING else "-"
        rows.append([name, f"{before[name]:.3f}", f"{after[name]:.3f}", left])
    return rows


def sentence_of(recovery: Mapping[str, Any]) -> str:
    """What a recovery came to, in a sentence.

    Args:
        recovery: What a plan remembers of it.
    """
    steps, samples = " and ".join(recovery["steps"]), recovery["samples"]
    number = samples["held_back"]
    judged = "1 sample that was held back" if number == 1 else f"{number} samples that were held back"
    if not recovery["accepted"]:
        return f"Recovery by {steps} is not kept: {recovery['reason']}. The weights are those of the original."
    before, after = recovery["kl_before"][ALL], recovery["kl_after"][ALL]
    sure = recovery.get("left_interval")
    sure = f" (95% interval {sure[0]:.0%} to {sure[1]:.0%})" if sure else ""
    return (
        f"Recovery by {steps} left {after / before:.0%}{sure} of the divergence from the original, {after:.3f} of "
        f"{before:.3f} nats per token, on {judged}."
    )


def domains_of(samples: CalibrationSet) -> dict[str, int]:
    """Samples by domain."""
    return dict(sorted(Counter(sample.domain for sample in samples.samples).items()))


def one_domain(domains: Sequence[str]) -> str:
    """What is to be said of text of one domain alone; empty of more."""
    if len(set(domains)) != 1:
        return ""
    return (
        f"the recovery was fitted to and judged by text of one domain alone ({domains[0]}): what it did to other "
        "abilities was not watched"
    )
