# SPDX-License-Identifier: Apache-2.0
r"""MoE Pathfinder: keep the experts on the best paths through the whole network, a different number in each layer.

MoE Pathfinder, arXiv 2512.18425. For one calibration sample, MoE layer :math:`l` and expert :math:`i`:

- routing probability :math:`p_i`: the mean over the sample's tokens of the router's probability over all experts;
- activation strength :math:`a_i`: the mean over its tokens of :math:`\|f_i(x)\|_2`, every expert run on every token;
- reconstruction loss :math:`L_i = \|F_{\{i\}} - F_{all}\|_F`, the layer left with this expert alone, over its tokens;
- importance :math:`e_i`: the less its error, the larger; in the paper :math:`\mathrm{softmax}_i(-L_i / \tau)`;
- transition :math:`t_{ij} = a_i^{(l)} p_j^{(l+1)}` between adjacent MoE layers (dense layers are skipped).

The weight of a path, one expert in each MoE layer, is the product of the transitions and importances along it. The
experts on the :math:`m` best paths of each sample, all samples together, are retained.

What the paper leaves open, and what is done here:

- The temperature :math:`\tau`. The paper's importance is ``error="published"``, and needs one for each model and
  length of samples; ``error="relative"`` divides :math:`L_i` by :math:`\|F_{all}\|_F`. Both judge an expert with the
  weight that the router gives it when it is alone, 1 in most models: where the router does not renormalise, what the
  layer adds up to is far less, all errors are about :math:`\|f_i\|`, and the smallest outputs are called important. By
  default (``error="explained"``) an expert is judged by the share of the output's energy that it explains, see
  ``alone``. Everything is computed in logarithms.
- The budget: :math:`m` grows from 1 to ``num_paths`` while the experts on the paths fit into it. What is left is
  filled (or, where the single best paths are too many, trimmed) by participation: how many paths an expert is on, up
  to the first :math:`m` that no longer fits. Ties go by the weight of the best path through the expert, relative to
  the sample's best: in the sample where it is largest, then summed over samples (experts on best paths all have 1 in
  some sample); only then to the lower expert and the lower layer. Every layer keeps at least ``top_k`` experts. With
  ``allocation="uniform"`` the same order decides in each layer. Where a layer's numbers lie in steps (groups of the
  router, ``count_multiple_of``), a step is judged by the sums over its experts, so those on the paths still come
  first; and paths fit if the steps do that hold their experts.
- With sums over a sample's tokens, :math:`t_{ij}` is a product of one factor for each layer, and no transition
  depends on where it comes from. ``transitions="conditional"`` is :math:`t_{ij} = a_i c_{ij}`, with :math:`c_{ij}` the
  mean of :math:`p_j^{(l+1)}` over the tokens that layer :math:`l` routed to :math:`i`; :math:`p_j` if there are none.
- Every sample counts once; with ``domain_weights`` the samples of a domain share its weight equally.
- The first layer's :math:`p` and the last one's :math:`a` are in no transition. ``ends="all"`` lets them weigh, as the
  authors' code does, and is the default beside ``error="explained"``.
- The authors' code also keeps, or leaves out, experts whose score lies 3 interquartile ranges out. ``outliers=3`` does
  so, whatever paths they are on; the score is here the mean over samples of the logarithms of an expert's own factors
  :math:`e_i a_i p_i`, those that the method has.
- A path through an expert with :math:`a_i = 0` has weight 0 and is no path; where all experts of a layer have 0, their
  factor says nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..statistics.needs import Need
from .alone import Error, error_of, holds_tokens, log_importance
from .budget import Budget
from .path_selection import Importance, Outliers, find_outliers, node_weights, on_best_paths, sample_weights
from .path_selection import Transitions as LogTransitions
from .registry import register_method
from .selection import Selection

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats

Transitions = Literal["mean", "conditional"]
Ends = Literal["inner", "all"]
GLOBAL_FIRST = ("global", "uniform")
MOST_PATHS = 10_000
_LEAST_LOG = -700.0  # what is never on a path counts so in a mean
OF_AN_EARLIER_VERSION = (
    "these statistics are of an earlier version and hold no norms of single tokens, so paths weigh what they did "
    "then: importance by the relative error"
)


@dataclass(frozen=True)
class PathOptions:
    """How many paths are looked at.

    Attributes:
        num_paths: The most paths of a sample, ``m``; at most 10,000.
        outliers: So many interquartile ranges beyond the quartiles of its layer's scores an expert is kept before all
            others, or after them; ``none`` leaves it to the paths.
    """

    num_paths: int = 500
    outliers: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_paths <= MOST_PATHS:
            raise ValueError(f"num_paths is {self.num_paths}; there must be at least 1 and at most {MOST_PATHS}.")
        if self.outliers is not None and not 0 <= self.outliers <= 1e6:
            raise ValueError(f"outliers is {self.outliers}; it must be none, or between 0 and 1e6.")


@dataclass(frozen=True)
class ImportanceOptions(PathOptions):
    """Options of methods that use the importance; others as in ``PathOptions``.

    Attributes:
        error: What an expert alone is judged by: ``"explained"``, ``"relative"``, or, as in the paper,
            ``"published"``; see ``alone``. ``none`` is ``"explained"``, or ``"relative"`` where there is a ``tau``.
        tau: The temperature: small, and only the expert with the least error counts; large, and all count the same.
            ``none`` is 0.2 for ``"relative"`` and 1 for ``"published"``; ``"explained"`` has none.
    """

    error: Error | None = None
    tau: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not 1e-6 <= self.tau <= 1e6:
            raise ValueError(f"tau is {self.tau}; it must be between 1e-6 and 1e6.")
        if self.tau is not None and self.error == "explained":
            raise ValueError(f"tau is {self.tau}; what an expert explains has no temperature (error='explained').")


@dataclass(frozen=True)
class TransitionOptions(PathOptions):
    """Options of methods that use transitions; others as in ``PathOptions``.

    Attributes:
        transitions: ``"mean"`` as published, or ``"conditional"``, see ``pathfinder``.
        ends: ``"inner"`` as published, or ``"all"``: the first layer's probability and the last one's activation
            strength, which no transition holds, weigh as well. ``none`` is ``"all"`` beside an importance by what
            experts explain, else ``"inner"``.
    """

    transitions: Transitions = "mean"
    ends: Ends | None = None


@dataclass(frozen=True)
class Options(TransitionOptions, ImportanceOptions):
    """Options of ``pathfinder``: those of both factors."""


@dataclass(frozen=True)
class PathWeights:
    """What paths weigh, in logarithms.

    Attributes:
        importance: Of experts; None where it does not count.
        transitions: Between layers; None where they do not count.
        ends: What the first and the last layer's experts weigh besides; None for nothing.
        outliers: Experts whose place no path decides; None for none.
    """

    importance: Importance | None
    transitions: LogTransitions | None
    ends: Importance | None
    outliers: Outliers | None

    def nodes(self, stats: CalibrationStats) -> Importance | None:
        """All that experts weigh."""
        return node_weights(stats, self.importance, self.ends, self.outliers)


def importance_needs(options: Any) -> frozenset[Need]:
    """What the importance is made of."""
    explained = error_of(options.error, options.tau) == "explained"
    norms = {Need.ROUTING, Need.DENSE_NORMS} if explained else set()
    return frozenset({Need.SINGLE_ERROR} | norms)


def transition_needs(options: Any) -> frozenset[Need]:
    """What transitions are made of."""
    conditional = {Need.COACTIVATION} if options.transitions == "conditional" else set()
    return frozenset({Need.ROUTING, Need.DENSE_NORMS} | conditional)


def needs(options: Options) -> frozenset[Need]:
    """Those of the transitions and of the importance."""
    return transition_needs(options) | importance_needs(options)


@register_method(
    "pathfinder",
    kind="set",
    summary="the experts on the best paths through the whole network",
    source="MoE Pathfinder, arXiv 2512.18425",
    formula=(
        "Each layer's experts are nodes of a graph. The weight of a path through the network is the product, over "
        "its layers, of the importance of each expert (how well it stands in for the layer alone, against the "
        "others) and of the transitions between neighbouring layers (the mean norm of one expert's output "
        "times the router's mean probability of the next). For each calibration sample the best paths are found "
        "exactly; experts on them are kept until the budget is full."
    ),
    needs=needs,
    options=Options,
    allocations=GLOBAL_FIRST,
)
def pathfinder(stats: CalibrationStats, budget: Budget, options: Options) -> Selection:
    """The retained experts."""
    return selected(stats, budget, options)


def selected(stats: CalibrationStats, budget: Budget, options: PathOptions) -> Selection:
    """The experts on the best paths, of whatever the options' kind lets weigh."""
    weights = path_weights(stats, options)
    selection = on_best_paths(
        stats,
        budget,
        weights.importance,
        weights.transitions,
        options.num_paths,
        ends=weights.ends,
        outliers=weights.outliers,
    )
    if _explains(options) and not holds_tokens(stats):
        return replace(selection, notes=(*selection.notes, OF_AN_EARLIER_VERSION))
    return selection


def path_weights(stats: CalibrationStats, options: PathOptions) -> PathWeights:
    """What paths weigh by the options of ``pathfinder`` or of one of its factors."""
    importance = transitions = ends = outliers = None
    factors: list[Importance] = []
    if isinstance(options, ImportanceOptions):
        importance = log_importance(stats, options.tau, options.error)
        factors.append(importance)
    if isinstance(options, TransitionOptions):
        transitions = log_transitions(stats, options.transitions)
        if options.ends == "all" or (options.ends is None and _explains(options) and holds_tokens(stats)):
            ends = _ends(stats)
        if options.outliers is not None:
            factors += [log_strengths(stats), log_probabilities(stats)]
    if options.outliers is not None:
        outliers = find_outliers(_scores(stats, factors), options.outliers)
    return PathWeights(importance, transitions, ends, outliers)


def _explains(options: PathOptions) -> bool:
    """Whether experts are judged by what they explain, as far as the statistics hold it."""
    return isinstance(options, ImportanceOptions) and error_of(options.error, options.tau) == "explained"


def _ends(stats: CalibrationStats) -> Importance:
    """What the first and the last layer's experts weigh that no transition holds."""
    strength, probability = log_strengths(stats), log_probabilities(stats)
    ends = [np.zeros_like(values) for values in strength]
    ends[0] = ends[0] + probability[0]
    ends[-1] = ends[-1] + strength[-1]
    return ends


def _scores(stats: CalibrationStats, factors: Sequence[Importance]) -> dict[int, np.ndarray]:
    """The mean over samples of what an expert's own factors weigh together, by layer ``(E,)``."""
    shares = sample_weights(stats)[:, None] / len(stats.samples)
    scores = {}
    for layer, *of_layer in zip(sorted(stats.layers), *factors, strict=True):
        scores[layer] = (np.maximum(sum(of_layer), _LEAST_LOG) * shares).sum(axis=0)
    return scores


def log_strengths(stats: CalibrationStats) -> list[np.ndarray]:
    """Logarithms of activation strengths ``(S, E)``, by MoE layer; 0 for samples on which no expert is active."""
    tokens = _tokens(stats)
    norms = [layer.tensors["dense_norm"].double().numpy() / tokens for _, layer in sorted(stats.layers.items())]
    return [_log(np.where(norm.any(axis=1, keepdims=True), norm, 1.0)) for norm in norms]


def log_probabilities(stats: CalibrationStats) -> list[np.ndarray]:
    """Logarithms of mean routing probabilities ``(S, E)``, by MoE layer."""
    tokens = _tokens(stats)
    return [_log(layer.tensors["probability"].double().numpy() / tokens) for _, layer in sorted(stats.layers.items())]


def log_transitions(stats: CalibrationStats, transitions: Transitions) -> LogTransitions:
    """Logarithms of the transitions between adjacent MoE layers.

    Returns:
        A function from the number of a sample to its transitions, ``(E_l, E_{l+1})`` each, one fewer than layers. All
        samples' at once would take ``S L E^2`` numbers.
    """
    from ..statistics.mapped import mapped  # it needs torch

    layers = [layer for _, layer in sorted(stats.layers.items())]
    strength, probability = log_strengths(stats)[:-1], log_probabilities(stats)[1:]
    if transitions == "mean":
        return lambda sample: [a[sample][:, None] + p[sample] for a, p in zip(strength, probability, strict=True)]
    routed = [layer.tensors["routed_tokens"].numpy() for layer in layers[:-1]]
    together = [mapped(layer.tensors, "coactivation") for layer in layers[1:]]  # read sample by sample

    def of_sample(sample: int) -> list[np.ndarray]:
        transitions = []
        for a, p, n, c in zip(strength, probability, routed, together, strict=True):
            count = n[sample][:, None]
            mean = _log(c[sample].numpy() / np.maximum(count, 1))
            transitions.append(a[sample][:, None] + np.where(count > 0, mean, p[sample]))
        return transitions

    return of_sample


def _tokens(stats: CalibrationStats) -> np.ndarray:
    return np.array([sample.num_tokens for sample in stats.samples], dtype=np.float64)[:, None]


def _log(values: np.ndarray) -> np.ndarray:
    """Logarithms; minus infinity for 0, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(values)
