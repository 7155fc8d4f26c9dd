# SPDX-License-Identifier: Apache-2.0
"""A recipe, and a plan, for the program that is to open the output: what it takes, rounded to it or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING

from ..architectures.spec import MoESpec
from ..compat import ModelConfig
from ..config_checks import check_target
from ..errors import RequestError
from ..methods.budget import Budget, UniformBudget, checked_layers
from ..methods.limits import allowed_counts, num_removed
from ..names import UNIFORM
from ..plan import PruningPlan
from ..storage.values import Json, is_integer
from ..targets.table import get_target
from ..targets.target import GGUF, Target
from .build import budget_for

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig


@dataclass(frozen=True)
class Served:
    """What a target is to open.

    Attributes:
        target: The program.
        spec: The architecture.
        config: The model's config.
        parallel_size: Devices over which the program spreads the experts.
    """

    target: Target
    spec: MoESpec
    config: ModelConfig
    parallel_size: int = 1

    @property
    def multiple(self) -> int:
        """What numbers of experts have to be a multiple of."""
        return self.target.count_multiple(self.spec, self.config, self.parallel_size)

    @property
    def why(self) -> str:
        """Why they have to."""
        return self.target.why_multiple(self.spec, self.config, self.parallel_size)

    def refusal(self, counts: Mapping[int, int] | None) -> str | None:
        """Why the program refuses such numbers of experts, in a sentence without its end; None where it does not.

        Args:
            counts: Experts of the MoE layers; None for whatever numbers.
        """
        why = self.target.check(self.spec, self.config, counts, self.parallel_size)
        return None if why is None else f"{self.target.title} {why}"

    def notes(self, counts: Mapping[int, int]) -> list[str]:
        """What is to be known of a model with such numbers of experts that it does not refuse."""
        notes = []
        if not self.target.knows(self.config):
            notes.append(
                f"{self.target.title} has no implementation of its own of a {self.spec.model_type!r} model as this "
                "config.json names it; whether it opens it otherwise was not looked at"
            )
        if self.target.opens == GGUF:
            notes.append(f"{self.target.title} opens {GGUF} files: this checkpoint has to be converted to one")
        odd = sorted({count for count in counts.values() if count % self.multiple})
        if odd:
            named = " and ".join(map(str, odd))
            notes.append(f"{self.target.title} takes {named} experts in a layer, but {self.why}")
        return notes


def recipe_for_target(
    config: MoEPrunerConfig, spec: MoESpec, model_config: ModelConfig, num_experts: Mapping[int, int]
) -> tuple[MoEPrunerConfig, list[str]]:
    """A recipe whose numbers of experts its target takes, and what is to be said of it.

    Numbers that it does not take are rounded up, so that no more is removed than was asked for; down where nothing
    above is left to remove.

    Args:
        config: The recipe, its allocation settled.
        spec: The architecture.
        model_config: The model's config.
        num_experts: Experts of its MoE layers.

    Raises:
        RequestError: If the target refuses what the recipe asks for, whatever the numbers.
    """
    if config.target is None:
        return config, []
    served = Served(get_target(config.target), spec, model_config, config.parallel_size)
    _check_model(served)
    if config.substitute:  # every count stays
        return config, []
    if config.allocates != UNIFORM and (why := served.refusal(unequal(num_experts))) is not None:
        raise RequestError(
            f"allocation={config.allocates!r} leaves layers with different numbers of experts, and {why}. Ask for "
            f"allocation='uniform', or leave out target={served.target.name!r}."
        )
    multiple = lcm(config.count_multiple_of, served.multiple)
    notes = []
    if multiple != config.count_multiple_of:
        _check_possible(served, num_experts, multiple)
        rounded = _rounded(config, spec, model_config, num_experts, multiple)
        if rounded != config:
            notes.append(
                f"asked for: {_asked(config)}; kept for {served.target.title}: {_asked(rounded)}, since {served.why}"
            )
        config = replace(rounded, count_multiple_of=multiple)
    if config.fit is None and config.has_budget:
        budget = budget_for(config, num_experts, spec.routing(model_config))
        if isinstance(budget, UniformBudget):
            counts = {**num_experts, **budget.num_experts}
            check_counts(served, counts)
            notes += served.notes(counts)
    return config, notes


def unequal(num_experts: Mapping[int, int]) -> dict[int, int]:
    """Numbers of experts that differ, of the layers of a model: for asking what becomes of such."""
    last = max(num_experts)
    return {**num_experts, last: num_experts[last] + 1} if len(num_experts) > 1 else dict(num_experts)


def check_counts(served: Served, counts: Mapping[int, int]) -> None:
    """Raise where a target refuses numbers of experts.

    Raises:
        RequestError: With what it does and what to change.
    """
    _check_model(served)
    why = served.refusal(counts)
    if why is None:
        return
    low, high = min(counts.values()), max(counts.values())
    if low != high:
        raise RequestError(
            f"layers keep {low} to {high} experts, and {why}. Ask for the same number in every layer "
            f"(a uniform allocation, and no skipped layers), or leave out target={served.target.name!r}."
        )
    devices, size = "", served.parallel_size
    if size > 1:
        why, devices = f"{why}; parallel_size is {size}", ", or fewer devices"
    raise RequestError(f"layers keep {low} experts, and {why}. Ask for another number of experts{devices}.")


def _check_model(served: Served) -> None:
    """Raise where a target refuses a model whatever its layers keep.

    Raises:
        RequestError: With what it does.
    """
    if (why := served.refusal(None)) is not None:
        raise RequestError(f"{why}. Leave out target={served.target.name!r}: what is written is for others then.")


def _check_possible(served: Served, num_experts: Mapping[int, int], multiple: int) -> None:
    """Raise where no layer can be pruned to such a multiple.

    Raises:
        RequestError: With what to change.
    """
    most = max(num_experts.values())
    if multiple < most:
        return
    alone = served.multiple == multiple
    beside = "" if alone else f" (with count_multiple_of, multiples of {multiple})"
    raise RequestError(
        f"a layer has {most} experts at most, and none can be removed for {served.target.title}, since {served.why}"
        f"{beside}. Ask for fewer devices; parallel_size is {served.parallel_size}."
    )


def _asked(config: MoEPrunerConfig) -> str:
    """A budget in words."""
    if config.num_experts is not None:
        mean = "" if config.allocates == UNIFORM else " on average"
        return f"{config.num_experts} experts in a layer{mean}"
    if config.total_experts is not None:
        return f"{config.total_experts} experts in all"
    return f"a sparsity of {config.sparsity}"


def _rounded(
    config: MoEPrunerConfig,
    spec: MoESpec,
    model_config: ModelConfig,
    num_experts: Mapping[int, int],
    multiple: int,
) -> MoEPrunerConfig:
    """The recipe with the nearest budget that keeps multiples; as it is where none does, or it asks for such."""
    if config.fit is not None or not config.has_budget:
        return config
    rule = spec.routing(model_config)
    layers, protected = checked_layers(num_experts, config.protect, config.skip_layers)
    everything = sum(layers.values())
    if config.allocates == UNIFORM:
        if len(set(layers.values())) > 1:  # what each keeps is not one number
            return config
        total = next(iter(layers.values()))
        asked = config.num_experts if config.num_experts is not None else total - num_removed(_share(config), total)
        least = max(rule.least_with(protected[layer], total) for layer in layers)
        before = [n for n in allowed_counts(rule, total, least, config.count_multiple_of) if n < total]
        after = [n for n in allowed_counts(rule, total, least, multiple) if n < total]
        if asked in after or asked not in before or not after:
            return config
        return replace(config, sparsity=None, num_experts=_at_least(after, asked))
    budget = Budget(layers, 0, rule, protected, config.seed, multiple)
    allowed = [budget.allowed(layer) for layer in layers]
    steps = {after - below for counts in allowed for below, after in pairwise(counts)}
    if len(steps) != 1:
        return config
    most = min(sum(counts[-1] for counts in allowed), everything - 1)
    totals = list(range(sum(counts[0] for counts in allowed), most + 1, steps.pop()))
    if config.total_experts is not None:
        asked = config.total_experts
    elif config.num_experts is not None:
        asked = config.num_experts * len(layers)
    else:
        asked = everything - num_removed(_share(config), everything)
    floor = sum(rule.least_with(protected[layer], total) for layer, total in layers.items())
    if not totals or asked in totals or not floor <= asked < everything:
        return config
    return replace(config, sparsity=None, num_experts=None, total_experts=_at_least(totals, asked))


def _share(config: MoEPrunerConfig) -> float:
    assert config.sparsity is not None
    return config.sparsity


def _at_least(numbers: list[int], asked: int) -> int:
    """The first of rising numbers that is not below another; the last where all are."""
    return next((number for number in numbers if number >= asked), numbers[-1])


# ------------------------------------------------------------------------------------------- plans


def served_by(plan: PruningPlan, spec: MoESpec, config: ModelConfig) -> Served | None:
    """The target that a plan is for, and what it is to open; None where it names none.

    Raises:
        RequestError: If it names one that is not known.
    """
    name, size = plan.config.get("target"), plan.config.get("parallel_size", 1)
    if name is None:
        return None
    if not is_integer(size) or size < 1:
        raise RequestError(f"the plan's parallel_size is {size!r}; it must be an integer of at least 1.")
    return Served(get_target(name), spec, config, size)


def with_target(plan: PruningPlan, target: str | None, parallel_size: int | None = None) -> PruningPlan:
    """A plan whose output another program is to open than it says.

    Args:
        plan: The plan.
        target: The program (``list targets``); by default that of the plan.
        parallel_size: Devices over which it spreads the experts; by default as the plan says, of another program one.

    Raises:
        RequestError: If the program is not known, or has no use for several devices.
    """
    if target is None and parallel_size is None:
        return plan
    before: Json = {name: plan.config[name] for name in ("target", "parallel_size") if name in plan.config}
    if target is not None:
        before = {"target": get_target(target).name}
    size = parallel_size if parallel_size is not None else before.get("parallel_size", 1)
    check_target(before.get("target"), size)
    return replace(plan, config={**plan.config, **before, "parallel_size": size})


def remembered(plan: PruningPlan, served: Served | None) -> PruningPlan:
    """A plan that remembers what its output is for, and what is to be known of that.

    Raises:
        RequestError: If the target refuses the plan's numbers of experts.
    """
    if served is None:
        return plan
    counts = plan.without_heads.num_experts
    check_counts(served, counts)
    target = served.target
    for_whom: Json = {"name": target.name, "program": target.program, "version": target.version}
    for_whom |= {"parallel_size": served.parallel_size, "evidence": target.evidence}
    notes = list(dict.fromkeys([*plan.provenance.get("notes", []), *served.notes(counts)]))
    return replace(plan, provenance={**plan.provenance, "target": for_whom, "notes": notes})
