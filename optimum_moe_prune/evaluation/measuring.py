# SPDX-License-Identifier: Apache-2.0
"""A model that plans are measured on, the divergences of its plans, and what single layers lose by them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..config import MoEPrunerConfig
from ..errors import RunError
from ..models.layerwise import LayerByLayer
from ..names import dtype_text
from ..planning.sensitivity import (
    ALL,
    Divergence,
    LayerSensitivity,
    MethodSensitivity,
    Retained,
    Sensitivity,
    decisive,
)
from ..processes import Processes
from ..provenance import now, versions
from ..statistics import passages
from ..statistics.stats import CalibrationStats
from ..storage.values import Json
from ..storage.workspace import Workspace
from .divergence import divergences as measure_divergences

Key = tuple[tuple[int, tuple[int, ...]], ...]

Sets = Mapping[int, Mapping[int, tuple[int, ...]]]
"""Experts by layer and number of experts."""


@dataclass(frozen=True)
class Subject:
    """A model that plans are measured on.

    Attributes:
        runner: Runs it.
        batch_size: Samples in a forward pass.
        processes: Those that share the work.
        work: What else decides about the numbers; None where nothing is kept.
        asked: What of that follows from, by setting.
        workspace: Where unfinished work is kept.
    """

    runner: LayerByLayer
    batch_size: int
    processes: Processes
    work: Json | None = None
    asked: Json = field(default_factory=dict)
    workspace: Workspace = Workspace()


class Divergences:
    """Divergences of plans on some samples, each plan measured once."""

    def __init__(self, subject: Subject, samples: CalibrationSet) -> None:
        self.subject = subject
        self.samples = samples
        self._tokens = torch.tensor([sample.num_tokens - 1 for sample in samples.samples], dtype=torch.float64)
        self._num_experts = {block.layer: block.num_experts for block in subject.runner.blocks}
        self._sums: dict[Key, Tensor] = {(): torch.zeros(len(samples), dtype=torch.float64)}

    @property
    def tokens_by_domain(self) -> dict[str, int]:
        """Predicted tokens of each domain."""
        return self.tokens_of(None)

    def tokens_of(self, hashes: Collection[str] | None) -> dict[str, int]:
        """Predicted tokens of each domain, of the samples with these hashes, or of all."""
        return {name: int(self._tokens[rows].sum()) for name, rows in self._rows(hashes).items() if name != ALL}

    def add(self, part: str, plans: Sequence[Retained]) -> None:
        """Measure plans that were not measured yet."""
        new = {self._key(plan): plan for plan in plans if self._key(plan) not in self._sums}
        if not new:
            return
        subject, samples = self.subject, self.samples
        work = subject.work and {**subject.work, "calibration": samples.fingerprint}
        sums = measure_divergences(
            subject.runner,
            samples,
            list(new.values()),
            batch_size=subject.batch_size,
            work=work,
            settings=work and {**subject.asked, **dict.fromkeys(("calibration", "samples"), samples.settings)},
            workspace=subject.workspace.part(part),
            processes=subject.processes,
        )
        for key, by_sample in zip(new, sums, strict=True):
            if not bool(torch.isfinite(by_sample).all()):
                raise RunError(
                    "the divergence of a pruned model is not finite: the model holds NaN or infinite values, or its "
                    "precision is too small for its logits."
                )
            self._sums[key] = by_sample

    def kl(self, plan: Retained, hashes: Collection[str] | None = None) -> Divergence:
        """The divergence of a plan that was measured: the mean over the predicted tokens of each domain, and of all.

        Args:
            plan: The plan.
            hashes: Of samples that count alone; where there are none, there is no divergence.
        """
        sums = self._sums[self._key(plan)]
        rows = self._rows(hashes)
        if not rows[ALL]:
            return {}
        return {name: float(sums[own].sum() / self._tokens[own].sum()) for name, own in rows.items()}

    def _key(self, plan: Retained) -> Key:
        """The layers of a plan that lose experts."""
        known = self._num_experts
        return tuple(sorted((n, experts) for n, experts in plan.items() if n in known and len(experts) < known[n]))

    def _rows(self, hashes: Collection[str] | None = None) -> dict[str, list[int]]:
        """The samples of each domain, and all."""
        rows: dict[str, list[int]] = {}
        for row, sample in enumerate(self.samples.samples):
            if hashes is None or sample.hash in hashes:
                rows.setdefault(sample.domain, []).append(row)
        return {**dict(sorted(rows.items())), ALL: sorted(row for own in rows.values() for row in own)}


def measured_layers(
    divergences: Divergences, stats: CalibrationStats, sets: Mapping[str, Sets], recipes: Sequence[MoEPrunerConfig]
) -> dict[str, MethodSensitivity]:
    """What each layer loses alone by sets that were measured.

    Args:
        divergences: What was measured.
        stats: Of the model.
        sets: Of each method.
        recipes: Of each method.
    """
    return {
        recipe.method: MethodSensitivity(
            decisive(recipe),
            {
                layer: LayerSensitivity(
                    stats.num_experts[layer],
                    dict(by_count),
                    {count: divergences.kl({layer: experts}) for count, experts in by_count.items()},
                )
                for layer, by_count in sets[recipe.method].items()
            },
        )
        for recipe in recipes
    }


def sensitivity_of(
    divergences: Divergences,
    stats: CalibrationStats,
    methods: dict[str, MethodSensitivity],
    domain_weights: Mapping[str, float] | None,
) -> Sensitivity:
    """What was measured, with where it comes from."""
    runner, samples = divergences.subject.runner, divergences.samples
    provenance = {
        "made": now(),
        "versions": versions(),
        "calibration": stats.fingerprint,
        "samples": samples.fingerprint,
        "sources": list(samples.sources),
        passages.KEY: samples.passages.to_dict(),
        "dtype": dtype_text(runner.dtype),
        "checkpoint_dtype": dtype_text(runner.checkpoint_dtype),
        "streamed": runner.streams,
    }
    weights = None if domain_weights is None else dict(domain_weights)
    return Sensitivity(stats.model, divergences.tokens_by_domain, methods, weights, provenance)
