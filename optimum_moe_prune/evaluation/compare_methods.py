# SPDX-License-Identifier: Apache-2.0
"""Methods and sparsities judged side by side, from one calibration: which way of pruning loses least."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..architectures.routers import RoutingRule
from ..calibration.calibrate import Model, layout_of, no_calibration, statistics_for
from ..calibration.samples import CalibrationInput, CalibrationSet, sample_length
from ..calibration.shares import check_same_samples
from ..checkpoints.layout import Layout, identity
from ..checkpoints.source import Source
from ..config import MoEPrunerConfig
from ..config_checks import ALLOCATIONS
from ..errors import RequestError, nearest_first
from ..methods import every_method, get_method
from ..models.blocks import fingerprint, moe_blocks
from ..models.checks import check_model
from ..models.layerwise import LayerByLayer
from ..models.memory import Compute, begun_with, open_runner
from ..models.wrappers import plain_model
from ..names import BY_SENSITIVITY, dtype_text
from ..plan import PruningPlan, with_parent
from ..planning.build import budget_for, quiet_plan
from ..planning.sensitivity import Sensitivity
from ..processes import shared
from ..processes.folders import own_folder
from ..progress import progress
from ..provenance import versions
from ..statistics.passages import remembered
from ..statistics.progressive import check_unpruned
from ..statistics.samples import check_domain_weights
from ..statistics.stats import CalibrationStats
from ..storage.growing import unfinished
from ..storage.values import Json, fraction
from ..storage.workspace import Workspace
from ..surgery.settled import settled
from .best import choose_by_measuring
from .comparison import Comparison, ModelResult, reference_of
from .divergence import AGREEMENT, KL, LOSS, Retained, outcomes
from .losses import evaluation_of
from .measure_sensitivity import check_model_of, measure_sensitivity
from .method_comparison import Judged, MethodComparison
from .overlap import overlap_of, overlap_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ORIGINAL = "original"
"""What the unpruned model is called among the results."""

Methods = str | MoEPrunerConfig | Sequence[str | MoEPrunerConfig]
"""``"all"``, methods by name, or recipes (their budgets are not looked at)."""


@shared
def compare_methods(
    model: Model,
    calibration: CalibrationInput | CalibrationStats | None,
    data: CalibrationInput,
    *,
    methods: Methods = "all",
    sparsities: Sequence[float | str] | float | str = (0.25, 0.5),
    allocations: Sequence[str] | str = (),
    stats: CalibrationStats | None = None,
    sensitivity: Sensitivity | None = None,
    domain_weights: Mapping[str, float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> MethodComparison:
    """Plan by several methods at several sparsities from one calibration, and judge every plan on held-out text.

    The model is not cut for it: every plan masks its experts in place, which gives the numbers of the model that is
    really pruned. What cannot be planned is left out, and why is in the result.

    Args:
        model: The unpruned model, or the folder, Hub id or ``Source`` of one.
        calibration: Texts, files, records, a dataset or token tensors, or statistics. None with methods that need
            none.
        data: Held-out texts, as :func:`~optimum_moe_prune.evaluation.losses.evaluate` takes them.
        methods: ``"all"``, names, or recipes; the first one's settings are those of the calibration.
        sparsities: Fractions of the experts to remove, as ``0.25`` or ``"25%"``, or one.
        allocations: ``"uniform"``, ``"global"``, ``"sensitivity"``, ``"estimated"``; by default each
            method's own (of a recipe, its).
        stats: Of the same model, from which the methods choose; the calibration is then read for
            ``allocation="sensitivity"`` alone.
        sensitivity: What was measured of the model, for that allocation; without one it is measured on the
            calibration.
        domain_weights: A share for each domain of the calibration; by default every token counts once.
        tokenizer: In place of the one that comes with the model.
        max_length: Tokens of a held-out sample at most; less if the model was made for less.
        batch_size: Samples in a forward pass.
        seed: Of the resamples behind intervals.
        compute: How a checkpoint is run; of a model in memory, in which precision (as for ``calibrate``).
        workspace: Where unfinished work on a checkpoint is kept, and continued by a later call for the same.

    Returns:
        A result for each plan, and the plans.

    Raises:
        RequestError: If nothing can be planned, or the model, the calibration or the data cannot be read.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    processes = compute.together
    if isinstance(calibration, CalibrationStats):
        calibration, stats = None, calibration
    recipes = _recipes(methods)
    if stats is not None:
        check_unpruned(stats.provenance, "a comparison of methods")
    if any(recipe.progressive for recipe in recipes):
        raise RequestError(
            "methods are compared from one calibration of the unpruned model, and progressive=True calibrates for "
            "each plan; compare without it, or prune with it (run) and judge what comes out (evaluate)."
        )
    if any(recipe.substitute for recipe in recipes):
        raise RequestError(
            "methods are compared by removing experts, and with substitute=True they answer with a constant; compare "
            "without it, or write such a checkpoint (run) and judge it (evaluate)."
        )
    one_or_more = [sparsities] if isinstance(sparsities, (int, float, str)) else sparsities
    allocations = [allocations] if isinstance(allocations, str) else list(allocations)
    fractions = [fraction(sparsity) if isinstance(sparsity, str) else sparsity for sparsity in one_or_more]
    model = plain_model(model)
    if wrong := [s for s in fractions if not isinstance(s, (int, float)) or not 0 < s < 1]:
        raise RequestError(f"sparsity is {wrong[0]!r}; the fraction of experts to remove lies between 0 and 1.")
    if not fractions:
        raise RequestError("no sparsity is named.")
    layout = layout_of(model)
    if layout is None:
        check_model(model)  # type: ignore[arg-type]
        blocks = moe_blocks(model)
        num_experts, rule = {block.layer: block.num_experts for block in blocks}, blocks[0].rule
        config, source = model.config, Source(getattr(model, "name_or_path", "") or "")  # type: ignore[union-attr]
    else:
        num_experts, rule = layout.num_experts, layout.spec.routing(layout.config)
        config, source = layout.config, layout.checkpoint.source
    own = tokenizer if tokenizer is not None or not source.name_or_path else source.tokenizer
    heldout = CalibrationSet.build(data, own, max_length=sample_length(max_length, config))
    check_same_samples(processes, heldout)
    meant = model if layout is None else layout
    recipes = [settled(recipe, meant).recipe for recipe in recipes]  # type: ignore[arg-type]
    asked = list(dict.fromkeys(_asked(recipes, fractions, allocations)))
    possible, left_out = _possible(asked, num_experts, rule)
    samples = None
    if calibration is not None and (stats is None or any(item.recipe.measures for item in possible)):
        samples = CalibrationSet.for_recipe(calibration, recipes[0], own, config)
        if domain_weights is not None and stats is None:
            check_domain_weights(samples.samples, domain_weights)
    texts = remembered(stats.provenance) if stats is not None else [] if samples is None else [samples.passages]
    if sentence := overlap_with(texts, heldout).sentence():
        logger.warning("%s", sentence)  # before any work
    if stats is None:
        by_text = [i.recipe for i in possible if i.recipe.needs_text or i.allocation == BY_SENSITIVITY]
        needed = by_text or [possible[0].recipe]
        stats = statistics_for(needed, meant, samples, compute, workspace.part("calibration"))
    check_model_of(stats, fingerprint(blocks) if layout is None else layout.fingerprints())
    by_sensitivity = [item.recipe for item in possible if item.allocation == BY_SENSITIVITY]
    if by_sensitivity and sensitivity is None and samples is not None:
        unique = list({recipe.method: recipe for recipe in by_sensitivity}.values())
        sensitivity = measure_sensitivity(
            meant, samples, unique, stats, domain_weights=domain_weights, sparsities=(), batch_size=batch_size,
            compute=compute, workspace=workspace.part("sensitivity"),
        )  # fmt: skip
    chosen_before: dict[str, PruningPlan] = {}
    if samples is not None:
        by = (stats, samples, sensitivity, domain_weights, compute, workspace.part("choice"))
        chosen_before = _chosen_by_measuring(meant, possible, left_out, *by)
        possible = [item for item in possible if item.name not in left_out]
    chosen = (possible, stats, sensitivity, domain_weights, left_out, meant, source, chosen_before)
    judged, plans, left_out = processes.from_main(lambda: _planned(*chosen))
    results, computing = _judged(model, layout, plans, heldout, batch_size, seed, compute, workspace.part("judged"))
    settings = _settings(heldout, stats, layout, model, compute, max_length) | {"computing_dtype": computing}
    return MethodComparison(Comparison(results, ORIGINAL, settings), judged, plans, left_out)


def check_comparison(
    methods: Methods,
    sparsities: Sequence[float],
    allocations: Sequence[str],
    num_experts: Mapping[int, int],
    rule: RoutingRule,
) -> None:
    """Raise unless at least one of the plans that are asked for can be made, before anything is read.

    Raises:
        RequestError: Why none can.
    """
    for allocation in allocations:
        if allocation not in ALLOCATIONS:
            known = nearest_first(str(allocation), [*ALLOCATIONS])
            raise RequestError(f"allocation {allocation!r} is not known. Known: {known}.")
    _possible(list(_asked(_recipes(methods), sparsities, allocations)), num_experts, rule)


def _recipes(methods: Methods) -> list[MoEPrunerConfig]:
    several = [methods] if isinstance(methods, (str, MoEPrunerConfig)) else list(methods)
    if not several:
        raise RequestError("no method is named.")
    recipes: list[MoEPrunerConfig] = []
    for method in several:
        names = every_method() if method == "all" else [method]
        for name in names:
            recipe = name if isinstance(name, MoEPrunerConfig) else MoEPrunerConfig(method=name)
            recipe = MoEPrunerConfig.from_dict(recipe.to_dict(), num_experts=None, sparsity=None, total_experts=None)
            recipes += [] if recipe in recipes else [recipe]
    return recipes


def _asked(
    recipes: Sequence[MoEPrunerConfig], sparsities: Sequence[float], allocations: Sequence[str]
) -> Iterator[Judged]:
    """What is to be planned, in the order it is shown in: by sparsity, then as the methods were named."""
    names = [recipe.method for recipe in recipes]
    for sparsity in sparsities:
        for place, recipe in enumerate(recipes):
            before = names[:place].count(recipe.method)
            method = recipe.method if before == 0 else f"{recipe.method} #{before + 1}"
            for allocation in allocations or [recipe.allocates]:
                yield Judged(method, allocation, sparsity, recipe)


def _possible(
    asked: Sequence[Judged], num_experts: Mapping[int, int], rule: RoutingRule
) -> tuple[list[Judged], dict[str, str]]:
    """Those whose budget can be kept to, each with a recipe for it; and why not, of the others by name."""
    possible, left_out = [], {}
    for item in asked:
        try:
            values = {"allocation": item.allocation, "sparsity": item.sparsity}
            recipe = MoEPrunerConfig.from_dict(item.recipe.to_dict(), **values)
            budget_for(recipe, num_experts, rule)
            possible.append(replace(item, recipe=recipe))
        except RequestError as error:
            left_out[item.name] = str(error)
    if not possible:
        raise _nothing(left_out)
    return possible, left_out


def _planned(
    possible: Sequence[Judged],
    stats: CalibrationStats,
    sensitivity: Sensitivity | None,
    domain_weights: Mapping[str, float] | None,
    left_out: Mapping[str, str],
    model: Model,
    source: Source,
    chosen: Mapping[str, PruningPlan],
) -> tuple[dict[str, Judged], dict[str, PruningPlan], dict[str, str]]:
    """The plans, by name; and what is left out, with what turns out to be impossible."""
    judged, plans, left_out = {}, {}, dict(left_out)
    parent = source.stored_plan() if isinstance(model, Layout) else None
    needs = {need for item in possible if not item.recipe.needs_text for need in item.recipe.needs}
    empty: CalibrationStats | None = None
    for item in progress(possible, "choosing experts", len(possible), unit="plan"):
        statistics = stats
        if not item.recipe.needs_text and stats.samples:  # a plan that no text had a part in says so
            empty = empty or no_calibration(model, item.recipe.seed, needs)
            statistics = stats if item.allocation == BY_SENSITIVITY else empty
        weights = domain_weights if statistics.samples else None
        measured = sensitivity if item.recipe.measures else None
        try:
            made = chosen.get(item.name) or quiet_plan(statistics, item.recipe, weights, measured)
            plans[item.name] = with_parent(made, parent)
            judged[item.name] = item
        except RequestError as error:
            left_out[item.name] = str(error)
    if not plans:
        raise _nothing(left_out)
    return judged, plans, left_out


def _chosen_by_measuring(
    model: Model,
    items: Sequence[Judged],
    left_out: dict[str, str],
    stats: CalibrationStats,
    samples: CalibrationSet,
    sensitivity: Sensitivity | None,
    domain_weights: Mapping[str, float] | None,
    compute: Compute,
    workspace: Workspace,
) -> dict[str, PruningPlan]:
    """The plans of methods that measure, by name; why there is none is left in ``left_out``."""
    plans: dict[str, PruningPlan] = {}
    alike: dict[str, list[Judged]] = {}
    for item in items:
        if get_method(item.recipe.method).measures:
            alike.setdefault(item.method, []).append(item)
    for number, several in enumerate(alike.values()):
        recipes = [item.recipe for item in several]
        candidates = get_method(recipes[0].method).candidates
        assert candidates is not None
        known = sensitivity is not None and (
            "candidates" not in recipes[0].method_options
            or set(candidates(recipes[0].options())) <= set(sensitivity.methods)
        )
        try:
            found, _ = choose_by_measuring(
                model, recipes, stats, samples, sensitivity if known else None, domain_weights=domain_weights,
                compute=compute, workspace=workspace.part(str(number)),
            )  # fmt: skip
        except RequestError as error:
            left_out |= {item.name: str(error) for item in several}
        else:
            plans |= {item.name: plan for item, plan in zip(several, found, strict=True)}
    return plans


def _nothing(left_out: Mapping[str, str]) -> RequestError:
    name, why = next(iter(left_out.items()))
    more = f" ({len(left_out) - 1} more are not possible either)" if len(left_out) > 1 else ""
    return RequestError(f"nothing can be compared: {name}: {why}{more}")


def _judged(
    model: Model,
    layout: Layout | None,
    plans: Mapping[str, PruningPlan],
    heldout: CalibrationSet,
    batch_size: int,
    seed: int,
    compute: Compute,
    workspace: Workspace,
) -> tuple[dict[str, ModelResult], str]:
    """Results of the plans and, last, of the original; and the precision that was calculated in."""
    processes = compute.together
    retained: dict[str, Retained] = {name: plan.without_heads.retained for name, plan in plans.items()}
    distinct: list[Retained] = [{}]  # the original
    for experts in retained.values():
        distinct += [] if experts in distinct else [experts]
    work: Json = {}
    asked: Json = {"computing_dtype": {"dtype": compute.dtype}}
    if layout is None:
        runner: LayerByLayer = LayerByLayer(model, dtype=compute.precision_of(model))
    else:
        folder = None if workspace.folder is None else own_folder(processes, workspace.folder)
        begun = None if folder is None or workspace.restart else unfinished(folder)
        compute = compute.agreed(layout, *begun_with(begun))
        runner = open_runner(layout, compute)
        work = {"model": identity(layout), "dtype": compute.dtype, "computing_dtype": compute.computing}
        work |= {"device": runner.device.type, "stream": runner.streams, "versions": versions()}
    sums = outcomes(
        runner, heldout, distinct, batch_size=batch_size, work=work, settings=asked, workspace=workspace,
        processes=processes,
    )  # fmt: skip
    original = sums[LOSS][0]
    results = {}
    for name, experts in retained.items():
        row = distinct.index(experts)
        figures = torch.stack([sums[LOSS][row], original, sums[KL][row], sums[AGREEMENT][row]], dim=1)
        evaluation = evaluation_of(heldout, figures, compared=True, seed=seed)
        results[name] = ModelResult(evaluation, overlap=overlap_of(plans[name], heldout))
    results[ORIGINAL] = ModelResult(reference_of(next(iter(results.values())).evaluation))
    return results, dtype_text(runner.dtype)


def _settings(
    heldout: CalibrationSet,
    stats: CalibrationStats,
    layout: Layout | None,
    model: Model,
    compute: Compute,
    max_length: int,
) -> Json:
    name = stats.model.get("name_or_path")
    device = compute.runs_on if layout is not None else str(model.device)  # type: ignore[union-attr]
    dtype = compute.dtype if layout is not None else dtype_text(model.dtype)  # type: ignore[union-attr]
    known = versions()
    settings: Json = {
        "model": os.path.basename(name) if isinstance(name, str) and os.path.isdir(name) else name,
        "calibration_fingerprint": stats.fingerprint[:12],
        "text": ", ".join(heldout.sources),
        "samples_fingerprint": heldout.fingerprint[:12],
        "max_length": max_length,
        "dtype": dtype,
        "device": device,
        **{name: known[name] for name in ("transformers", "torch") if name in known},
    }
    return {key: value for key, value in settings.items() if value is not None}
