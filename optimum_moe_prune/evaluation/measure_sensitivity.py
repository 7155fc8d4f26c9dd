# SPDX-License-Identifier: Apache-2.0
"""Measure how far a model can be pruned, and where (``sensitivity``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.routers import RoutingRule
from ..calibration.calibrate import Model, calibrate, layout_of, no_calibration
from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import identity
from ..config import MoEPrunerConfig
from ..errors import RequestError, RunError
from ..methods import BY_SENSITIVITY, get_method
from ..methods.budget import UniformBudget, allowed_counts, checked_layers
from ..models.blocks import fingerprint, moe_blocks
from ..models.checks import check_model
from ..models.layerwise import LayerByLayer
from ..models.memory import Compute, open_runner
from ..planning.build import protected_experts, quiet_plan
from ..planning.sensitivity import (
    ALL,
    LayerSensitivity,
    MethodSensitivity,
    ModelSensitivity,
    Retained,
    Sensitivity,
    decisive,
)
from ..provenance import versions
from ..statistics.samples import check_domain_weights
from ..statistics.stats import CalibrationStats
from ..storage.growing import unfinished
from ..storage.workspace import Workspace
from .divergence import divergences

logger = logging.getLogger(__name__)

SPARSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
"""Of whole models, by default; those that a model has too few experts for are left out."""
MOST_COUNTS = 12
"""Numbers of experts measured in a layer, by default; all of them where there are no more."""

Measured = dict[str, float]
Key = tuple[tuple[int, tuple[int, ...]], ...]


def measure_sensitivity(
    model: Model,
    samples: CalibrationSet,
    recipes: Sequence[MoEPrunerConfig],
    stats: CalibrationStats | None = None,
    *,
    domain_weights: Mapping[str, float] | None = None,
    counts: Sequence[int] | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    batch_size: int = 8,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> Sensitivity:
    """Measure how much is lost when methods prune each layer alone, and whole models over sparsities.

    Args:
        model: The unpruned model, or the folder, Hub id or ``Source`` of one.
        samples: The samples to measure on; without ``stats`` the model is calibrated on them first, and measured on
            the first recipe's ``sensitivity_samples`` of them.
        recipes: A recipe for each method; their budgets and allocations are not used.
        stats: Of the same model, from which the methods choose experts.
        domain_weights: A share for each domain in choosing experts.
        counts: Numbers of experts to measure in each layer; by default all from ``top_k`` up, or twelve of them.
        sparsities: Of whole models, for each allocation a method takes; none for layers alone.
        batch_size: Samples in a forward pass.
        compute: How a checkpoint is run.
        workspace: Where unfinished work on a checkpoint is kept, and continued by a later call for the same.

    Returns:
        The sensitivity. Whole models by ``allocation="sensitivity"`` are measured as well.

    Raises:
        RequestError: If the statistics are of another model, lack what a method needs, or no number can be measured.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    layout = layout_of(model)
    if layout is None:
        check_model(model)  # type: ignore[arg-type]
        blocks = moe_blocks(model)  # type: ignore[arg-type]
        counts_now, rule = {block.layer: block.num_experts for block in blocks}, blocks[0].rule
    else:
        counts_now, rule = layout.num_experts, layout.spec.routing(layout.config)
    if domain_weights is not None:
        check_domain_weights(samples.samples, domain_weights)
    for recipe in recipes:
        check_grid(recipe, counts_now, rule, counts)
    if stats is None:
        stats = _statistics(model if layout is None else layout, samples, recipes, compute, workspace)
        samples = samples.take(recipes[0].sensitivity_samples)
    settings: dict[str, Any] = {
        "domain_weights": domain_weights,
        "counts": counts,
        "sparsities": sparsities,
        "batch_size": batch_size,
    }
    if layout is None:
        check_model_of(stats, fingerprint(blocks))
        return measure_runner(LayerByLayer(model), samples, stats, recipes, **settings)
    check_model_of(stats, layout.fingerprint())
    begun = None
    if workspace.folder is not None and not workspace.restart:
        parts = (unfinished(workspace.folder / part) for part in ("layers", "models"))
        begun = next((bool(there[0].get("stream")) for there in parts if there is not None), None)
    runner = open_runner(layout, compute.settled(layout, begun))
    identity_of_work = {
        "model": identity(layout),
        "calibration": samples.fingerprint,
        "dtype": compute.dtype,
        "device": runner.device.type,
        "stream": runner.streams,
        "versions": versions(),
    }
    return measure_runner(
        runner,
        samples,
        stats,
        recipes,
        of=identity_of_work,
        folder=workspace.folder,
        restart=workspace.restart,
        **settings,
    )


def _statistics(
    model: Model,
    samples: CalibrationSet,
    recipes: Sequence[MoEPrunerConfig],
    compute: Compute,
    workspace: Workspace,
) -> CalibrationStats:
    """Statistics for the recipes' methods; of no calibration where none is needed."""
    if not any(recipe.needs for recipe in recipes):
        return no_calibration(model, recipes[0].seed)
    return calibrate(
        model,
        samples,
        recipes,
        batch_size=recipes[0].batch_size,
        max_tokens=recipes[0].max_tokens,
        seed=recipes[0].seed,
        compute=compute,
        workspace=workspace.part("calibration"),
    )


def measure_runner(
    runner: LayerByLayer,
    calibration: CalibrationSet,
    stats: CalibrationStats,
    configs: Sequence[MoEPrunerConfig],
    *,
    domain_weights: Mapping[str, float] | None = None,
    counts: Sequence[int] | None = None,
    sparsities: Sequence[float] = SPARSITIES,
    batch_size: int = 8,
    folder: Path | None = None,
    of: Mapping[str, Any] | None = None,
    restart: bool = False,
) -> Sensitivity:
    """Measure the divergence of pruned models from the original: layers alone, and whole models over sparsities.

    Args:
        runner: The unpruned model, in memory or on disk.
        calibration: The samples to measure on.
        stats: Of the same model, from which the methods choose experts.
        configs: A recipe for each method; their budgets and allocations are not used.
        domain_weights: A share for each domain in choosing experts.
        counts: Numbers of experts to measure in each layer; by default all from ``top_k`` up, or twelve of them.
        sparsities: Of whole models, for each allocation a method takes; none for layers alone.
        batch_size: Samples in a forward pass.
        folder: Where unfinished work is kept, and continued by a later call for the same.
        of: What the work is of, beside methods and plans: a later call for something else is refused.
        restart: Begin anew, whatever the folder holds.

    Returns:
        The sensitivity. Whole models by ``allocation="sensitivity"`` are measured as well.

    Raises:
        RequestError: If the statistics are of another model, lack what a method needs, or no number can be measured.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    by_tokens = stats.with_domain_weights(domain_weights)
    layers = {c.method: _layer_sets(by_tokens, c, counts) for c in configs}
    whole = {c.method: list(_whole_plans(stats, c, domain_weights, sparsities)) for c in configs}

    measured = _Measured(runner, calibration, batch_size, dict(of or {}), folder, restart)
    alone = [{layer: experts} for sets in layers.values() for layer, of_layer in sets.items() for experts in of_layer]
    measured.add("layers", [*alone, *(retained for plans in whole.values() for _, _, retained in plans)])
    methods = {
        config.method: MethodSensitivity(
            decisive(config),
            {
                layer: LayerSensitivity(
                    stats.num_experts[layer],
                    {len(experts): experts for experts in sets},
                    {len(experts): measured.kl({layer: experts}) for experts in sets},
                )
                for layer, sets in layers[config.method].items()
            },
            tuple(ModelSensitivity(*plan, measured.kl(plan[2])) for plan in whole[config.method]),
        )
        for config in configs
    }
    tokens: dict[str, int] = {}
    for sample in calibration.samples:
        tokens[sample.domain] = tokens.get(sample.domain, 0) + sample.num_tokens - 1
    provenance = {
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "calibration": stats.fingerprint,
        "samples": calibration.fingerprint,
        "sources": list(calibration.sources),
        "dtype": str(runner.dtype).removeprefix("torch."),
        "streamed": runner.streams,
    }
    weights = None if domain_weights is None else dict(domain_weights)
    result = Sensitivity(stats.model, dict(sorted(tokens.items())), methods, weights, provenance)

    by_measured = {c.method: list(_allocated(stats, c, result, sparsities)) for c in configs}
    measured.add("models", [retained for plans in by_measured.values() for _, _, retained in plans])
    for name, plans in by_measured.items():
        added = tuple(ModelSensitivity(*plan, measured.kl(plan[2])) for plan in plans)
        methods[name] = replace(methods[name], model=(*methods[name].model, *added))
    return result


def check_model_of(stats: CalibrationStats, found: str) -> None:
    """Raise unless statistics are of the model with a fingerprint.

    Raises:
        RequestError: If they are of another one.
    """
    if (there := stats.model["fingerprint"]) != found:
        raise RequestError(
            f"the statistics are of another model: its routers have the fingerprint {there[:12]}, and those of this "
            f"model {found[:12]}."
        )


class _Measured:
    """Divergences of plans, each plan measured once."""

    def __init__(
        self,
        runner: LayerByLayer,
        calibration: CalibrationSet,
        batch_size: int,
        of: dict[str, Any],
        folder: Path | None,
        restart: bool,
    ) -> None:
        self._runner = runner
        self._calibration = calibration
        self._batch_size = batch_size
        self._of = of
        self._folder = folder
        self._restart = restart
        self._kl: dict[Key, Measured] = {(): dict.fromkeys([*self._members(), ALL], 0.0)}

    def _members(self) -> dict[str, list[int]]:
        members: dict[str, list[int]] = {}
        for number, sample in enumerate(self._calibration.samples):
            members.setdefault(sample.domain, []).append(number)
        return dict(sorted(members.items()))

    def add(self, what: str, plans: Sequence[Retained]) -> None:
        """Measure plans that were not measured yet."""
        new = {self._key(plan): plan for plan in plans if self._key(plan) not in self._kl}
        if not new:
            return
        sums = divergences(
            self._runner,
            self._calibration,
            list(new.values()),
            batch_size=self._batch_size,
            folder=None if self._folder is None else self._folder / what,
            of=self._of,
            restart=self._restart,
        )
        for key, of_samples in zip(new, sums, strict=True):
            self._kl[key] = self._by_domain(of_samples)

    def kl(self, plan: Retained) -> Measured:
        """The divergence of a plan that was measured."""
        return self._kl[self._key(plan)]

    def _key(self, plan: Retained) -> Key:
        whole = {block.layer: block.num_experts for block in self._runner.blocks}
        return tuple(sorted((layer, experts) for layer, experts in plan.items() if len(experts) < whole[layer]))

    def _by_domain(self, sums: Tensor) -> Measured:
        """The mean over the predicted tokens of each domain, and of all."""
        tokens = torch.tensor([sample.num_tokens - 1 for sample in self._calibration.samples], dtype=torch.float64)
        groups = {**self._members(), ALL: list(range(len(tokens)))}
        kl = {name: float(sums[rows].sum() / tokens[rows].sum()) for name, rows in groups.items()}
        if not all(map(math.isfinite, kl.values())):
            raise RunError(
                "the divergence of a pruned model is not finite: the model holds NaN or infinite values, or its "
                "precision is too small for its logits."
            )
        return kl


# ------------------------------------------------------------------------------------------- what to measure


def _layer_sets(
    stats: CalibrationStats, config: MoEPrunerConfig, counts: Sequence[int] | None
) -> dict[int, list[tuple[int, ...]]]:
    """The sets of experts to measure in each layer, fewest first."""
    method, options = get_method(config.method), config.options()
    if config.needs and not stats.samples:
        raise RequestError(f"method {method.name!r} needs a calibration; give calibration texts.")
    stats.require(config.needs, method.name)
    protect, _ = protected_experts(stats, config)
    grid = check_grid(config, stats.num_experts, stats.routing, counts, protect)
    layers = {layer: stats.num_experts[layer] for layer in grid}
    protected = {layer: tuple(sorted(protect.get(layer, ()))) for layer in layers}
    sets: dict[int, list[tuple[int, ...]]] = {layer: [] for layer in layers}
    for count in sorted({count for values in grid.values() for count in values}):
        num_experts = {layer: count if count in grid[layer] else layers[layer] for layer in layers}
        budget = UniformBudget(
            layers, sum(num_experts.values()), stats.routing, protected, config.seed, num_experts=num_experts
        )
        try:
            if method.check is not None:
                method.check(budget, options)
        except RequestError as error:
            logger.warning("%s: %d experts a layer are not measured: %s", method.name, count, error)
            continue
        retained = method.select(stats, budget, options).retained
        for layer in layers:
            if count in grid[layer]:
                sets[layer].append(retained[layer])
    return sets


def check_grid(
    config: MoEPrunerConfig,
    num_experts: Mapping[int, int],
    rule: RoutingRule,
    counts: Sequence[int] | None = None,
    protect: Mapping[int, Iterable[int]] | None = None,
) -> dict[int, list[int]]:
    """Numbers of experts to measure, by layer.

    Args:
        config: The recipe.
        num_experts: Experts in each MoE layer.
        rule: How the routers choose.
        counts: Those asked for; by default all, or twelve of them.
        protect: In place of the recipe's own.

    Raises:
        RequestError: If the method takes no number for each layer, the recipe names a layer or expert that is not
            there, or none can be measured.
    """
    if BY_SENSITIVITY not in get_method(config.method).takes:
        raise RequestError(f"method {config.method!r} takes no number of experts for each layer; it is not measured.")
    protect = config.protect if protect is None else protect
    layers, protected = checked_layers(
        num_experts, {layer: tuple(experts) for layer, experts in protect.items()}, config.skip_layers
    )
    grid = {
        layer: _grid(allowed_counts(rule, count, len(protected[layer]))[:-1], counts)
        for layer, count in layers.items()
    }
    measurable = {count for values in grid.values() for count in values}
    if not measurable:
        raise RequestError(
            "no number of experts can be measured"
            + (f" of {', '.join(map(str, counts))}" if counts else "")
            + f"; each layer keeps at least the {rule.fewest} that every token uses and those protected, and at most "
            "one less than it has."
        )
    if left_out := sorted(set(counts or ()) - measurable):
        logger.warning("%s experts in a layer cannot be measured and are left out.", ", ".join(map(str, left_out)))
    return grid


def _grid(allowed: Sequence[int], counts: Sequence[int] | None) -> list[int]:
    """Numbers of experts to measure in a layer: of those allowed the ones asked for, or evenly spaced ones.

    Evenly from above, so that they add up to round budgets.
    """
    if counts is not None:
        return sorted(set(counts) & set(allowed))
    step = max(1, -(-len(allowed) // MOST_COUNTS))
    return sorted({*allowed[-step::-step], *allowed[:1]})


def _whole_plans(
    stats: CalibrationStats,
    config: MoEPrunerConfig,
    domain_weights: Mapping[str, float] | None,
    sparsities: Sequence[float],
) -> list[tuple[str, float, Retained]]:
    """Allocation, sparsity and experts of the plans that a method makes of its own."""
    plans = []
    level = logging.INFO if tuple(sparsities) == SPARSITIES else logging.WARNING  # whoever asked for it is told
    for allocation in sorted(get_method(config.method).allocations, reverse=True):
        for sparsity in sparsities:
            try:
                plan = quiet_plan(stats, _at(config, allocation, sparsity), domain_weights)
            except RequestError as error:
                logger.log(
                    level, "%s, %s: sparsity %g is not measured: %s", config.method, allocation, sparsity, error
                )
                continue
            plans.append((allocation, sparsity, plan.retained))
    return plans


def _allocated(
    stats: CalibrationStats, config: MoEPrunerConfig, sensitivity: Sensitivity, sparsities: Sequence[float]
) -> list[tuple[str, float, Retained]]:
    """Allocation, sparsity and experts of the plans that follow from the layers' divergences."""
    plans = []
    for sparsity in sparsities:
        try:
            plan = quiet_plan(stats, _at(config, BY_SENSITIVITY, sparsity), sensitivity.domain_weights, sensitivity)
        except RequestError as error:
            logger.info("%s, by sensitivity: sparsity %g is not measured: %s", config.method, sparsity, error)
            continue
        plans.append((BY_SENSITIVITY, sparsity, plan.retained))
    return plans


def _at(config: MoEPrunerConfig, allocation: str, sparsity: float) -> MoEPrunerConfig:
    return replace(config, num_experts=None, total_experts=None, sparsity=sparsity, allocation=allocation)
