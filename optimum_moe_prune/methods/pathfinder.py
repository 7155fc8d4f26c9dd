# SPDX-License-Identifier: Apache-2.0
r"""MoE Pathfinder: keep the experts on the best paths through the whole network, a different number in each layer.

MoE Pathfinder, arXiv 2512.18425. For one calibration sample, MoE layer :math:`l` and expert :math:`i`:

- routing probability :math:`p_i`: the mean over the sample's tokens of the router's probability over all experts;
- activation strength :math:`a_i`: the mean over its tokens of :math:`\|f_i(x)\|_2`, every expert run on every token;
- reconstruction loss :math:`L_i = \|F_{\{i\}} - F_{all}\|_F`, the layer left with this expert alone, over its tokens;
- importance :math:`e_i = \mathrm{softmax}_i(-L_i / (\tau \|F_{all}\|_F))`;
- transition :math:`t_{ij} = a_i^{(l)} p_j^{(l+1)}` between adjacent MoE layers (dense layers are skipped).

The weight of a path, one expert in each MoE layer, is the product of the transitions and importances along it. The
experts on the :math:`m` best paths of each sample, all samples together, are retained.

What the paper leaves open, and what is done here:

- :math:`L_i` is divided by :math:`\|F_{all}\|_F`, so that one temperature :math:`\tau` serves all layers and sample
  lengths. Everything is computed in logarithms.
- The budget: :math:`m` grows from 1 to ``num_paths`` while the experts on the paths fit into it. What is left is
  filled (or, where the single best paths are too many, trimmed) by participation: how many paths an expert is on, up
  to the first :math:`m` that no longer fits. Ties go by the weight of the best path through the expert, relative to
  the sample's best: in the sample where it is largest, then summed over samples (experts on best paths all have 1 in
  some sample); only then to the lower expert and the lower layer. Every layer keeps at least ``top_k`` experts. With
  ``allocation="uniform"`` the same order decides in each layer.
- With sums over a sample's tokens, :math:`t_{ij}` is a product of one factor for each layer, and no transition
  depends on where it comes from. ``transitions="conditional"`` is :math:`t_{ij} = a_i c_{ij}`, with :math:`c_{ij}` the
  mean of :math:`p_j^{(l+1)}` over the tokens that layer :math:`l` routed to :math:`i`; :math:`p_j` if there are none.
- Every sample counts once; with ``domain_weights`` the samples of a domain share its weight equally.
- A layer whose output is 0 on a sample has a uniform :math:`e`. A path through an expert with :math:`a_i = 0` has
  weight 0 and is no path; where all experts of a layer have 0, their factor says nothing and is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import log_softmax

from ..progress import progress
from ..statistics.stats import CalibrationStats, Need
from .budget import Budget, choose_ranked
from .paths import k_best_paths, max_marginals
from .registry import Retained, register_method

Transitions = Literal["mean", "conditional"]
GLOBAL_FIRST = ("global", "uniform")
MOST_PATHS = 10_000
_DIGITS = 9  # participation and path weights are compared to so many decimals, beyond are rounding errors


@dataclass(frozen=True)
class PathOptions:
    """How many paths are looked at.

    Attributes:
        num_paths: The most paths of a sample, ``m``; at most 10,000.
    """

    num_paths: int = 500

    def __post_init__(self) -> None:
        if not 1 <= self.num_paths <= MOST_PATHS:
            raise ValueError(f"num_paths is {self.num_paths}; there must be at least 1 and at most {MOST_PATHS}.")


@dataclass(frozen=True)
class ImportanceOptions(PathOptions):
    """Options of methods that use the importance; ``num_paths`` as in ``PathOptions``.

    Attributes:
        tau: The temperature: small, and only the expert with the least error counts; large, and all count the same.
    """

    tau: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1e-6 <= self.tau <= 1e6:
            raise ValueError(f"tau is {self.tau}; it must be between 1e-6 and 1e6.")


@dataclass(frozen=True)
class TransitionOptions(PathOptions):
    """Options of methods that use transitions; ``num_paths`` as in ``PathOptions``.

    Attributes:
        transitions: ``"mean"`` as published, or ``"conditional"``, see ``pathfinder``.
    """

    transitions: Transitions = "mean"


@dataclass(frozen=True)
class Options(TransitionOptions, ImportanceOptions):
    """Options of ``pathfinder``: those of both factors."""


def transition_needs(options: Any) -> frozenset[Need]:
    """What transitions are made of."""
    conditional = {Need.COACTIVATION} if options.transitions == "conditional" else set()
    return frozenset({Need.ROUTING, Need.DENSE_NORMS} | conditional)


def needs(options: Options) -> frozenset[Need]:
    """Those of the transitions and of the importance."""
    return transition_needs(options) | {Need.SINGLE_ERROR}


@register_method(
    "pathfinder",
    kind="set",
    summary="the experts on the best paths through the whole network",
    source="MoE Pathfinder, arXiv 2512.18425",
    formula=(
        "Each layer's experts are nodes of a graph. The weight of a path through the network is the product, over "
        "its layers, of the importance of each expert (a softmax of minus its error when it stands in for the "
        "layer alone) and of the transitions between neighbouring layers (the mean norm of one expert's output "
        "times the router's mean probability of the next). For each calibration sample the best paths are found "
        "exactly; experts on them are kept until the budget is full."
    ),
    needs=needs,
    options=Options,
    allocations=GLOBAL_FIRST,
)
def pathfinder(stats: CalibrationStats, budget: Budget, options: Options) -> Retained:
    """Retained experts ``{layer: experts}``."""
    importance = log_importance(stats, budget, options.tau)
    return on_best_paths(stats, budget, importance, log_transitions(stats, options.transitions), options.num_paths)


def log_importance(stats: CalibrationStats, budget: Budget, tau: float) -> list[np.ndarray]:
    """Logarithms of the importance of each expert for each sample ``(S, E)``, by MoE layer.

    The mean entropy of the importance in each layer, as a share of the largest possible, goes to the budget's
    findings: near 1 it tells experts apart no more.
    """
    found = []
    shares = {}
    for index, layer in sorted(stats.layers.items()):
        error = np.sqrt(layer.tensors["single_error"].double().numpy())
        output = np.sqrt(layer.tensors["output_energy"].double().numpy())
        relative = np.divide(error, output, out=np.zeros_like(error), where=output > 0)
        importance = log_softmax(-relative / tau, axis=1)
        entropy = -(np.exp(importance) * importance).sum(axis=1)
        shares[str(index)] = round(float(entropy.mean() / np.log(max(2, layer.num_experts))), 4)
        found.append(importance)
    budget.findings["importance_entropy"] = shares
    return found


def log_transitions(stats: CalibrationStats, transitions: Transitions) -> Callable[[int], list[np.ndarray]]:
    """Logarithms of the transitions between adjacent MoE layers.

    Returns:
        A function from the number of a sample to its transitions, ``(E_l, E_{l+1})`` each, one fewer than layers. All
        samples' at once would take ``S L E^2`` numbers.
    """
    tokens = np.array([sample.num_tokens for sample in stats.samples], dtype=np.float64)[:, None]
    layers = [layer for _, layer in sorted(stats.layers.items())]
    strength = [_strength(layer.tensors["dense_norm"].double().numpy() / tokens) for layer in layers[:-1]]
    probability = [_log(layer.tensors["probability"].double().numpy() / tokens) for layer in layers[1:]]
    if transitions == "mean":
        return lambda sample: [a[sample][:, None] + p[sample] for a, p in zip(strength, probability, strict=True)]
    routed = [layer.tensors["routed_tokens"].numpy() for layer in layers[:-1]]
    together = [layer.tensors["coactivation"].numpy() for layer in layers[1:]]

    def of_sample(sample: int) -> list[np.ndarray]:
        found = []
        for a, p, n, c in zip(strength, probability, routed, together, strict=True):
            count = n[sample][:, None]
            mean = _log(c[sample] / np.maximum(count, 1))
            found.append(a[sample][:, None] + np.where(count > 0, mean, p[sample]))
        return found

    return of_sample


def _strength(norms: np.ndarray) -> np.ndarray:
    """Log activation strengths ``(S, E)``; 0 for a sample on which no expert of the layer is active."""
    return _log(np.where(norms.any(axis=1, keepdims=True), norms, 1.0))


def _log(values: np.ndarray) -> np.ndarray:
    """Logarithms; minus infinity for 0, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(values)


def on_best_paths(
    stats: CalibrationStats,
    budget: Budget,
    nodes: Sequence[np.ndarray] | None,
    edges: Callable[[int], list[np.ndarray]] | None,
    num_paths: int,
) -> Retained:
    """The experts on the best paths of each sample, as many as the budget keeps.

    Args:
        stats: The samples and layers.
        budget: How many; its findings tell how the paths fitted into it.
        nodes: Log weights ``(S, E_l)`` of each MoE layer's experts; None for 0.
        edges: Gives the log weights ``(E_l, E_{l+1})`` between adjacent MoE layers for a sample; None for 0.
        num_paths: The most paths of a sample.
    """
    layers = sorted(stats.layers)
    counts = [stats.num_experts[layer] for layer in layers]
    weights = _sample_weights(stats)
    paths = []  # of each sample (m, L)
    best = [np.full(count, -np.inf) for count in counts]
    total = [np.zeros(count) for count in counts]
    for number, (v, e) in enumerate(_sample_graphs(stats, nodes, edges)):
        paths.append(k_best_paths(v, e, num_paths)[1].astype(np.int32))
        for column, marginal in enumerate(max_marginals(v, e)):
            best[column] = np.maximum(best[column], marginal)
            total[column] += weights[number] * np.exp(marginal)
    if without := sum(len(p) == 0 for p in paths):
        budget.note(f"{without} of {len(paths)} samples have no path: all meet an expert of activity or probability 0")

    entry = {layer: _first_path(paths, column, counts[column]) for column, layer in enumerate(layers)}
    grown = _grown(entry, budget, num_paths)
    looked_at = min(grown + 1, num_paths)
    keys = {}
    for column, layer in enumerate(layers):
        participation = np.zeros(counts[column])
        for sample_paths, weight in zip(paths, weights, strict=True):
            np.add.at(participation, sample_paths[:looked_at, column], weight)
        order = zip(
            (entry[layer] >= grown).tolist(),
            (-participation.round(_DIGITS)).tolist(),
            (-best[column].round(_DIGITS)).tolist(),
            (-total[column].round(_DIGITS)).tolist(),
            strict=True,
        )
        keys[layer] = list(order)
    on_paths = sum(int((entry[layer] < max(grown, 1)).sum()) for layer in budget.original)
    if not grown:
        budget.note(
            f"the single best paths of {len(paths)} samples use {on_paths} experts, more than the budget of "
            f"{budget.total} holds: the experts on the most of them are kept"
        )
    budget.findings.update(paths_per_sample=grown, experts_on_paths=on_paths, samples=len(paths))
    return choose_ranked(keys, budget)


def best_paths(stats: CalibrationStats, budget: Budget, options: PathOptions, num_paths: int) -> Iterator[np.ndarray]:
    """The best paths of each sample: the expert of each MoE layer on each path ``(m, L)``, the best path first.

    Args:
        stats: The samples and layers.
        budget: Its findings get the entropy of the importance.
        options: Of ``pathfinder``, ``importance`` or ``transition``: they say which factors a path is weighed by.
        num_paths: The most paths of a sample; fewer come where there are fewer.
    """
    nodes = log_importance(stats, budget, options.tau) if isinstance(options, ImportanceOptions) else None
    edges = log_transitions(stats, options.transitions) if isinstance(options, TransitionOptions) else None
    for v, e in _sample_graphs(stats, nodes, edges):
        yield k_best_paths(v, e, num_paths)[1]


def _sample_graphs(
    stats: CalibrationStats, nodes: Sequence[np.ndarray] | None, edges: Callable[[int], list[np.ndarray]] | None
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """For each sample the log weights of its nodes ``(E_l,)`` and edges ``(E_l, E_{l+1})``; see ``on_best_paths``."""
    counts = [count for _, count in sorted(stats.num_experts.items())]
    for number in progress(range(len(stats.samples)), "finding paths", unit="sample"):
        v = [np.zeros(count) for count in counts] if nodes is None else [layer[number] for layer in nodes]
        e = [np.zeros(pair) for pair in itertools.pairwise(counts)] if edges is None else edges(number)
        yield v, e


def _sample_weights(stats: CalibrationStats) -> np.ndarray:
    """What each sample counts ``(S,)``: 1, or an equal part of its domain's weight; 1 on average."""
    domains = [sample.domain for sample in stats.samples]
    if stats.domain_weights is None:
        return np.ones(len(domains))
    share = np.array([stats.domain_weights[domain] / domains.count(domain) for domain in domains])
    return share / share.mean()


def _first_path(paths: Sequence[np.ndarray], column: int, count: int) -> np.ndarray:
    """The rank, from 0, of the first path of any sample through each expert of a layer; infinity for none."""
    first = np.full(count, np.inf)
    for sample_paths in paths:
        np.minimum.at(first, sample_paths[:, column], np.arange(len(sample_paths)))
    return first


def _grown(entry: dict[int, np.ndarray], budget: Budget, num_paths: int) -> int:
    """The most paths of each sample whose experts, with the protected and the floor, fit into the budget; or 0."""
    size = np.zeros(num_paths, dtype=np.int64)
    for layer in budget.original:
        others = np.delete(entry[layer], list(budget.protected[layer]))
        ranks = np.sort(others)
        held = np.searchsorted(ranks, np.arange(num_paths), side="right") + len(budget.protected[layer])
        size += np.maximum(held, budget.floor)
    return int((size <= budget.total).sum())
