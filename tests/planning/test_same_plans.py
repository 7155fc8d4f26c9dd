# SPDX-License-Identifier: Apache-2.0
"""Plans are what they were: of stored statistics of both small models, every method, as version 0.1.0 made them.

``data/statistics_*`` were written by version 0.1.0 too, so this is also the test that its statistics are still read.
Where a fault was mended a plan changes: ``CHANGES`` names the plans and the reason, ``data/plans_changed.json`` holds
what they are now.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig
from optimum_moe_prune.planning.build import quiet_plan

DATA = Path(__file__).resolve().parent.parent / "data"
BEFORE: dict[str, Any] = json.loads((DATA / "plans_before.json").read_text())
CHANGED: dict[str, Any] = json.loads((DATA / "plans_changed.json").read_text())

_KEPT_SHARES = (
    "where only kept tokens are counted, domain weights are shares of these and no longer of all tokens: the 192 kept "
    "of these 576 are not a third of each domain"
)
_WHOLE_RANKS = (
    "ranks that agree alike are told apart no more by the rounding of a matrix product, which is the processor's"
)

CHANGES: dict[str, str] = {
    'mixtral mosaic uniform {"ward": "distances"} 0.25': _WHOLE_RANKS,
    'qwen2_moe mosaic uniform {"num_domains": 6, "ward": "distances"} 0.5': _WHOLE_RANKS,
    "mixtral mosaic uniform {} 0.5 weighted": _KEPT_SHARES,
    "qwen2_moe mosaic uniform {} 0.5 weighted": _KEPT_SHARES,
}
"""Beginnings of names of plans -> why they are others now."""


@functools.cache
def statistics(model: str) -> CalibrationStats:
    return CalibrationStats.load(DATA / f"statistics_{model}")


def made(name: str) -> dict[str, Any]:
    """The plan of a name: model, method, allocation, options, sparsity and whether domains are weighted."""
    head, _, rest = name.partition(" {")
    options, _, tail = rest.partition("} ")
    model, method, allocation = head.split()
    sparsity, *weighted = tail.split()
    stats = statistics(model)
    config = MoEPrunerConfig(
        method=method,
        sparsity=float(sparsity),
        allocation=allocation,
        method_options=json.loads("{" + options + "}"),
        protect={3: (1,)} if sparsity == "0.25" else {},
    )
    weights = {domain: float(number + 1) for number, domain in enumerate(sorted(stats.domains))}
    plan = quiet_plan(stats, config, weights if weighted else None)
    scores = None if plan.scores is None else {str(layer): list(s) for layer, s in plan.scores.items()}
    return {"retained": {str(layer): list(e) for layer, e in plan.retained.items()}, "scores": scores}


@pytest.mark.parametrize("name", BEFORE)
def test_a_plan_is_what_it_was(name: str) -> None:
    found = made(name)
    expected = CHANGED.get(name, BEFORE[name])
    assert found["retained"] == expected["retained"]
    assert (found["scores"] is None) == (expected["scores"] is None)
    for layer, scores in (expected["scores"] or {}).items():
        assert found["scores"][layer] == pytest.approx(scores, rel=1e-9, abs=1e-12)


def test_every_change_has_a_reason() -> None:
    unexplained = [name for name in CHANGED if not any(name.startswith(start) for start in CHANGES)]
    assert not unexplained
    assert all(any(name.startswith(start) for name in CHANGED) for start in CHANGES), "a reason for nothing"
    assert all(CHANGED[name] != BEFORE[name] for name in CHANGED)
