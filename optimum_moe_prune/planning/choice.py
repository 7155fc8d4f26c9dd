# SPDX-License-Identifier: Apache-2.0
"""What a plan remembers of how it was chosen by measuring (``provenance["choice"]``), for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..plan import PruningPlan
from ..storage.values import is_integer
from .sensitivity import ALL

NOT_WHOLE = (
    "chosen by what single layers lose; the plan as a whole was not measured, for which the model and texts are needed"
)


def choice_of(plan: PruningPlan) -> Mapping[str, Any]:
    """How a plan was chosen by measuring; nothing where it was not, or that cannot be read."""
    found = plan.provenance.get("choice")
    return found if isinstance(found, Mapping) else {}


def losses(plan: PruningPlan) -> list[tuple[str, dict[str, float]]]:
    """What the kept plan and its alternatives lost, the kept one first: nats per predicted token by domain.

    On samples that had no part in the choice, or, where there were none, on those that had.
    """
    choice = choice_of(plan)
    measured = choice.get("measured")
    rows: list[tuple[str, dict[str, float]]] = []
    for name, entry in measured.items() if isinstance(measured, Mapping) else ():
        kl = (entry.get("judging") or entry.get("choosing")) if isinstance(entry, Mapping) else None
        if isinstance(kl, Mapping) and all(map(_is_number, kl.values())) and ALL in kl:
            rows.append((str(name), {str(domain): float(value) for domain, value in kl.items()}))
    return sorted(rows, key=lambda row: row[0] != choice.get("kept"))


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and is_integer(value) and abs(value) < 2**53)


def rows(plan: PruningPlan) -> list[list[str]]:
    """What the kept plan and its alternatives lost as a table, by domain, the kept one first; empty where unknown."""
    found = losses(plan)
    if not found:
        return []
    domains = [domain for domain in found[0][1] if domain != ALL] if len(found[0][1]) > 2 else []
    head = ["nats lost per token", *domains, ALL]
    return [head, *([name, *(f"{kl[d]:.3f}" if d in kl else "" for d in head[1:])] for name, kl in found)]


def judged_on(plan: PruningPlan) -> str:
    """On what text that was measured, in words."""
    samples = choice_of(plan).get("samples")
    if is_judged(plan) and isinstance(samples, Mapping):
        number = samples["judging"]
        return f"{number} sample{'' if number == 1 else 's'} that had no part in the choice"
    return "the samples that it was chosen on, so it loses more elsewhere"


def is_judged(plan: PruningPlan) -> bool:
    """Whether what is lost was measured on samples that had no part in the choice."""
    samples = choice_of(plan).get("samples")
    number = samples.get("judging") if isinstance(samples, Mapping) else None
    return isinstance(number, int) and is_integer(number) and number > 0


def in_words(plan: PruningPlan) -> list[str]:
    """Lines for people: which sets were taken, what the plan loses, and what the best alternative does."""
    choice, rows = choice_of(plan), losses(plan)
    by_layer = choice.get("by_layer")
    lines = []
    if isinstance(by_layer, Mapping) and by_layer:
        given = Counter(map(str, by_layer.values())).most_common()
        lines.append("sets of: " + ", ".join(f"{name} ({n} layer{'s' if n > 1 else ''})" for name, n in given))
    if not rows:
        return lines
    name, kl = rows[0]
    domains = ", ".join(f"{domain} {value:.3f}" for domain, value in kl.items() if domain != ALL)
    by_domain = f" ({domains})" if len(kl) > 2 else ""
    lines.append(f"lost: {kl[ALL]:.3f} nats per token{by_domain}, on {judged_on(plan)}; kept: {name}")
    if others := sorted(rows[1:], key=lambda row: row[1][ALL]):
        shown = ", ".join(f"{other} {lost[ALL]:.3f}" for other, lost in others[:3])
        lines.append(f"beside it: {shown}" + (f", and {len(others) - 3} more" if len(others) > 3 else ""))
    return lines
