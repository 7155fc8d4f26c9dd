# SPDX-License-Identifier: Apache-2.0
"""How much is measured of a model, before it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..architectures.routers import RoutingRule
from ..calibration.samples import CalibrationSet
from ..methods import get_method
from ..methods.limits import MOST_COUNTS, allowed_counts, most_counts
from ..names import UNIFORM
from ..storage.values import Json

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

_WHOLE_MODELS = 12  # of each method


@dataclass(frozen=True)
class Measuring:
    """What is measured, at most: methods often choose the same set, which is measured once.

    Attributes:
        recipes: Whose sets are measured.
        methods: The methods that choose them.
        sets: Of a layer.
        layers: MoE layers.
        tokens: On which layers are measured.
        whole: Plans that are measured whole.
        whole_tokens: On which.
        samples: On which layers are measured, and whole plans.
    """

    recipes: tuple[MoEPrunerConfig, ...]
    methods: tuple[str, ...] = ()
    sets: int = 0
    layers: int = 0
    tokens: int = 0
    whole: int = 0
    whole_tokens: int = 0
    samples: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        recipes: Sequence[MoEPrunerConfig],
        num_experts: Mapping[int, int],
        samples: CalibrationSet,
        rule: RoutingRule,
    ) -> Measuring:
        """What recipes measure.

        Args:
            recipes: The recipes.
            num_experts: Experts of each MoE layer.
            samples: The calibration.
            rule: How the routers choose.
        """
        if not recipes:
            return cls(())
        methods: list[str] = []
        several = False
        for recipe in recipes:
            candidates = get_method(recipe.method).candidates
            several = several or candidates is not None
            methods += [recipe.method] if candidates is None else candidates(recipe.options())
        methods = list(dict.fromkeys(methods))
        first = recipes[0]
        most = most_counts(len(num_experts), len(methods)) if several else MOST_COUNTS
        experts = max(num_experts.values())
        counts = min(most, len([n for n in allowed_counts(rule, experts, 1, first.count_multiple_of) if n < experts]))
        if all(recipe.allocation == UNIFORM for recipe in recipes):
            counts = min(counts, 1)
        number = first.sensitivity_samples
        if several:
            number = max(number, len({sample.domain for sample in samples.samples}))
        alone, whole = samples.take(number), samples.take(2 * number if several else number)
        if several:  # halves of what there is
            alone = samples.take(min(number, -(-len(whole) // 2)))
        return cls(
            tuple(recipes),
            tuple(methods),
            counts * len(methods),
            len(num_experts),
            alone.num_tokens,
            _WHOLE_MODELS if not several else 2 + 3 * len(methods),
            whole.num_tokens,
            (len(alone), len(whole)),
        )

    def passes(self, num_layers: int) -> tuple[float, float]:
        """Tokens that go through an average layer, for layers alone and for whole plans.

        Args:
            num_layers: Decoder layers.
        """
        above = (num_layers + 1) / 2  # layers that run anew where one is pruned
        return self.sets * self.layers * above / num_layers * self.tokens, float(self.whole * self.whole_tokens)

    def to_dict(self) -> Json:
        """As plain JSON values."""
        return {
            "methods": list(self.methods),
            "sets_per_layer": self.sets,
            "layers": self.layers,
            "samples": self.samples[0],
            "tokens": self.tokens,
            "whole_plans": self.whole,
            "samples_of_whole_plans": self.samples[1],
        }


def in_words(measures: Mapping[str, Any]) -> str:
    """What is measured, in one line."""
    methods = ", ".join(measures["methods"])
    sets = f"up to {measures['sets_per_layer']} sets of experts in each of {measures['layers']} layers ({methods})"
    return (
        f"{sets} on {measures['samples']} samples, {measures['tokens']} tokens; then about {measures['whole_plans']} "
        f"whole plans on {measures['samples_of_whole_plans']} samples"
    )
