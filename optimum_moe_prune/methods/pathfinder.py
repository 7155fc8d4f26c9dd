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
  ``allocation="uniform"`` the same order decides in each layer. Where a layer's numbers lie in steps (groups of the
  router, ``count_multiple_of``), a step is judged by the sums over its experts, so those on the paths still come
  first; and paths fit if the steps do that hold their experts.
- With sums over a sample's tokens, :math:`t_{ij}` is a product of one factor for each layer, and no transition
  depends on where it comes from. ``transitions="conditional"`` is :math:`t_{ij} = a_i c_{ij}`, with :math:`c_{ij}` the
  mean of :math:`p_j^{(l+1)}` over the tokens that layer :math:`l` routed to :math:`i`; :math:`p_j` if there are none.
- Every sample counts once; with ``domain_weights`` the samples of a domain share its weight equally.
- A layer whose output is 0 on a sample has a uniform :math:`e`. A path through an expert with :math:`a_i = 0` has
  weight 0 and is no path; where all experts of a layer have 0, their factor says nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..statistics.needs import Need
from .budget import Budget
from .path_selection import on_best_paths
from .registry import register_method
from .selection import Selection

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats

Transitions = Literal["mean", "conditional"]
GLOBAL_FIRST = ("global", "uniform")
MOST_PATHS = 10_000


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
def pathfinder(stats: CalibrationStats, budget: Budget, options: Options) -> Selection:
    """The retained experts."""
    importance = log_importance(stats, options.tau)
    return on_best_paths(stats, budget, importance, log_transitions(stats, options.transitions), options.num_paths)


def log_importance(stats: CalibrationStats, tau: float) -> list[np.ndarray]:
    """Logarithms of the importance of each expert for each sample ``(S, E)``, by MoE layer."""
    from scipy.special import log_softmax

    importance = []
    for _, layer in sorted(stats.layers.items()):
        error = np.sqrt(layer.tensors["single_error"].double().numpy())
        output = np.sqrt(layer.tensors["output_energy"].double().numpy())
        relative = np.divide(error, output, out=np.zeros_like(error), where=output > 0)
        importance.append(log_softmax(-relative / tau, axis=1))
    return importance


def log_transitions(stats: CalibrationStats, transitions: Transitions) -> Callable[[int], list[np.ndarray]]:
    """Logarithms of the transitions between adjacent MoE layers.

    Returns:
        A function from the number of a sample to its transitions, ``(E_l, E_{l+1})`` each, one fewer than layers. All
        samples' at once would take ``S L E^2`` numbers.
    """
    from ..statistics.mapped import mapped  # it needs torch

    tokens = np.array([sample.num_tokens for sample in stats.samples], dtype=np.float64)[:, None]
    layers = [layer for _, layer in sorted(stats.layers.items())]
    strength = [_strength(layer.tensors["dense_norm"].double().numpy() / tokens) for layer in layers[:-1]]
    probability = [_log(layer.tensors["probability"].double().numpy() / tokens) for layer in layers[1:]]
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


def _strength(norms: np.ndarray) -> np.ndarray:
    """Log activation strengths ``(S, E)``; 0 for a sample on which no expert of the layer is active."""
    return _log(np.where(norms.any(axis=1, keepdims=True), norms, 1.0))


def _log(values: np.ndarray) -> np.ndarray:
    """Logarithms; minus infinity for 0, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(values)
