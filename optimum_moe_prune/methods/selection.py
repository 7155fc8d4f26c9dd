# SPDX-License-Identifier: Apache-2.0
"""What a method answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..storage.values import Values

TIE = 1e-9
"""Losses within this relative distance are ties."""

Scores = dict[int, np.ndarray]
"""One number ``(E,)`` for each expert, by layer; higher = keep."""

Retained = dict[int, tuple[int, ...]]
"""Sorted ids of the experts that are kept, by layer."""

Ties = dict[int, tuple[int, ...]]
"""Sorted ids of experts between which only their numbers decided, by layer; layers without any are absent."""


@dataclass(frozen=True)
class Selection:
    """The experts that a method keeps, and what is worth saying about them.

    Attributes:
        retained: By layer of the budget.
        scores: What they were chosen by, where each expert has a number of its own.
        notes: What was done otherwise than asked for; kept with the plan and said once.
        findings: What was found on the way and is worth keeping with the plan, as plain JSON values.
        ties: Where the choice was among equals (``ties``); kept with the plan as the finding ``ties``, and said once.
    """

    retained: Retained
    scores: Scores | None = None
    notes: tuple[str, ...] = ()
    findings: Values = field(default_factory=dict)
    ties: Ties = field(default_factory=dict)
