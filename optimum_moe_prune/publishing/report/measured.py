# SPDX-License-Identifier: Apache-2.0
"""Measurements as plain arrays: sensitivities and evaluations, which may come from files that a person has edited."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ...errors import RequestError
from .words import plain

ALL = "all"

T = TypeVar("T")


@dataclass(frozen=True)
class LayerCurves:
    """What it costs to prune one layer alone, by one method.

    Attributes:
        method: The method.
        layers: Layers that were measured.
        original: Experts of each.
        counts: Numbers of retained experts, falling.
        kl: By domain, nats per token ``(layers, counts)``; NaN where nothing was measured.
    """

    method: str
    layers: tuple[int, ...]
    original: tuple[int, ...]
    counts: tuple[int, ...]
    kl: dict[str, np.ndarray]


@dataclass(frozen=True)
class ModelCurve:
    """What it costs to prune the whole model, by one method and allocation.

    Attributes:
        method: The method.
        allocation: How the budget was spread over the layers.
        sparsity: Shares of experts removed, rising.
        kl: By domain, nats per token ``(sparsities,)``; NaN where nothing was measured.
    """

    method: str
    allocation: str
    sparsity: np.ndarray
    kl: dict[str, np.ndarray]

    @property
    def label(self) -> str:
        """Method and allocation."""
        return f"{self.method}, {self.allocation}"


@dataclass(frozen=True)
class Sensitivity:
    """Everything that was measured about a model.

    Attributes:
        model: Facts about it.
        tokens: Tokens by domain.
        domains: Names, ``"all"`` first.
        layers: For each method.
        curves: For each method and allocation.
    """

    model: dict[str, Any]
    tokens: dict[str, int]
    domains: tuple[str, ...]
    layers: tuple[LayerCurves, ...]
    curves: tuple[ModelCurve, ...]


@dataclass(frozen=True)
class Judged:
    """One evaluated model.

    Attributes:
        label: What it is called.
        domains: Its figures by domain, ``"all"`` last.
        parameters: How many, if known.
        bytes: Of its tensors, if known.
        generation: Speed and memory of generation.
        tasks: Metrics by task.
    """

    label: str
    domains: dict[str, dict[str, Any]]
    parameters: int | None
    bytes: int | None
    generation: dict[str, float]
    tasks: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """Evaluated models, the reference first if there is one."""

    models: tuple[Judged, ...]
    reference: Judged | None

    @property
    def others(self) -> tuple[Judged, ...]:
        """All but the reference."""
        return tuple(model for model in self.models if model is not self.reference)

    @property
    def domains(self) -> list[str]:
        """Domains of any model, ``"all"`` last."""
        names = dict.fromkeys(name for model in self.models for name in model.domains)
        return sorted(names, key=lambda name: name == ALL)


def read_sensitivity(values: Any) -> Sensitivity:
    """Sensitivities from a mapping, or an object that gives one by ``to_dict()``.

    Raises:
        RequestError: If they are damaged or of a newer format.
    """
    return _read(values, "sensitivity", _sensitivity)


def read_evaluation(values: Any) -> Evaluation:
    """An evaluation from a mapping, or an object that gives one by ``to_dict()``.

    Raises:
        RequestError: If it is damaged or of a newer format.
    """
    return _read(values, "evaluation", _evaluation)


def _read(values: Any, what: str, read: Callable[[Mapping[str, Any]], T]) -> T:
    if not isinstance(values, Mapping):
        values = values.to_dict() if hasattr(values, "to_dict") else values
    try:
        if not isinstance(values, Mapping):
            raise TypeError(f"a {type(values).__name__}")
        if (version := values.get("format_version")) != 1:
            raise RequestError(f"the {what} has format version {version!r}; this package reads up to 1.")
        return read(values)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the {what} is damaged: {error!r}.") from error


def _sensitivity(values: Mapping[str, Any]) -> Sensitivity:
    layers, curves = [], []
    domains = dict.fromkeys([ALL])
    for name, found in values["methods"].items():
        method = plain(name)
        by_layer = sorted((int(layer), entry) for layer, entry in (found.get("layers") or {}).items())
        measured = [(n, {int(c): _numbers(e["kl"]) for c, e in entry["counts"].items()}) for n, entry in by_layer]
        names = dict.fromkeys(d for _, counts in measured for kl in counts.values() for d in kl)
        counts = sorted({count for _, line in measured for count in line}, reverse=True)
        if counts:
            tables = {
                d: np.array([[line.get(c, {}).get(d, math.nan) for c in counts] for _, line in measured])
                for d in names
            }
            original = tuple(int(entry["original_num_experts"]) for _, entry in by_layer)
            layers.append(LayerCurves(method, tuple(n for n, _ in measured), original, tuple(counts), tables))
        points: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for point in found.get("model") or ():
            points.setdefault(plain(point["allocation"]), []).append((float(point["sparsity"]), _numbers(point["kl"])))
        for allocation, line in points.items():
            line.sort(key=lambda point: point[0])
            names |= dict.fromkeys(d for _, kl in line for d in kl)
            tables = {d: np.array([kl.get(d, math.nan) for _, kl in line]) for d in names}
            curves.append(ModelCurve(method, allocation, np.array([s for s, _ in line]), tables))
        domains |= names
    tokens = values.get("samples", {}).get("tokens_by_domain") or {}
    return Sensitivity(
        model=dict(values.get("model") or {}),
        tokens={plain(domain): int(count) for domain, count in tokens.items()},
        domains=tuple(domains),
        layers=tuple(layers),
        curves=tuple(curves),
    )


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    models = {label: _judged(label, found) for label, found in values["models"].items()}
    if not models:
        raise ValueError("there are no models")
    reference = values.get("reference")
    if reference is not None and reference not in models:
        raise ValueError(f"the reference {reference!r} is not among the models")
    chosen = None if reference is None else models[reference]
    others = [model for model in models.values() if model is not chosen]
    return Evaluation(tuple([*([] if chosen is None else [chosen]), *others]), chosen)


def _judged(label: str, found: Mapping[str, Any]) -> Judged:
    domains = {}
    for name, values in (found.get("domains") or {}).items():
        figures: dict[str, Any] = _numbers(values)
        if not figures.get("perplexity", 0) > 0:
            raise ValueError(f"domain {name!r} of {label!r} has no perplexity")
        if (before := figures.get("reference_perplexity", 0)) > 0:
            figures.setdefault("lost", math.log(figures["perplexity"] / before))
        for key in ("lost_interval", "perplexity_difference_interval"):
            if values.get(key) is not None:
                low, high = map(float, values[key])
                figures[key] = (low, high)
        domains[plain(name)] = figures
    parameters, size = found.get("parameters"), found.get("bytes")
    tasks = {plain(task): _numbers(metrics) for task, metrics in (found.get("tasks") or {}).items()}
    return Judged(
        label=plain(label),
        domains=domains,
        parameters=None if parameters is None else int(parameters),
        bytes=None if size is None else int(size),
        generation=_numbers(found.get("generation") or {}),
        tasks=tasks,
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, by plain names."""
    return {
        plain(name): float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
