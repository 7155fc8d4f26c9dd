# SPDX-License-Identifier: Apache-2.0
"""The budget that makes a model fit: the fewest experts removed, with what comes after pruning in the sum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from ..architectures.routers import RoutingRule
from ..checkpoints.layout import Layout
from ..checkpoints.sizes import OTHER_BITS, SCALE_BITS, Sizes, sizes_of
from ..errors import RequestError
from ..methods.budget import Budget, UniformBudget, checked_layers
from ..models.blocks import moe_blocks
from ..models.context import context_bytes
from ..models.sizes import sizes_of_model
from ..names import DROP, KEEP, UNIFORM
from ..plan import PruningPlan
from ..storage.values import Json, size_bytes
from .build import budget_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import MoEPrunerConfig

_OTHER_BITS = (16, 8, 4)


@dataclass(frozen=True)
class Fit:
    """How a model fits.

    Attributes:
        asked: Bytes that it had to fit in.
        bits: Of a weight after pruning; None is as the files are.
        context: Tokens of one sequence that are counted.
        weights: Bytes of the weights that are left.
        cache: Bytes of the context.
        before: Bytes of the weights of the whole model, in the same precision.
        experts_kept: Bytes of the weights that are left where quantisation leaves fused experts in 16 bits; None where
            nothing is to be quantised, or experts are modules that it reaches.
    """

    asked: int
    bits: int | None
    context: int
    weights: int
    cache: int
    before: int
    experts_kept: int | None = None

    @property
    def note(self) -> str:
        """In one sentence."""
        return (
            f"{gigabytes(self.weights + self.cache)} of {gigabytes(self.asked)}: weights "
            f"{_precision(self.bits)} {gigabytes(self.weights)} (before: {gigabytes(self.before)}){self._unless}"
            + (f", {self.context} tokens of context {gigabytes(self.cache)}" if self.context else "")
            + ("; what a program needs beside them is not counted" if self.context else _NO_CONTEXT)
        )

    @property
    def _unless(self) -> str:
        if self.experts_kept is None:
            return ""
        return (
            f" or {gigabytes(self.experts_kept)} where experts stay in 16 bits, as torchao and bitsandbytes leave them"
        )

    def to_dict(self) -> Json:
        """As plain values."""
        return asdict(self)


_NO_CONTEXT = "; neither a context (context=N) nor what a program needs beside is counted"


def fitted(config: MoEPrunerConfig, model: PreTrainedModel | Layout | None) -> tuple[MoEPrunerConfig, Fit | None]:
    """A recipe with a number of experts in place of the memory that the pruned model has to fit in.

    Args:
        config: The recipe; one that names a budget otherwise comes back as it is.
        model: The model, in memory or as files; None where the recipe has another budget.

    Raises:
        RequestError: If nothing has to be removed, or nothing that can be removed makes it fit; with what would.
    """
    if config.fit is None or model is None:
        return config, None
    asked = size_bytes(config.fit, "fit")
    if isinstance(model, Layout):
        original, rule, sizes = model.num_experts, model.spec.routing(model.config), sizes_of(model)
        name, code = model.checkpoint.name_or_path, model.checkpoint.source.trust_remote_code
        numbered = any(layer.numbered for layer in model.structure.moe.values())
    else:
        blocks = moe_blocks(model)
        original, rule, sizes = {b.layer: b.num_experts for b in blocks}, blocks[0].rule, sizes_of_model(model)
        name, code = "the model", False
        numbered = any(block.structure.numbered for block in blocks)
    sums = _Sums(config, original, rule, sizes, context_bytes(model.config, config.context, code))
    whole = sums.whole(config.bits)
    if whole + sums.cache <= asked:
        raise RequestError(
            f"{name} fits in {gigabytes(asked)} as it is: its weights take {gigabytes(whole)} "
            f"{_precision(config.bits)}{sums.beside}. Nothing has to be removed; ask for less, or for a number of "
            "experts."
        )
    best = sums.largest(asked, config.bits)
    if best is None:
        raise RequestError(f"{name} cannot be made to fit in {gigabytes(asked)}: {sums.refusal(asked)}")
    recipe, budget = best
    left = sums.weights(budget, config.bits)
    kept = None if numbered else sums.with_experts_kept(left, budget)
    return recipe, Fit(asked, config.bits, config.context, left, sums.cache, whole, kept)


def with_fit(plan: PruningPlan, fit: Fit | None) -> PruningPlan:
    """A plan that remembers what it had to fit in."""
    if fit is None:
        return plan
    notes = [*plan.provenance.get("notes", []), f"fits {fit.note}"]
    return replace(plan, provenance={**plan.provenance, "notes": notes, "fit": fit.to_dict()})


def gigabytes(nbytes: int, up: bool = False) -> str:
    """Bytes in words, in three digits: 24 GB, 3.21 GB, 940 MB.

    Args:
        nbytes: The bytes.
        up: Round up, so that it is enough.
    """
    power = min(max(len(str(nbytes)) - 1, 3) // 3, 4)
    value = nbytes / 1000**power
    if up:
        digits = 10 ** max(0, 2 - int(math.log10(max(value, 1))))
        value = math.ceil(value * digits) / digits
    return f"{value:.4g} {'kMGT'[power - 1]}B" if value >= 999.5 else f"{value:.3g} {'kMGT'[power - 1]}B"


def weights_after(
    sizes: Sizes, original: Mapping[int, int], budget: Budget, mtp: str | None, bits: int | None = None
) -> int:
    """Bytes of the weights that a budget leaves; of one for the whole model, at most.

    Args:
        sizes: Of the model.
        original: Experts of each MoE layer.
        budget: The budget.
        mtp: What becomes of heads for further tokens, as in a recipe.
        bits: As for ``Size.at``.
    """
    drop = mtp == DROP
    if not isinstance(budget, UniformBudget):
        removed = sum(budget.original.values()) - budget.total
        return math.ceil(sizes.after({}, drop).at(bits) - removed * _least_expert(sizes, budget.original, bits))
    counts = dict(budget.num_experts)
    kept = {counts.get(layer, total) for layer, total in original.items()}
    if len(kept) == 1 and mtp not in (KEEP, DROP):
        counts |= dict.fromkeys(sizes.head_experts, kept.pop())
    return sizes.after(counts, drop).at(bits)


def _least_expert(sizes: Sizes, layers: Iterable[int], bits: int | None) -> float:
    """Bytes of the smallest expert in layers, in fractions where a format takes such."""
    return min(sizes.experts[layer].times(1024).at(bits) / 1024 for layer in layers)


def _precision(bits: int | None) -> str:
    return "in the files' precision" if bits is None else f"at {bits} bits"


@dataclass(frozen=True)
class _Sums:
    """What a model takes after pruning.

    Attributes:
        config: The recipe.
        original: Experts of each MoE layer.
        rule: How the routers choose.
        sizes: Of the model.
        cache: Bytes of the context.
    """

    config: MoEPrunerConfig
    original: Mapping[int, int]
    rule: RoutingRule
    sizes: Sizes
    cache: int

    @property
    def beside(self) -> str:
        """What is counted beside the weights, in words."""
        return f", and {self.config.context} tokens of context {gigabytes(self.cache)}" if self.cache else ""

    def whole(self, bits: int | None) -> int:
        """Bytes of the weights before pruning."""
        return self.sizes.after({}, self.config.mtp == DROP).at(bits)

    def weights(self, budget: Budget, bits: int | None) -> int:
        """Bytes of the weights that a budget leaves; of one for the whole model, at most."""
        return weights_after(self.sizes, self.original, budget, self.config.mtp, bits)

    def _layers(self) -> dict[int, int]:
        return {layer: total for layer, total in self.original.items() if layer not in self.config.skip_layers}

    def with_experts_kept(self, left: int, budget: Budget) -> int | None:
        """Bytes that are left where the experts stay in 16 bits; None where fewer are not asked for."""
        bits, each = self.config.bits, self.sizes.experts
        if bits is None or bits >= OTHER_BITS:
            return None
        mean = sum(each[layer].quantisable for layer in self.original) / len(self.original)  # of one expert
        skipped = sum(count for layer, count in self.original.items() if layer not in budget.original)
        return left + math.ceil(mean * (budget.total + skipped) * (OTHER_BITS - bits - SCALE_BITS) / 8)

    def largest(self, asked: int, bits: int | None) -> tuple[MoEPrunerConfig, Budget] | None:
        """The recipe and budget that fit and remove least."""
        for number in self._numbers(asked - self.cache, bits):
            recipe, budget = self._budget(number)
            if budget is not None and self.weights(budget, bits) + self.cache <= asked:
                return recipe, budget
        return None

    def _numbers(self, room: int, bits: int | None) -> Iterable[int]:
        """What can be asked for, most experts first; of a whole model from what would fit."""
        if self.config.allocates == UNIFORM:
            return sorted(set(range(1, max(self.original.values()))), reverse=True)
        removed = math.ceil((self.whole(bits) - room) / _least_expert(self.sizes, self._layers(), bits))
        return range(sum(self._layers().values()) - max(removed, 1), self._floor() - 1, -1)

    def _floor(self) -> int:
        """The fewest experts that the layers of a budget for the whole model can keep together."""
        layers, protected = checked_layers(self.original, self.config.protect, self.config.skip_layers)
        budget = Budget(layers, 0, self.rule, protected, multiple=self.config.count_multiple_of)
        return sum(budget.allowed(layer)[0] for layer in layers)

    def _budget(self, number: int) -> tuple[MoEPrunerConfig, Budget | None]:
        uniform = self.config.allocates == UNIFORM
        recipe = replace(
            self.config,
            fit=None,
            bits=None,
            context=0,
            num_experts=number if uniform else None,
            total_experts=None if uniform else number,
        )
        try:
            return recipe, budget_for(recipe, self.original, self.rule)
        except RequestError:
            return recipe, None

    def refusal(self, asked: int) -> str:
        """What the smallest cut takes, and what would fit."""
        fewest = range(1, max(self.original.values()))
        if self.config.allocates != UNIFORM:
            fewest = range(self._floor(), sum(self._layers().values()))
        budgets = (self._budget(number)[1] for number in fewest)
        least = next((budget for budget in budgets if budget is not None), None)
        if least is None:
            return "its router, and the experts that are protected or in skipped layers, leave none to remove."
        bits = self.config.bits
        keeps = f"{least.total} of {sum(least.original.values())} experts"
        left = self.weights(least, bits)
        said = f"with the fewest, {keeps}, its weights take {gigabytes(left)} {_precision(bits)}{self.beside}."
        ways = [gigabytes(left + self.cache, up=True)]
        if self.cache and left < asked:
            ways.append("a shorter context")
        for other in (n for n in _OTHER_BITS if bits is None or n < bits):
            if self.whole(other) + self.cache <= asked:
                ways.append(f"bits={other}, without pruning")
                break
            if (found := self.largest(asked, other)) is not None:
                ways.append(f"bits={other}, with {found[1].total} of {sum(found[1].original.values())} experts")
                break
        return f"{said} What would fit: {'; '.join(ways)}."
