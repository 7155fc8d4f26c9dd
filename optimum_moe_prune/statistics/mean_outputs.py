# SPDX-License-Identifier: Apache-2.0
"""The mean output of an expert over the tokens routed to it.

With f the expert's output without its weight, and w the weight of a sample where domains count with given shares
(``statistics.weights``), it is the sum of w f over the tokens routed to the expert, over the sum of w.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..errors import RequestError
from .mapped import mapped
from .needs import Need
from .stats import CalibrationStats, LayerStats


def check_mean_outputs(stats: CalibrationStats) -> None:
    """Raise unless mean outputs follow from statistics.

    Raises:
        RequestError: With how to gather what is missing.
    """
    missing = sorted(str(need) for need in {Need.ROUTING, Need.MEAN_OUTPUTS} - stats.needs)
    if missing:
        raise RequestError(
            f"experts can answer with their mean output only where that was gathered, and these statistics lack "
            f"{', '.join(missing)}. Calibrate again and gather them (score --mean-outputs)."
        )


def mean_outputs(layer: LayerStats, experts: Iterable[int]) -> dict[int, Tensor | None]:
    """The mean output ``(H,)`` float64 of some experts of a layer; None of one that no token was routed to.

    Args:
        layer: Its statistics.
        experts: Their numbers.
    """
    tokens, sums = layer.total("routed_tokens"), mapped(layer.tensors, "output_sum")
    found: dict[int, Tensor | None] = {}
    for expert in experts:
        count = float(tokens[expert])
        found[expert] = layer.sample_weights @ sums[:, expert].double() / count if count > 0 else None
    return found
