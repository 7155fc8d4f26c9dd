# SPDX-License-Identifier: Apache-2.0
"""A calibration that prunes as it goes: what it gathers of a layer is of hidden states that pruned layers left.

Each layer that is pruned runs twice on all batches: whole, while it is observed as in any calibration, and then with
the experts alone that were chosen from what was gathered. What it gives then goes into the next layer. So the
statistics of a layer are of all its experts, and its router is free to choose any of them; of the layers before it
only those that stay took part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..statistics.progressive import PROGRESSIVE
from ..statistics.stats import CalibrationStats, LayerStats
from ..storage.values import Json


class LayerChoice(Protocol):
    """What chooses the experts of one layer after the other."""

    @property
    def provenance(self) -> Json:
        """How it chooses, as plain JSON values: with the samples it decides about everything that is gathered."""

    def prunes(self, layer: int) -> bool:
        """Whether a layer loses experts; known before anything is gathered."""

    def choose(self, layer: int, stats: CalibrationStats) -> tuple[int, ...]:
        """The experts of a layer that stay; it is asked for every layer with experts, in their order.

        Args:
            layer: The layer.
            stats: What was gathered of it, and of no other.
        """


class Pruning:
    """The layers that a calibration has pruned so far.

    Args:
        choice: Chooses their experts; None prunes none.
        stats_of: Statistics of some layers alone.

    Attributes:
        retained: The experts that stay, of each layer that is pruned.
    """

    def __init__(
        self, choice: LayerChoice | None, stats_of: Callable[[dict[int, LayerStats]], CalibrationStats]
    ) -> None:
        self._choice = choice
        self._stats_of = stats_of
        self.retained: dict[int, tuple[int, ...]] = {}

    def prunes(self, layer: int) -> bool:
        """Whether a layer loses experts."""
        return self._choice is not None and self._choice.prunes(layer)

    def finished(self, layer: int, gathered: LayerStats) -> None:
        """Choose the experts with which a layer goes on, by what was gathered of it."""
        if self._choice is not None:
            experts = self._choice.choose(layer, self._stats_of({layer: gathered}))
            if self.prunes(layer):
                self.retained[layer] = experts

    @property
    def provenance(self) -> Json:
        """What statistics remember of it."""
        if self._choice is None:
            return {}
        retained = {str(layer): list(experts) for layer, experts in self.retained.items()}
        return {PROGRESSIVE: {**self._choice.provenance, "retained": retained}}
