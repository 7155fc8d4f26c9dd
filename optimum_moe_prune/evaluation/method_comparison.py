# SPDX-License-Identifier: Apache-2.0
"""The result of comparing methods: for each plan what it loses, for people and as files."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..config import MoEPrunerConfig
from ..names import UNIFORM
from ..plan import PruningPlan
from ..planning.sensitivity import ALL
from ..storage.values import Json
from .comparison import Comparison, ModelResult, mean_lost
from .losses import nats
from .tables import filled
from .verdict import EXPLAINED, growth, times


@dataclass(frozen=True)
class Judged:
    """One column of the table: a method with its allocation at a sparsity.

    Attributes:
        method: The method, with a number where several recipes are for it.
        allocation: How the budget is spread over layers.
        sparsity: The fraction of experts to remove that was asked for.
        recipe: The recipe.
    """

    method: str
    allocation: str
    sparsity: float
    recipe: MoEPrunerConfig = field(compare=False)

    @property
    def label(self) -> str:
        """The method, and its allocation where that is not the same number of experts in every layer."""
        return self.method if self.allocation == UNIFORM else f"{self.method} ({self.allocation})"

    @property
    def name(self) -> str:
        """Label and sparsity."""
        return f"{self.label} {percent(self.sparsity)}"

    @property
    def file(self) -> str:
        """The name of the plan's file."""
        words = "".join(c if c.isalnum() or c in "._-" else " " for c in self.label).split()
        return f"{'_'.join(words)}_{self.sparsity:g}.json"

    def __hash__(self) -> int:
        return hash((self.method, self.allocation, self.sparsity))


@dataclass(frozen=True)
class MethodComparison:
    """Plans by the name they are shown under, in the order of every table and picture.

    Attributes:
        comparison: What each loses, and the original.
        columns: Method, allocation and sparsity of each.
        plans: The plans.
        left_out: Why something that was asked for could not be planned, by name.
    """

    comparison: Comparison
    columns: dict[str, Judged]
    plans: dict[str, PruningPlan]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def sparsities(self) -> list[float]:
        """Those of which there are plans, as asked for."""
        return list(dict.fromkeys(column.sparsity for column in self.columns.values()))

    @property
    def labels(self) -> list[str]:
        """Methods with their allocations, as asked for."""
        return list(dict.fromkeys(column.label for column in self.columns.values()))

    def result(self, label: str, sparsity: float) -> ModelResult | None:
        """What a method loses at a sparsity; None where that could not be planned."""
        names = [n for n, c in self.columns.items() if (c.label, c.sparsity) == (label, sparsity)]
        return self.comparison.models[names[0]] if names else None

    def at(self, sparsity: float) -> Comparison:
        """The plans of one sparsity, by their labels, and the original."""
        models = {c.label: self.comparison.models[n] for n, c in self.columns.items() if c.sparsity == sparsity}
        reference = self.comparison.reference
        assert reference is not None
        return Comparison({**models, reference: self.comparison.models[reference]}, reference)

    def lost(self, label: str, sparsity: float) -> float | None:
        """Nats per token lost, the mean of the domains."""
        result = self.result(label, sparsity)
        if result is None:
            return None
        domains = result.evaluation.domains
        return mean_lost(domains) if ALL in domains else next(iter(domains.values())).lost

    def verdict(self) -> str:
        """Which loses least at each sparsity, and what is to be known of the text."""
        said = []
        for sparsity in self.sparsities:
            lost = {label: value for label in self.labels if (value := self.lost(label, sparsity)) is not None}
            least = min(lost.values())
            best = [label for label, value in lost.items() if nats(value) == nats(least)]
            result = self.result(best[0], sparsity)
            assert result is not None
            domains = result.evaluation.domains
            ratio = growth(domains.get(ALL) or next(iter(domains.values())))
            named = best[0] if len(best) == 1 else f"{', '.join(best[:-1])} and {best[-1]}"
            said.append(
                f"{percent(sparsity)} removed: {named} lose{'s' if len(best) == 1 else ''} least"
                f"{f' of {len(lost)}' if len(lost) > len(best) else ''}, {nats(least)} nats per token (perplexity "
                f"{times(ratio or 1.0)})."
            )
        return "\n".join([*said, *dict.fromkeys(self.comparison.warnings())])

    def summary(self, bold: bool = False, width: int | None = None) -> str:
        """Tables for people, plans as columns and domains as rows, one for each sparsity; and what it comes to.

        Args:
            bold: Whether the best of each row is printed bold.
            width: Characters in a line; wider tables are continued below.
        """
        parts = [f"{self._title(s)}\n{self.at(s).by_domain().text(bold, width)}" for s in self.sparsities]
        return "\n\n".join([*parts, *(filled(words, width) for words in self._words())])

    def markdown(self) -> str:
        """The same in Markdown."""
        parts = [f"{self._title(s)}:\n\n{self.at(s).by_domain().markdown()}" for s in self.sparsities]
        return "\n\n".join([*parts, *("  \n".join(part.splitlines()) for part in self._words())])

    def _title(self, sparsity: float) -> str:
        return f"{percent(sparsity)} of the experts removed: nats lost per token of {self.comparison.text_kind}"

    def _words(self) -> list[str]:
        names: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            names.setdefault(why, []).append(name)
        left = [f"Left out: {', '.join(several)}: {why}" for why, several in names.items()]
        return [EXPLAINED, *(["\n".join(left)] if left else []), self.verdict()]

    def to_dict(self) -> Json:
        """As plain JSON values: those of the comparison, and what the plans are."""
        return {
            **self.comparison.to_dict(),
            "plans": {
                name: {
                    "method": column.recipe.method,
                    "allocation": column.allocation,
                    "sparsity": column.sparsity,
                    "removed": self.plans[name].sparsity,
                    "lost": self.lost(column.label, column.sparsity),
                    "num_experts": {str(n): count for n, count in self.plans[name].num_experts.items()},
                    "file": f"plans/{column.file}",
                }
                for name, column in self.columns.items()
            },
            "left_out": self.left_out,
            "verdict": self.verdict(),
        }


def percent(sparsity: float) -> str:
    """A fraction as text: 25%, 12.5%."""
    return f"{100 * sparsity:.4g}%"
