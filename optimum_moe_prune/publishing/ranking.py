# SPDX-License-Identifier: Apache-2.0
r"""How much each expert matters by the statistics of a calibration, and bits for it that follow from that.

An expert whose weights are rounded to b bits gives an output that is off by a share of its norm that halves with each
bit. Over the tokens t routed to it, with weights g, its squared error adds up to about

.. math:: s_e 4^{-b}, \qquad s_e = \sum_t (g_t \|f_t\|)^2 \ge \frac{(\sum_t g_t \|f_t\|)^2}{n_e}

times a number that is the same for all; the right-hand side, which statistics have, stands for the left. Without norms
:math:`s_e` is the number of tokens. Within a layer bits are given so that these errors add up to the least for a mean
number of bits: each step goes to the expert for which it takes off most for a bit. Layers are not weighed against one
another, since what an error in one of them does to the output is not in the statistics: each has the same mean.

Shapes: E experts of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..architectures.fingerprint import same_routers
from ..errors import RequestError
from ..plan import PruningPlan
from ..statistics.needs import Need
from ..statistics.stats import CalibrationStats

CONTRIBUTION, TOKENS = "contribution", "tokens"


@dataclass(frozen=True)
class Ranked:
    """The experts of a layer.

    Attributes:
        tokens: Tokens that were routed to each, E.
        scores: How much each matters, E.
        original: The number of each in the model of the statistics, E.
    """

    tokens: tuple[float, ...]
    scores: tuple[float, ...]
    original: tuple[int, ...]

    @property
    def order(self) -> list[int]:
        """The experts, those first that matter most; of equal ones the lower number."""
        return sorted(range(len(self.scores)), key=lambda expert: (-self.scores[expert], expert))


def score_of(stats: CalibrationStats) -> str:
    """What the scores are: of norms and weights, or where no norms were gathered the tokens.

    Raises:
        RequestError: If no tokens were counted.
    """
    if Need.ROUTING not in stats.needs:
        have = ", ".join(sorted(map(str, stats.needs))) or "nothing"
        raise RequestError(
            f"experts are ranked by the tokens routed to them, and these statistics hold {have}. Calibrate again "
            "(score, by default, gathers that)."
        )
    return CONTRIBUTION if Need.ROUTED_NORMS in stats.needs else TOKENS


def ranked(stats: CalibrationStats, plan: PruningPlan | None = None) -> dict[int, Ranked]:
    """The experts of each layer of the model itself; heads for further tokens are left out.

    Args:
        stats: Of a calibration.
        plan: Of the same model: the experts that it retains, numbered as they are after it.

    Raises:
        RequestError: If the statistics lack what it takes, or the plan is for another model.
    """
    kind, layers = score_of(stats), stats.without_heads.layers
    if plan is not None:
        counts = plan.without_heads.original_num_experts
        if not same_routers(plan.made_for, stats.model) or counts != stats.without_heads.num_experts:
            raise RequestError("the plan and the statistics are of different models.")
    found = {}
    for index, layer in sorted(layers.items()):
        tokens = layer.total("routed_tokens")
        scores = tokens
        if kind == CONTRIBUTION:
            scores = layer.total("norm_applied").square() / tokens.clamp(min=1e-300)
        original = range(layer.num_experts) if plan is None else plan.retained[index]
        found[index] = Ranked(
            tuple(float(tokens[expert]) for expert in original),
            tuple(float(scores[expert]) for expert in original),
            tuple(original),
        )
    return found


def assigned_bits(scores: Sequence[float], widths: Sequence[int], mean: float) -> list[int]:
    """Bits for each expert of a layer: the least error for a mean number of bits.

    Args:
        scores: How much each matters.
        widths: The numbers of bits that there are, rising.
        mean: Of all experts, at most; at least the lowest width.
    """
    bits, room = [widths[0]] * len(scores), mean * len(scores) - widths[0] * len(scores)
    steps = [
        (score * (4.0**-low - 4.0**-high) / (high - low), high, expert, high - low)
        for expert, score in enumerate(scores)
        for low, high in itertools.pairwise(widths)
    ]
    full: set[int] = set()  # whose next step had no room: the steps after it would leave one out
    for _, high, expert, more in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        if expert in full or more > room + 1e-9:
            full.add(expert)
            continue
        bits[expert] = high
        room -= more
    return bits
