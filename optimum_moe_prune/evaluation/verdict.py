# SPDX-License-Identifier: Apache-2.0
"""What was lost, in a sentence that needs no knowledge of the field."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..planning.sensitivity import ALL
from .losses import FEWEST, DomainResult, Evaluation

EXPLAINED = (
    "Perplexity: among how many next tokens a model hesitates, so to speak; lower is better. Lost: by how much the "
    "loss (its logarithm) rose, in nats per token: 0.1 is 11% more perplexity, 0.7 twice as much. KL divergence, in "
    "nats per token: how far the predictions moved from the original's: 0 is the same ones, 0.1 much the same, more "
    "than 1 those of another model."
)
"""Of the words in tables, once where they are printed."""

_UNCHANGED = 0.02  # of a perplexity
_ALIKE = 1.1  # domains whose perplexities grew so much alike are not told apart
_BROKEN = 100.0
_NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def verdict_of(evaluation: Evaluation) -> str:
    """One sentence of a model that was compared with a reference; empty where it was not.

    As "Perplexity doubled (x 2.1); worst on math, four times (x 4.0); best on chat, practically unchanged (x 1.01)."
    """
    grown = {name: growth(result) for name, result in evaluation.domains.items()}
    ratios = {name: ratio for name, ratio in grown.items() if ratio is not None}
    if not ratios:
        return ""
    whole = ALL if ALL in ratios else next(iter(ratios))
    by_domain = {name: ratio for name, ratio in ratios.items() if name != ALL}
    said = _whole(ratios[whole])
    if len(by_domain) > 1:
        said += _by_domain(by_domain)
    return f"Perplexity {said}.{_doubt(evaluation.domains, whole)}"


def growth(result: DomainResult) -> float | None:
    """By what factor perplexity grew; infinite where that is no number of double precision."""
    if result.lost is None:
        return None
    try:
        return math.exp(result.lost)
    except OverflowError:
        return math.inf


def times(ratio: float) -> str:
    """A factor as text: ``x 1.35``."""
    if ratio < 10:
        return f"x {ratio:.2f}" if ratio < 1.995 else f"x {ratio:.1f}"
    return f"x {ratio:,.0f}" if ratio < 1e6 else "x a million or more"


def _whole(ratio: float) -> str:
    if abs(ratio - 1) < _UNCHANGED:
        return f"is practically unchanged ({times(ratio)})"
    if ratio < 1:
        return f"fell by {1 - ratio:.0%} ({times(ratio)})"
    if ratio < 1.75:
        return f"rose by {ratio - 1:.0%} ({times(ratio)})"
    if 1.75 <= ratio < 2.25:
        return f"doubled ({times(ratio)})"
    if 2.75 <= ratio < 3.25:
        return f"tripled ({times(ratio)})"
    if ratio < _BROKEN:
        return f"is {_factor(ratio)} that of the original ({times(ratio)})"
    return f"is more than a hundred times that of the original ({times(ratio)}): the model no longer works"


def _by_domain(ratios: Mapping[str, float]) -> str:
    worst, best = max(ratios, key=lambda name: ratios[name]), min(ratios, key=lambda name: ratios[name])
    if ratios[worst] < _ALIKE * ratios[best]:
        return ", about the same on every domain"
    return f"; worst on {worst}, {_part(ratios[worst])}; best on {best}, {_part(ratios[best])}"


def _part(ratio: float) -> str:
    if abs(ratio - 1) < _UNCHANGED:
        return f"practically unchanged ({times(ratio)})"
    if ratio < 1.75:
        return f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else 'less'} ({times(ratio)})"
    return f"{_factor(ratio)} ({times(ratio)})" if ratio < _BROKEN else f"broken ({times(ratio)})"


def _factor(ratio: float) -> str:
    near = round(ratio)
    if near < len(_NUMBERS) and abs(ratio - near) <= 0.06 * near:
        return "twice" if near == 2 else f"about {_NUMBERS[near]} times"
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"


def _doubt(domains: Mapping[str, DomainResult], whole: str) -> str:
    """What keeps the sentence from being certain."""
    result = domains[whole]
    if result.samples < FEWEST:
        return f" Only {result.samples} sample{'s were' if result.samples > 1 else ' was'} judged: too few to be sure."
    ratio = growth(result)
    if result.lost_interval is None or ratio is None or abs(ratio - 1) < _UNCHANGED:
        return ""
    low, high = result.lost_interval
    return " With other texts it may as well be unchanged (95% interval)." if low <= 0 <= high else ""
