# SPDX-License-Identifier: Apache-2.0
r"""Mosaic Pruning: cluster experts by what they are good at, keep the best specialist of each cluster.

Mosaic Pruning (MoP), arXiv 2511.19822, AAAI-26. Per layer, to retain :math:`r` of :math:`E` experts:

1. *Generalists*: the :math:`m` experts with the least reconstruction loss, :math:`\arg\min_{|S|=m} L_{recon}(S)`.
2. *Domains*: K-Means on the inputs :math:`x_t` of the MoE block.
3. *Performance vector* of each other expert: :math:`v_{e,j}`, the mean over the tokens of domain :math:`j` of
   :math:`\|f_e(x_t) - F_{all}(x_t)\|^2`, the error of the layer left with this expert alone.
4. *Similarity* :math:`S_{perf}(a,b) = (1 + \rho(v_a, v_b)) / 2` with Spearman's :math:`\rho`.
5. *Ward* clustering of the other experts into :math:`r - m` clusters.
6. *Representative* of each cluster: the highest Activation Variability Score (see ``variability``).

What the paper leaves open, and what is done here:

- :math:`m` is not stated: ``num_generalists``. One generalist is the expert with the least error alone, which needs
  no Gram matrices (``generalists``). The number of domains is :math:`r - m` as published, or
  ``num_domains``.
- Ward works on centroids of vectors, Spearman compares ranks. ``ward="ranks"`` runs Ward on the rank-standardised
  vectors, where the squared Euclidean distance is exactly :math:`2K(1 - \rho)`, so both readings agree.
  ``ward="distances"`` is the literal one: Ward's recurrence on the distances :math:`1 - S_{perf}`, which squares them
  once more.
- With fewer than 3 domains ranks say almost nothing (two domains rank either way round, one not at all); Ward then
  runs on :math:`\log v`, standardised over the experts in each domain. An error of 0, or so small that it is rounding
  (below :math:`10^{-10}` of the domain's largest), counts as the domain's smallest real one: it tells that the expert
  is the best there, but by how many orders of magnitude is chance, and as a logarithm it would outweigh all
  differences between the others.
- K-Means looks for its start among a seeded part of the kept tokens (``clustering.partition``; README of this folder).
- The tree is cut by merge order, so there are always exactly :math:`r - m` clusters.
- Protected experts count as generalists.
- Where a router has groups, of which each keeps the same number of experts, each group's other experts are clustered
  for themselves, into as many clusters as the group still has places; the domains are those of the whole layer.
- Ties go to the lower expert index; domains without tokens are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..progress import working
from ..statistics.needs import Need
from .budget import UniformBudget
from .clustering import Silhouettes, partition
from .generalists import GeneralistOptions, check, generalist_needs, generalist_notes, search_generalists
from .registry import register_method
from .selection import TIE, Selection
from .sets import differing
from .ties import sorted_ties, still_tied
from .variability import variability_scores

if TYPE_CHECKING:
    from torch import Tensor

    from ..statistics.stats import CalibrationStats, LayerStats

_MOST_DOMAINS = 16  # the most that num_domains="auto" tries
_TRIALS = 9  # choices made again, to find ties
_ROUNDING = 1e-10  # of a domain's largest error: float32 outputs agree to 1e-7 at best, and errors are squares


@dataclass(frozen=True)
class Options(GeneralistOptions):
    """Options of ``mosaic``; ``search`` and ``max_sets`` as in ``enumeration``.

    Attributes:
        num_generalists: ``m``, at most the number of retained experts.
        num_domains: Clusters of tokens; None for ``r - m`` as published, ``"auto"`` for the one with the best
            silhouette.
        ward: ``"ranks"`` or ``"distances"``, see above.
    """

    num_generalists: int = 1
    num_domains: int | Literal["auto"] | None = None
    ward: Literal["ranks", "distances"] = "ranks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_domains, int) and self.num_domains < 1:
            raise ValueError(f"num_domains is {self.num_domains}; there must be at least 1.")


def needs(options: Options) -> frozenset[Need]:
    """``GRAM`` only where several generalists are looked for."""
    return frozenset({Need.ROUTING, Need.SINGLE_ERROR, Need.INPUTS}) | generalist_needs(options)


@register_method(
    "mosaic",
    kind="set",
    summary="generalists, and the best specialist of each cluster of experts",
    source="Mosaic Pruning, arXiv 2511.19822",
    formula=(
        "In each layer a few generalists are kept first: the experts that together come nearest to the whole "
        "layer's output. The calibration tokens are grouped into domains by K-Means on the layer's inputs; each "
        "other expert is described by its mean error in each domain when it stands in for the layer alone; "
        "experts whose errors rank alike are clustered (Ward); and of each cluster the expert is kept whose "
        "router probability varies most over tokens (its Kullback-Leibler divergence from an even spread)."
    ),
    needs=needs,
    options=Options,
    check=check,
    tie_advice="more domains (num_domains) tell more experts apart",
    by_layer=True,
)
def mosaic(stats: CalibrationStats, budget: UniformBudget, options: Options) -> Selection:
    """The retained experts."""
    retained, tied = {}, {}
    by_logs: list[int] = []
    fewer: dict[int, int] = {}
    with working("choosing experts (mosaic)", len(budget.num_experts), "layer", "chose experts in") as work:
        for index in work.over(budget.num_experts):
            layer, best = stats.layers[index], search_generalists(stats.layers[index], index, budget, options)
            first, clusters = best.retained, budget.num_experts[index] - len(best.retained)
            found = cluster_layer(layer, first, clusters, budget.seed, options) if clusters else None
            retained[index] = tuple(sorted([*first, *(found.representatives if found else ())]))
            tied[index] = still_tied(best.tied, retained[index])
            if found is None:
                continue
            others = _decided_otherwise(layer, first, found, clusters, options)
            tied[index] |= set(differing([retained[index], *others]))
            made = found.vectors.shape[1]
            if made < 3:
                by_logs.append(index)
            if made < _domains_asked(options, clusters):
                fewer[index] = made
    notes = generalist_notes(budget, options)
    if fewer:
        asked = "as many as specialists" if options.num_domains is None else options.num_domains
        notes += (
            f"mosaic: the kept tokens form fewer domains than asked for ({asked}) in {len(fewer)} of {len(retained)} "
            f"layers, {min(fewer.values())} at least",
        )
    if by_logs:
        notes += (
            "mosaic: with fewer than 3 domains ranks say almost nothing, so experts are compared by log errors in "
            f"{len(by_logs)} of {len(retained)} layers; num_domains sets the number of domains",
        )
    return Selection(retained, notes=notes, ties=sorted_ties(tied))


def _domains_asked(options: Options, clusters: int) -> int:
    """How many domains there are to be; 0 where that is found out."""
    asked = clusters if options.num_domains is None else options.num_domains
    return 0 if asked == "auto" else asked


@dataclass(frozen=True)
class Clusters:
    """Steps 2 to 6 in one layer.

    Attributes:
        experts: Those that are no generalists, C of them; without those of a group that generalists fill.
        domain: Domain of each kept token ``(N,)``.
        vectors: Performance vectors of the experts ``(C, D)``.
        trees: Ward's merges ``(C - 1, 4)``, as scipy writes them; of each group of the router that is clustered.
        label: Cluster of each expert ``(C,)``.
        scores: Activation Variability Score of each expert ``(C,)``, in bits.
        representatives: The expert that stands for each cluster.
    """

    experts: tuple[int, ...]
    domain: np.ndarray
    vectors: np.ndarray
    trees: tuple[np.ndarray, ...]
    label: np.ndarray
    scores: np.ndarray
    representatives: tuple[int, ...]


def cluster_layer(layer: LayerStats, first: tuple[int, ...], clusters: int, seed: int, options: Options) -> Clusters:
    """Cluster a layer's experts and find the best specialist of each cluster.

    Args:
        layer: The layer.
        first: Its generalists, which are left out.
        clusters: How many, at least 1.
        seed: For K-Means.
        options: Of the method.
    """
    domain = token_domains(layer, clusters if options.num_domains is None else options.num_domains, seed)
    vectors, variability = performance_vectors(layer, domain), variability_scores(layer)
    others: list[int] = []
    trees, label, representatives = [], np.zeros(0, dtype=np.int64), []
    for free, places in _free_places(layer, first, clusters):
        others += free
        tree, of_group, chosen = _specialists(free, places, vectors, variability, options.ward)
        trees.append(tree)
        label = np.concatenate([label, label.max(initial=-1) + 1 + of_group])
        representatives += chosen
    scores = variability[others]
    return Clusters(tuple(others), domain, vectors[others], tuple(trees), label, scores, tuple(representatives))


def _free_places(layer: LayerStats, first: tuple[int, ...], clusters: int) -> Iterator[tuple[list[int], int]]:
    """Of each of the router's groups that has places left: the experts that are no generalists, and the places."""
    for group in layer.routing.grouped(range(layer.num_experts), layer.num_experts):
        free = [expert for expert in group if expert not in first]
        places = (len(first) + clusters) // layer.routing.groups - (len(group) - len(free))
        if places > 0:
            yield free, places


def _specialists(
    free: Sequence[int],
    places: int,
    vectors: np.ndarray,
    variability: np.ndarray,
    ward: str,
    noise: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Steps 4 to 6 for some experts, in their order: the tree, the cluster of each, the representatives.

    Args:
        free: The experts.
        places: How many clusters.
        vectors: Performance vectors of all experts ``(E, D)``.
        variability: Their Activation Variability Scores ``(E,)``.
        ward: As in the options.
        noise: Decides between what is equal, in place of the order of the experts.
    """
    tree = ward_tree(vectors[free], ward, noise)
    label, scores = cut(tree, places), _blurred(variability[free], noise)
    chosen = [
        free[max(np.flatnonzero(label == cluster).tolist(), key=lambda row: (scores[row], -row))]
        for cluster in range(places)
    ]
    return tree, label, chosen


def _blurred(values: np.ndarray, noise: np.random.Generator | None) -> np.ndarray:
    """Values, changed by less than what counts as a difference."""
    return values if noise is None else values + TIE * np.abs(values).max() * noise.standard_normal(values.shape)


def _decided_otherwise(
    layer: LayerStats, first: tuple[int, ...], found: Clusters, clusters: int, options: Options
) -> Iterator[tuple[int, ...]]:
    """What is retained in the same domains where other things decide between equals than the numbers of experts.

    Ranks are few, so Ward meets equal distances all the time: which of them it merges first is up to the order that
    experts stand in, and what it does later can but need not depend on that. So ties are found by trying.
    """
    experts = list(found.experts)
    vectors, variability = np.zeros((layer.num_experts, found.vectors.shape[1])), np.zeros(layer.num_experts)
    vectors[experts], variability[experts] = found.vectors, found.scores
    for trial in range(_TRIALS):
        noise = np.random.default_rng(trial) if trial else None
        chosen = list(first)
        for free, places in _free_places(layer, first, clusters):
            chosen += _specialists(free[::-1], places, vectors, variability, options.ward, noise)[2]
        yield tuple(sorted(chosen))


def token_domains(layer: LayerStats, num_domains: int | Literal["auto"], seed: int) -> np.ndarray:
    """Domain of each kept token ``(N,)``, numbered from 0 without gaps, by K-Means on the block's inputs.

    K-Means starts once, among a part of the tokens (``clustering.partition``). Measured on both small models, 8,192
    tokens a layer, with starts among all: the best of ten starts has an inertia lower by 0.3% to 0.8%, takes 6 to 20
    times as long (146 to 1,108 ms a layer), and the pruned models are no better for it. Nats lost with 1, 3, 5 and 10
    starts, means of three seeds: Mixtral, 25% removed, 0.807, 0.816, 0.797, 0.797, and 50%, 2.27, 2.03, 2.03, 2.03;
    Qwen2-MoE 0.073, 0.099, 0.085, 0.088 and 0.330, 0.401, 0.415, 0.359. The retained sets of a layer agree between two
    of six seeds in 40%, 79%, 74%, 90%, and 86%, 86%, 84%, 89% of cases; 12%, 8%, 7%, 8%, and 4%, 3%, 3%, 9%.

    Args:
        layer: The layer; its tokens count with their weights.
        num_domains: The number of clusters, or ``"auto"``: of 2 to 16, the one with the best silhouette on a seeded
            sample.
        seed: For K-Means and the sample.
    """
    from ..statistics.mapped import mapped  # it needs torch

    inputs, weights = mapped(layer.tensors, "inputs"), layer.token_weights.numpy()
    if num_domains != "auto":
        return _domains(inputs, weights, num_domains, seed)
    best, best_score = np.zeros(len(inputs), dtype=np.int64), -np.inf
    silhouettes = Silhouettes(inputs, seed, weights=weights)
    for count in range(2, min(_MOST_DOMAINS, len(inputs) - 1) + 1):
        labels = _domains(inputs, weights, count, seed)
        score = silhouettes.mean(labels)
        if score > best_score:
            best, best_score = labels, score
    return best


def _domains(inputs: Tensor, weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    labels = partition(inputs, min(count, len(inputs)), seed, weights)
    return np.unique(labels, return_inverse=True)[1]  # without the empty ones


def performance_vectors(layer: LayerStats, domain: np.ndarray) -> np.ndarray:
    """Mean single-expert error of each expert in each domain ``(E, D)`` over the kept tokens."""
    error = layer.tensors["token_single_error"].double().numpy()
    weights = layer.token_weights.numpy()
    member = (domain[:, None] == np.arange(domain.max() + 1)) * weights[:, None]
    return (error.T @ member) / member.sum(0)


def ward_tree(vectors: np.ndarray, ward: str = "ranks", noise: np.random.Generator | None = None) -> np.ndarray:
    """Ward's merges of experts by their performance vectors, as scipy's ``linkage`` ``(C - 1, 4)``.

    Args:
        vectors: ``(C, D)``.
        ward: ``"ranks"`` or ``"distances"``.
        noise: Decides between equal distances, in place of the order of the experts.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform
    from scipy.stats import rankdata

    if len(vectors) == 1:
        return np.zeros((0, 4))
    if vectors.shape[1] < 3:
        return linkage(_blurred(log_errors(vectors), noise), method="ward")
    ranks = rankdata(vectors, axis=1)
    if ward == "ranks":
        return linkage(_blurred(_standardised(ranks, axis=1), noise), method="ward")
    # Of whole numbers: ranks of many experts agree alike, and the rounding of a product, which is the processor's,
    # would decide between them.
    twice = 2 * ranks - (vectors.shape[1] + 1)
    size = np.square(twice).sum(axis=1)
    scale = np.sqrt(size[:, None] * size)
    correlation = np.divide(twice @ twice.T, scale, out=np.zeros_like(scale), where=scale > 0)
    distance = np.clip((1 - correlation) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    return linkage(np.abs(_blurred(squareform(distance, checks=False), noise)), method="ward")


def cut(tree: np.ndarray, num_clusters: int) -> np.ndarray:
    """Cluster of each expert ``(C,)``, exactly ``num_clusters`` of them, by the order of merges.

    As scipy's ``cut_tree``, which makes every cut and copies the clusters for each: ten times the time that the tree
    takes. Of merges at one distance those come first that are deeper in the tree, then those further right.
    """
    experts = len(tree) + 1
    parts, heights = tree[:, :2].astype(int).tolist(), tree[:, 2].tolist()
    below = [2 * experts - 2]  # clusters from the root down, from the right to the left
    for cluster in below:
        if cluster >= experts:
            below += reversed(parts[cluster - experts])
    joints = sorted((c - experts for c in reversed(below) if c >= experts), key=heights.__getitem__)
    label = np.arange(experts)
    first = [*range(experts), *[0] * len(tree)]  # expert of each cluster
    for joint in joints[: experts - num_clusters]:
        low, high = sorted(first[cluster] for cluster in parts[joint])
        label[label == high] = first[experts + joint] = low
    return np.unique(label, return_inverse=True)[1]


def log_errors(vectors: np.ndarray) -> np.ndarray:
    """Logarithms of errors ``(C, D)``, in standard deviations from the mean of their domain."""
    return _standardised(np.log(_real_errors(vectors)), axis=0)


def _real_errors(vectors: np.ndarray) -> np.ndarray:
    """Errors ``(C, D)``, those that are 0 or rounding raised to the domain's smallest real one; 1 if none is."""
    real = vectors > _ROUNDING * vectors.max(axis=0)
    smallest = np.where(real, vectors, np.inf).min(axis=0)
    return np.maximum(vectors, np.where(real.any(axis=0), smallest, 1.0))


def _standardised(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean 0 and standard deviation 1 along an axis; what is constant becomes 0."""
    centred = values - values.mean(axis=axis, keepdims=True)
    deviation = centred.std(axis=axis, keepdims=True)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
