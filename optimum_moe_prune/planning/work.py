# SPDX-License-Identifier: Apache-2.0
"""The plan of the work: what will be kept, read, written and held in memory, and for how long, before it begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..architectures.substitution import OPENED
from ..calibration.current import Current
from ..calibration.in_memory import statistics_bytes
from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout, model_dtype, open_layout
from ..checkpoints.sizes import Sizes, parameters_in_words, sizes_of
from ..checkpoints.source import Source
from ..compat import text_config
from ..errors import check_type
from ..methods.budget import Budget, UniformBudget
from ..methods.limits import allowed_counts
from ..models.memory import Compute, available_memory, model_bytes
from ..models.widened import PIECE_BYTES
from ..names import AUTO, DROP, dtype_text
from ..plan import PruningPlan
from ..progress.pace import duration
from ..statistics.needs import DENSE, WITHOUT_TEXT, Need
from ..storage.growing import IN_MEMORY_BYTES
from ..storage.paths import nearest_existing, real_path
from ..storage.values import Json
from ..targets.table import opened_by
from ..targets.target import CHECKPOINT
from . import backward_pass
from .build import budget_for
from .fit import Fit, fitted, gigabytes, weights_after
from .for_target import recipe_for_target, unequal
from .measuring import Measuring, in_words
from .progressive import needs_unpruned
from .recovery_work import RecoveryWork, recovery_work
from .run_time import WORTH_PROBING, seconds_of, speed_of

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

_LIBRARIES = 5 * 10**8  # what torch and transformers hold before any model is there
_COPYING = _LIBRARIES + 2 * 10**8
_KERNELS = 3 * 10**8  # what torch takes for itself once anything runs, and its allocator keeps
_STATES_AT_ONCE = 12  # copies of a batch's hidden states while a layer runs
_CHUNKS = 4 * 128 * 2**20  # outputs of all experts for some tokens


@dataclass(frozen=True)
class Choice:
    """What a budget keeps, and what the next larger and smaller ones would.

    Attributes:
        total: Experts that are kept in all layers together, of ``original``.
        original: Experts there are.
        per_layer: Experts that each layer keeps that is not skipped, where the budget says it.
        neighbours: What can be asked for instead: experts in a layer that is not skipped, or in all layers together,
            with the sparsity of each, which is that of the layers that are not skipped.
        asked: The sparsity that was asked for, where one was.
        skipped: Experts of the layers that are skipped.
    """

    total: int
    original: int
    per_layer: dict[int, int] | None
    neighbours: dict[int, float]
    asked: float | None = None
    skipped: int = 0

    @property
    def sparsity(self) -> float:
        """The fraction of experts that is removed."""
        return 1 - self.total / self.original

    @property
    def sparsity_of_others(self) -> float:
        """The same of the layers that are not skipped, which is what a recipe asks for."""
        return 1 - (self.total - self.skipped) / (self.original - self.skipped)


@dataclass(frozen=True)
class WorkPlan:
    """What is about to be done, in numbers. Bytes unless said otherwise.

    Attributes:
        model: Name, type, layers, experts and parameters of the model.
        choice: What the budget keeps; None where nothing is chosen.
        fit: What it has to fit in, where that was asked for.
        texts: Samples and tokens, by domain as well; empty where no text is read.
        measures: What is measured of the model: whose sets, how many at most, on what; empty where nothing is.
        reads: Read from the model's files.
        writes: Written to the output.
        unfinished: Kept on disk beside the output until the work is done.
        disk: Free on the output's disk.
        memory: Needed at most, roughly.
        free_memory: Free where the model is run.
        device: Where it is run.
        dtype: The precision it is run in.
        weights_dtype: The precision of the weights that are read for it.
        streamed: Whether one layer at a time is in memory.
        seconds: How long running the model takes, roughly; None where that cannot be told.
        recovery: What the recovery takes, where there is one; it is part of the other numbers.
        opened: The programs that open what is written, in words; empty where that is no model.
        notes: What follows from the model and from the program that is to open the output, in sentences.
    """

    model: Json
    choice: Choice | None = None
    fit: Fit | None = None
    texts: Json = field(default_factory=dict)
    measures: Json = field(default_factory=dict)
    reads: int = 0
    writes: int = 0
    unfinished: int = 0
    disk: int = 0
    memory: int = 0
    free_memory: int = 0
    device: str = ""
    dtype: str = ""
    weights_dtype: str = ""
    streamed: bool | None = None
    seconds: float | None = None
    recovery: RecoveryWork | None = None
    opened: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> Json:
        """As plain values."""
        values = {name: value for name, value in vars(self).items() if name not in ("choice", "fit", "recovery")}
        values["recovery"] = None if self.recovery is None else vars(self.recovery)
        if self.choice is not None:
            per_layer, neighbours = self.choice.per_layer, self.choice.neighbours
            values["choice"] = {
                "total_experts": self.choice.total,
                "original_experts": self.choice.original,
                "sparsity": self.choice.sparsity,
                "asked_sparsity": self.choice.asked,
                "num_experts": None if per_layer is None else {str(layer): n for layer, n in per_layer.items()},
                "neighbours": {str(count): sparsity for count, sparsity in neighbours.items()},
            }
        return {**values, "fit": None if self.fit is None else self.fit.to_dict()}

    def summary(self) -> str:
        """In lines for people."""
        lines = {"model": self._model(), "keeps": self._keeps(), "opened": self.opened and f"by {self.opened}"}
        if self.fit is not None:
            lines["fits"] = self.fit.note
        lines["since"] = "; ".join(self.notes)
        if self.texts:
            domains = ", ".join(f"{name} {count}" for name, count in sorted(self.texts["tokens_by_domain"].items()))
            lines["text"] = f"{self.texts['samples']} samples, {self.texts['tokens']} tokens ({domains})"
        if self.measures:
            lines["measures"] = in_words(self.measures)
        if self.recovery is not None:
            lines["recovers"] = self.recovery.sentence()
        lines["reads"] = gigabytes(self.reads)
        if self.writes or self.unfinished:
            unfinished = f"{gigabytes(self.unfinished)} until it is done" if self.unfinished else ""
            parts = [gigabytes(self.writes) if self.writes else "", unfinished]
            lines["writes"] = f"{', and '.join(filter(None, parts))}; {gigabytes(self.disk)} are free"
        if self.streamed is not None:
            way = "one layer at a time" if self.streamed else "the whole model in memory"
            widened = f" from {self.weights_dtype} weights" if self.weights_dtype != self.dtype else ""
            lines["runs"] = f"on {self.device} in {self.dtype}{widened}, {way}"
        lines["memory"] = f"about {gigabytes(self.memory)}; {gigabytes(self.free_memory)} are free"
        if self.streamed is not None:
            quick = self.seconds is not None and self.seconds < 60
            known = "about a minute at most" if quick else f"about {duration(self.seconds or 0)}"
            lines["time"] = "cannot be told" if self.seconds is None else known
        width = max(7, *map(len, lines))
        return "\n".join(f"{name:<{width}} {text}" for name, text in lines.items() if text)

    def _model(self) -> str:
        model, counts = self.model, self.model["num_experts"].values()
        low, high = min(counts), max(counts)
        return (
            f"{model['name']} ({model['model_type']}): {model['layers']} layers, {len(counts)} of them with "
            f"{low if low == high else f'{low} to {high}'} experts, {model['top_k']} for a token; "
            f"{parameters_in_words(model['parameters'])} parameters, {gigabytes(model['bytes'])}"
        )

    def _keeps(self) -> str:
        choice = self.choice
        if choice is None:
            return ""
        per_layer = choice.per_layer and set(choice.per_layer.values())
        others = ", ".join(f"{n} ({sparsity:.1%})" for n, sparsity in choice.neighbours.items())
        others = f"; the next: {others}" if others else ""
        if per_layer and len(per_layer) == 1:
            where = f"each of {len(choice.per_layer or ())} layers" if choice.skipped else "each layer"
            what = f"{per_layer.pop()} experts in {where}, {choice.total} of {choice.original}"
        else:
            what = f"{choice.total} of {choice.original} experts"
        is_rounded = choice.asked is not None and abs(choice.asked - choice.sparsity_of_others) >= 0.0005
        asked = f", {choice.asked:.1%} was asked for" if is_rounded else ""
        skipped = f", {choice.sparsity_of_others:.1%} without the skipped layers" if choice.skipped else ""
        return f"{what} ({choice.sparsity:.1%} removed{skipped}{asked}){others}"


def plan_work(
    model: Layout | Source | str | os.PathLike,
    recipe: MoEPrunerConfig | None = None,
    samples: CalibrationSet | None = None,
    *,
    needs: frozenset[Need] | None = None,
    plan: PruningPlan | None = None,
    mtp: str | None = None,
    output: str | os.PathLike | None = None,
    compute: Compute = Compute(),
    measures: Sequence[MoEPrunerConfig] | bool | None = None,
    saves_statistics: bool = False,
    judged_tokens: int = 0,
    recovery: CalibrationSet | None = None,
    standalone: bool = False,
) -> WorkPlan:
    """What calibrating, choosing and writing will take. Nothing is written; one layer is run on a few tokens.

    Args:
        model: The checkpoint, by its folder or Hub id.
        recipe: Method, budget and calibration; without a budget nothing is chosen.
        samples: The calibration, as ``MoEPruner.samples`` makes it of texts; None where none is needed.
        needs: What is gathered; by default what the recipe's method reads.
        plan: In place of a budget: the plan that is applied.
        mtp: With a plan, what becomes of heads in place of what it says.
        output: The folder or file to write.
        compute: How the checkpoint is run.
        measures: Recipes whose sets are measured, or whether the recipe's are; by default where planning with it
            measures.
        saves_statistics: Whether the statistics are what is written.
        judged_tokens: Tokens that go through the model beside, for all plans that are judged together.
        recovery: What the recipe's recovery is done with.
        standalone: Whether code that loads unequal layers without this package is written beside.

    Raises:
        RequestError: If the budget cannot be kept to, or the device is not there.
    """
    check_type(model, (Layout, Source, str, os.PathLike), "the folder or Hub id of a model")
    check_type(samples, (CalibrationSet, type(None)), "a CalibrationSet (MoEPruner.samples makes one of texts)")
    layout = model if isinstance(model, Layout) else open_layout(model)
    if samples is not None:
        layout.plain.check_method()
    if recipe is not None and saves_statistics:  # they are of the unpruned model
        recipe = replace(recipe, progressive=False)
    sizes, counts, config = sizes_of(layout), layout.num_experts, layout.config
    rule = layout.spec.routing(config)
    fit, choice, writes, after = None, None, 0, None
    notes: list[str] = []
    made_for = plan.config.get("target") if plan is not None else None if recipe is None else recipe.target
    if plan is not None:
        choice = Choice(sum(plan.num_experts.values()), sum(plan.original_num_experts.values()), plan.num_experts, {})
        after = plan.without_heads.num_experts
        writes = sizes.after(plan.num_experts, (plan.config.get("mtp") if mtp is None else mtp) == DROP).nbytes
    elif recipe is not None and recipe.has_budget:
        recipe, notes = recipe_for_target(recipe, layout.spec, config, counts)
        recipe, fit = fitted(recipe, layout)
        budget = budget_for(recipe, counts, rule)
        choice = replace(_choice(budget, sum(counts.values())), asked=recipe.sparsity)
        writes = weights_after(sizes, counts, budget, recipe.mtp)
        after = {**counts, **budget.num_experts} if isinstance(budget, UniformBudget) else unequal(counts)
    facts = {
        "name": layout.checkpoint.name_or_path,
        "model_type": layout.spec.model_type,
        "layers": text_config(config).num_hidden_layers,
        "num_experts": counts,
        "top_k": rule.top_k,
        "parameters": sizes.whole.parameters,
        "bytes": sizes.whole.nbytes,
    }
    disk = 0 if output is None else shutil.disk_usage(nearest_existing(real_path(output))).free
    work = WorkPlan(
        facts,
        choice,
        fit,
        reads=writes,
        writes=writes,
        disk=disk,
        memory=_COPYING,
        free_memory=available_memory("cpu"),
        notes=tuple(notes),
    )
    if after is not None and not saves_statistics:
        if recipe is not None and recipe.substitute:
            opened = OPENED
        else:
            opened = opened_by(CHECKPOINT, layout.spec, config, after, standalone, made_for)
        work = replace(work, opened=opened)
    if measures is None:
        measures = recipe is not None and recipe.measures
    if isinstance(measures, bool):
        measures = [recipe] if measures and recipe is not None else []
    needs = needs if needs is not None else frozenset() if recipe is None else recipe.needs
    needs -= WITHOUT_TEXT
    samples = recovery if samples is None else samples
    if recipe is None or samples is None or not (needs or measures or judged_tokens or recovery):
        return work
    compute = compute.settled(layout)
    measuring = Measuring.of(measures, counts, samples, rule)
    dtype = compute.computing_dtype(layout)
    own = model_dtype(config, layout.checkpoint, compute.dtype)
    statistics = statistics_bytes(counts, needs, Current(samples, recipe.max_tokens, recipe.seed), config)
    width = text_config(config).hidden_size * dtype.itemsize  # bytes of a token's hidden states
    layers, backward = text_config(config).num_hidden_layers, Need.FISHER in needs
    progressive = recipe.progressive and recipe.needs_text
    copies = backward_pass.states_of_tokens(layers) if backward else 2
    states = copies * samples.num_tokens * width if compute.stream or progressive else 0
    calibrations = 2 if progressive and needs_unpruned(recipe) else 1  # each keeps its own until the work is done
    statistics *= calibrations
    held = _largest_layer(sizes) * dtype.itemsize if compute.stream else model_bytes(layout, compute.dtype)
    if own != dtype:
        held += max(expert.parameters for expert in sizes.experts.values()) * dtype.itemsize + PIECE_BYTES
    batch = max(int(batch.input_ids.numel()) for batch in samples.batches(recipe.batch_size))
    running = _STATES_AT_ONCE * batch * width + (_CHUNKS if needs & (DENSE | {Need.FISHER}) else 0)
    if backward:
        longest = max(sample.num_tokens for sample in samples.samples)
        expert = max(expert.parameters for expert in sizes.experts.values())
        running += backward_pass.memory_of(batch, longest, text_config(config), rule.top_k, expert, dtype.itemsize)
        running += 0 if compute.stream else layers * batch * width
        running += _largest_layer(sizes) * dtype.itemsize if own != dtype else 0  # of which no piece is let go
    tokens = samples.num_tokens
    ran = tokens + judged_tokens + sum(measuring.passes(layers)) + (0 if recovery is None else 6 * recovery.num_tokens)
    speed, of_recovery = None, None
    seconds: float | None = 0.0
    if sizes.whole.parameters * ran >= WORTH_PROBING:
        speed = speed_of(layout, samples, needs, compute, recipe)
        texts = (tokens, judged_tokens)
        seconds = None if speed is None else seconds_of(layout, speed, recipe, texts, needs, compute, measuring)
    if recovery is not None:
        total = sum(counts.values()) if choice is None else choice.total
        of_recovery = recovery_work(layout, sizes, recipe, recovery, compute, total, speed)
        seconds = None if seconds is None else seconds + (of_recovery.seconds or 0.0)
    beside = running + max(min(statistics, IN_MEMORY_BYTES), 0 if of_recovery is None else of_recovery.memory)
    waits = 0 if of_recovery is None else of_recovery.unfinished  # when what a calibration keeps is of no use any more
    unfinished = (0 if saves_statistics else statistics) + max(states, waits)
    return replace(
        work,
        texts={"samples": len(samples), "tokens": tokens, "tokens_by_domain": _by_domain(samples)},
        reads=calibrations * sizes.whole.nbytes + writes + (0 if of_recovery is None else of_recovery.reads),
        writes=statistics if saves_statistics else writes,
        unfinished=unfinished if output is not None else 0,
        memory=_LIBRARIES + _KERNELS + held + beside,
        free_memory=available_memory(compute.device),
        device=compute.device if compute.device != AUTO else "all cards",
        dtype=dtype_text(dtype),
        weights_dtype=dtype_text(own),
        streamed=bool(compute.stream),
        measures=measuring.to_dict() if measures else {},
        seconds=seconds,
        recovery=of_recovery,
    )


def _choice(budget: Budget, everything: int) -> Choice:
    """What a budget keeps of all experts, those of skipped layers among them."""
    skipped = everything - sum(budget.original.values())
    kept = budget.total + skipped
    if isinstance(budget, UniformBudget):
        return Choice(kept, everything, dict(budget.num_experts), _beside(budget), skipped=skipped)
    step = max(budget.rule.groups, budget.multiple)
    least = sum(budget.allowed(layer)[0] for layer in budget.original)
    most = everything - skipped
    others = (n for n in (budget.total - step, budget.total + step) if least <= n < most)
    return Choice(kept, everything, None, {n + skipped: 1 - n / most for n in others}, skipped=skipped)


def _beside(budget: UniformBudget) -> dict[int, float]:
    """The next smaller and larger number of experts in a layer, where all layers keep the same."""
    if len(set(budget.num_experts.values())) != 1 or len(set(budget.original.values())) != 1:
        return {}
    count, total = next(iter(budget.num_experts.values())), next(iter(budget.original.values()))
    least = max(budget.allowed(layer)[0] for layer in budget.original)
    allowed = [n for n in allowed_counts(budget.rule, total, least, budget.multiple) if n < total]
    below, above = [n for n in allowed if n < count][-1:], [n for n in allowed if n > count][:1]
    return {n: 1 - n / total for n in (*below, *above)}


def _largest_layer(sizes: Sizes) -> int:
    """Parameters of the largest decoder layer, roughly: its experts, and its share of the rest."""
    experts = [
        sizes.experts[layer].parameters * count for layer, count in sizes.num_experts.items() if layer in sizes.experts
    ]
    return max(experts) + (sizes.whole.parameters - sum(experts)) // len(experts)


def _by_domain(samples: CalibrationSet) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for sample in samples.samples:
        tokens[sample.domain] = tokens.get(sample.domain, 0) + sample.num_tokens
    return tokens
