# SPDX-License-Identifier: Apache-2.0
"""Choosing the experts of one layer after the other, while a calibration goes on with what is left of them.

With ``progressive`` the experts of a layer are chosen from statistics of the hidden states that the pruned layers
before it leave. How many each layer keeps is known before it begins: from the budget, where it is the same in every
layer, and else from a plan of the unpruned model. So it has a meaning for every method and every allocation:

- A method that looks at each layer by itself (``Method.by_layer``) chooses from the statistics of that layer.
- Any other is asked for a choice in all layers, by statistics of the layers up to this one as the pruned ones leave
  them and of later ones as they are in the unpruned model; what it says of this layer counts.

Experts that are protected as super experts are those of the unpruned model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RequestError
from ..methods import get_method
from ..methods.budget import Budget, UniformBudget
from ..methods.selection import Selection
from ..names import UNIFORM
from ..statistics.progressive import PROGRESSIVE, check_unpruned, retained_of
from ..statistics.stats import CalibrationStats, LayerStats
from ..storage.values import Json
from .sensitivity import decisive

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig
    from ..plan import PruningPlan


class ProgressiveChoice:
    """What a recipe chooses in one layer after the other (``calibration.progressive.LayerChoice``).

    Args:
        config: The recipe.
        budget: The experts that each layer keeps.
        domain_weights: A share for each domain of the calibration; by default every token counts once.
        unpruned: Statistics of the unpruned model by the same samples, for a method that looks at several layers.
        notes: What is to be said of numbers and experts that were settled before.

    Raises:
        RequestError: If the method refuses the budget.
    """

    def __init__(
        self,
        config: MoEPrunerConfig,
        budget: UniformBudget,
        domain_weights: Mapping[str, float] | None = None,
        unpruned: CalibrationStats | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._config = config
        self._method, self._options = get_method(config.method), config.options()
        self._budget = budget
        self._domain_weights = domain_weights
        self._notes = notes
        self._weights: LayerStats | None = None
        self._all: CalibrationStats | None = None
        if not self._method.by_layer:
            assert unpruned is not None
            self._all = unpruned.without_heads.with_domain_weights(domain_weights)
        if self._method.check is not None:
            self._method.check(budget, self._options)

    @property
    def provenance(self) -> Json:
        """See ``LayerChoice``."""
        return {
            "recipe": recipe_values(self._config, self._domain_weights),
            "num_experts": {str(layer): count for layer, count in self._budget.num_experts.items()},
            "protected": {str(layer): list(experts) for layer, experts in self._budget.protected.items() if experts},
            "notes": list(self._notes),
        }

    def prunes(self, layer: int) -> bool:
        """See ``LayerChoice``."""
        original = self._budget.original.get(layer)
        return original is not None and self._budget.num_experts[layer] < original

    def choose(self, layer: int, stats: CalibrationStats) -> tuple[int, ...]:
        """See ``LayerChoice``."""
        stats, budget = self._weighted(stats), self._budget
        if self._all is not None:
            self._all = stats = replace(self._all, layers={**self._all.layers, layer: stats.layers[layer]})
        elif self.prunes(layer):
            budget = budget.exactly({layer: budget.num_experts[layer]})
        if not self.prunes(layer):
            return tuple(range(stats.layers[layer].num_experts))
        return self._method.select(stats, budget, self._options).retained[layer]

    def _weighted(self, stats: CalibrationStats) -> CalibrationStats:
        """Statistics of a layer by the domains' shares; what samples weigh is worked out once, as it is the same."""
        if self._weights is None:
            stats = stats.with_domain_weights(self._domain_weights)
            self._weights = next(iter(stats.layers.values()))
            return stats
        known = self._weights
        layers = {
            index: replace(
                layer,
                sample_weights=known.sample_weights,
                kept_weights=known.kept_weights,
                root_weights=known.root_weights,
            )
            for index, layer in stats.layers.items()
        }
        return replace(stats, layers=layers)


def needs_unpruned(config: MoEPrunerConfig) -> bool:
    """Whether a recipe reads statistics of the unpruned model before it chooses layer by layer."""
    by_layer = get_method(config.method).by_layer
    return config.allocates != UNIFORM or config.protect_super_experts or not by_layer


def settled_budget(budget: Budget, planned: PruningPlan | None) -> UniformBudget:
    """The experts that each layer keeps: as the budget says, or as a plan of the unpruned model has spread it."""
    if isinstance(budget, UniformBudget):
        return budget
    assert planned is not None
    return budget.exactly({layer: planned.num_experts[layer] for layer in budget.original})


def recipe_values(config: MoEPrunerConfig, domain_weights: Mapping[str, float] | None) -> Json:
    """The settings that decide which experts are chosen, as plain JSON values."""
    values = config.to_dict()
    names = ("num_experts", "sparsity", "total_experts", "count_multiple_of")
    return {
        **decisive(config),
        **{name: values[name] for name in names},
        "allocation": config.allocates,
        "domain_weights": None if domain_weights is None else {k: float(v) for k, v in domain_weights.items()},
    }


def check_recipe(stats: CalibrationStats, config: MoEPrunerConfig, domain_weights: Mapping[str, float] | None) -> None:
    """Raise unless statistics are of the kind that a recipe plans with.

    Raises:
        RequestError: If they are of pruned layers and the recipe is not progressive, or another one; or the other way
            round.
    """
    if not config.progressive:
        check_unpruned(stats.provenance, "a recipe without progressive")
        return
    if not config.needs_text:
        return
    if PROGRESSIVE not in stats.provenance:
        raise RequestError(
            "progressive=True chooses experts while it calibrates, and these statistics are of the unpruned model; "
            "give calibration texts (run), or plan without progressive."
        )
    made = stats.provenance[PROGRESSIVE].get("recipe") or {}
    for name, value in recipe_values(config, domain_weights).items():
        if made.get(name) != value:
            raise RequestError(
                f"these statistics were gathered while layers were pruned with {name} {made.get(name)!r}, and the "
                f"recipe has {value!r}; they serve that one recipe (progressive=True): calibrate again."
            )


def protected_then(stats: CalibrationStats) -> dict[int, set[int]]:
    """The experts that were retained in any case while statistics were gathered, by layer."""
    protected = stats.provenance[PROGRESSIVE].get("protected") or {}
    return {int(layer): set(experts) for layer, experts in protected.items()}


def selected_then(stats: CalibrationStats, config: MoEPrunerConfig, budget: Budget) -> Selection:
    """The experts that were chosen while statistics were gathered, with what the method says of them."""
    chosen = retained_of(stats.provenance)
    retained = {layer: chosen.get(layer, tuple(range(total))) for layer, total in budget.original.items()}
    exactly = budget.exactly({layer: len(experts) for layer, experts in retained.items()})
    selection = get_method(config.method).select(stats, exactly, config.options())
    ties = {layer: tied for layer, tied in selection.ties.items() if retained[layer] == selection.retained[layer]}
    notes = map(str, stats.provenance[PROGRESSIVE].get("notes") or ())
    return replace(selection, retained=retained, notes=(*notes, *selection.notes), ties=ties)
