# SPDX-License-Identifier: Apache-2.0
"""Measure how far a model can be pruned, and where (``sensitivity``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..architectures.fingerprint import same_routers
from ..calibration.calibrate import Model, layout_of, statistics_for
from ..calibration.samples import CalibrationSet
from ..calibration.shares import check_same_samples
from ..checkpoints.layout import identity
from ..config import MoEPrunerConfig
from ..errors import RequestError, RunError
from ..models.blocks import fingerprint, moe_blocks
from ..models.checks import usable_model
from ..models.layerwise import LayerByLayer
from ..models.memory import Compute, begun_with, open_runner
from ..names import dtype_text
from ..planning.sensitivity import (
    ALL,
    Divergence,
    LayerSensitivity,
    MethodSensitivity,
    ModelSensitivity,
    Retained,
    Sensitivity,
    decisive,
)
from ..processes import Processes, shared
from ..processes.folders import own_folder
from ..progress import working
from ..provenance import now, versions
from ..statistics import passages
from ..statistics.progressive import check_unpruned
from ..statistics.samples import check_domain_weights
from ..statistics.stats import CalibrationStats
from ..storage.growing import unfinished
from ..storage.values import Json, Values
from ..storage.workspace import Workspace
from .divergence import divergences as measure_divergences
from .sensitivity_sets import SPARSITIES, check_grid, layer_sets, whole_plans

logger = logging.getLogger(__name__)

Key = tuple[tuple[int, tuple[int, ...]], ...]


@shared
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
        samples: Of which the first recipe's ``sensitivity_samples`` are measured on. Without ``stats`` the model is
            calibrated on all of them first.
        recipes: A recipe for each method; their budgets and allocations are not used.
        stats: Of the same model, from which the methods choose experts.
        domain_weights: A share for each domain in choosing experts.
        counts: Numbers of experts to measure in each layer; by default all from ``top_k`` up, or twelve of them.
        sparsities: Of whole models, for each allocation a method takes; none for layers alone.
        batch_size: Samples in a forward pass.
        compute: How a checkpoint is run; of a model in memory, in which precision (as for ``calibrate``).
        workspace: Where unfinished work on a checkpoint is kept, and continued by a later call for the same.

    Returns:
        The sensitivity. Whole models by ``allocation="sensitivity"`` are measured as well.

    Raises:
        RequestError: If the statistics are of another model, lack what a method needs, or no number can be measured.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    processes = compute.together
    layout = layout_of(model)
    if layout is None:
        model = usable_model(model)
        blocks = moe_blocks(model)
        num_experts, rule = {block.layer: block.num_experts for block in blocks}, blocks[0].rule
    else:
        num_experts, rule = layout.num_experts, layout.spec.routing(layout.config)
    if domain_weights is not None:
        check_domain_weights(samples.samples if stats is None else stats.samples, domain_weights)
    names = [recipe.method for recipe in recipes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RequestError(f"several recipes are for method {min(twice)!r}; a sensitivity holds one of each method.")
    for recipe in recipes:
        check_grid(recipe, num_experts, rule, counts)
    if stats is None:
        meant = model if layout is None else layout
        stats = statistics_for(recipes, meant, samples, compute, workspace.part("calibration"))
    check_unpruned(stats.provenance, "a sensitivity")
    check_same_samples(processes, samples)
    samples = samples.take(recipes[0].sensitivity_samples)
    settings = (stats, recipes, domain_weights, counts, sparsities)
    if layout is None:
        check_model_of(stats, fingerprint(blocks))
        runner = LayerByLayer(model, dtype=compute.precision_of(model))
        return _measured(_Divergences(runner, samples, batch_size, processes), *settings)
    check_model_of(stats, layout.fingerprints())
    begun = []
    if workspace.folder is not None and not workspace.restart:
        begun = [unfinished(own_folder(processes, workspace.folder / part)) for part in ("layers", "models")]
    compute = compute.agreed(layout, *begun_with(*begun))
    with working("loading the model", None, did="loaded the model"):
        runner = open_runner(layout, compute)
    work = {
        "model": identity(layout),
        "calibration": samples.fingerprint,
        "dtype": compute.dtype,
        "computing_dtype": compute.computing,
        "device": runner.device.type,
        "stream": runner.streams,
        "versions": versions(),
    }
    asked: Json = {"batches": {"batch_size": batch_size}, "plans": _asked(recipes, domain_weights, counts, sparsities)}
    asked |= dict.fromkeys(("calibration", "samples"), samples.settings)
    asked["computing_dtype"] = {"dtype": compute.dtype}
    return _measured(_Divergences(runner, samples, batch_size, processes, work, asked, workspace), *settings)


def _asked(
    recipes: Sequence[MoEPrunerConfig],
    domain_weights: Mapping[str, float] | None,
    counts: Sequence[int] | None,
    sparsities: Sequence[float],
) -> Json:
    """What decides which plans are measured, as settings that a person gave."""
    values = [recipe.to_dict() for recipe in recipes]
    names = ("method_options", "protect", "skip_layers", "protect_super_experts", "count_multiple_of", "seed")
    return {
        "method": [recipe.method for recipe in recipes],
        **{name: values[0][name] for name in names},
        "domain_weights": None if domain_weights is None else dict(domain_weights),
        "counts": None if counts is None else list(counts),
        "sparsities": list(sparsities),
    }


def _measured(
    divergences: _Divergences,
    stats: CalibrationStats,
    recipes: Sequence[MoEPrunerConfig],
    domain_weights: Mapping[str, float] | None,
    counts: Sequence[int] | None,
    sparsities: Sequence[float],
) -> Sensitivity:
    """Layers alone and whole models, then the whole models that follow from what the layers lose."""
    stats = stats.without_heads  # which take no part in the model's own output
    by_tokens = stats.with_domain_weights(domain_weights)
    chosen = divergences.processes.from_main
    sets = chosen(lambda: {r.method: layer_sets(by_tokens, r, counts) for r in recipes})
    plans = chosen(lambda: {r.method: whole_plans(stats, r, sparsities, domain_weights) for r in recipes})
    alone = [{layer: s} for method in sets.values() for layer, by_count in method.items() for s in by_count.values()]
    divergences.add("layers", [*alone, *(retained for method in plans.values() for _, _, retained in method)])
    methods = {}
    for recipe in recipes:
        layers = {
            layer: LayerSensitivity(
                stats.num_experts[layer],
                by_count,
                {count: divergences.kl({layer: experts}) for count, experts in by_count.items()},
            )
            for layer, by_count in sets[recipe.method].items()
        }
        methods[recipe.method] = MethodSensitivity(decisive(recipe), layers)
    provenance = {
        "made": now(),
        "versions": versions(),
        "calibration": stats.fingerprint,
        "samples": divergences.samples.fingerprint,
        "sources": list(divergences.samples.sources),
        passages.KEY: divergences.samples.passages.to_dict(),
        "dtype": dtype_text(divergences.runner.dtype),
        "checkpoint_dtype": dtype_text(divergences.runner.checkpoint_dtype),
        "streamed": divergences.runner.streams,
    }
    weights = None if domain_weights is None else dict(domain_weights)
    sensitivity = Sensitivity(stats.model, divergences.tokens_by_domain, methods, weights, provenance)
    more = chosen(lambda: [whole_plans(stats, r, sparsities, domain_weights, sensitivity) for r in recipes])
    for recipe, found in zip(recipes, more, strict=True):
        plans[recipe.method] += found
    divergences.add("models", [retained for method in plans.values() for _, _, retained in method])
    for name, method in methods.items():
        models = tuple(ModelSensitivity(*plan, divergences.kl(plan[2])) for plan in plans[name])
        methods[name] = replace(method, model=models)
    return sensitivity


def check_model_of(stats: CalibrationStats, found: Json) -> None:
    """Raise unless statistics are of the model with these fingerprints.

    Raises:
        RequestError: If they are of another one.
    """
    if not same_routers(stats.model, found):
        raise RequestError(
            f"the statistics are of another model: its routers have the fingerprint {stats.model['fingerprint'][:12]},"
            f" and those of this model {found['fingerprint'][:12]}."
        )


class _Divergences:
    """Divergences of plans, each plan measured once."""

    def __init__(
        self,
        runner: LayerByLayer,
        samples: CalibrationSet,
        batch_size: int,
        processes: Processes,
        work: Values | None = None,
        settings: Values | None = None,
        workspace: Workspace = Workspace(),
    ) -> None:
        self.runner = runner
        self.samples = samples
        self.processes = processes
        self._batch_size = batch_size
        self._work = work
        self._settings = settings
        self._workspace = workspace
        domains = [sample.domain for sample in samples.samples]
        self._tokens = torch.tensor([sample.num_tokens - 1 for sample in samples.samples], dtype=torch.float64)
        self._rows = {d: [row for row, domain in enumerate(domains) if domain == d] for d in sorted(set(domains))}
        self._num_experts = {block.layer: block.num_experts for block in runner.blocks}
        self._kl: dict[Key, Divergence] = {(): dict.fromkeys([*self._rows, ALL], 0.0)}

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Predicted tokens of each domain."""
        return {domain: int(self._tokens[rows].sum()) for domain, rows in self._rows.items()}

    def add(self, part: str, plans: Sequence[Retained]) -> None:
        """Measure plans that were not measured yet."""
        new = {self._key(plan): plan for plan in plans if self._key(plan) not in self._kl}
        if not new:
            return
        sums = measure_divergences(
            self.runner,
            self.samples,
            list(new.values()),
            batch_size=self._batch_size,
            work=self._work,
            settings=self._settings,
            workspace=self._workspace.part(part),
            processes=self.processes,
        )
        for key, by_sample in zip(new, sums, strict=True):
            self._kl[key] = self._by_domain(by_sample)

    def kl(self, plan: Retained) -> Divergence:
        """The divergence of a plan that was measured."""
        return self._kl[self._key(plan)]

    def _key(self, plan: Retained) -> Key:
        """The layers of a plan that lose experts."""
        return tuple(
            sorted((layer, experts) for layer, experts in plan.items() if len(experts) < self._num_experts[layer])
        )

    def _by_domain(self, sums: Tensor) -> Divergence:
        """The mean over the predicted tokens of each domain, and of all."""
        groups = {**self._rows, ALL: list(range(len(sums)))}
        kl = {name: float(sums[rows].sum() / self._tokens[rows].sum()) for name, rows in groups.items()}
        if not all(map(math.isfinite, kl.values())):
            raise RunError(
                "the divergence of a pruned model is not finite: the model holds NaN or infinite values, or its "
                "precision is too small for its logits."
            )
        return kl
