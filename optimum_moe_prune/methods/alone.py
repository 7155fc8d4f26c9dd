# SPDX-License-Identifier: Apache-2.0
r"""The importance of experts for Pathfinder: how well each stands in for its layer alone, in each sample.

Three readings of it, all of one sample; the first is the default, the last the paper's:

- ``"explained"``: :math:`e_i = s_i / \sum_j s_j`, where :math:`s_i` is the share of the output's energy that the best
  positive multiple of expert i's output accounts for, token by token:
  :math:`s_i = \sum_t \max(0, f_i \cdot F_{all})^2 / \|f_i\|^2 \,/ \sum_t \|F_{all}\|^2`. It depends neither on how
  large outputs are nor on the weight that the router gives to an expert alone, and has no temperature;
- ``"relative"``: :math:`e_i = \mathrm{softmax}_i(-L_i / (\tau \|F_{all}\|_F))`, by default with :math:`\tau = 0.2`;
- ``"published"``: :math:`e_i = \mathrm{softmax}_i(-L_i / \tau)`, by default with :math:`\tau = 1`; :math:`L_i` is the
  norm over a whole sample, so that a temperature is of one model and length of samples.

:math:`L_i = \|F_{\{i\}} - F_{all}\|_F`, the layer left with expert i alone. Where a layer's output is 0 on a
sample, the first two are uniform.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats, LayerStats

Error = Literal["explained", "relative", "published"]
TAU: dict[Error, float] = {"relative": 0.2, "published": 1.0}
"""The default temperatures."""

_ROWS = 8192  # tokens at once
_LEAST_SHARE = 1e-6
_LEAST_WEIGHT = 1e-3  # an expert that the router would give less alone explains nothing of the token
_OF_TOKENS = ("token_dense_norm", "token_single_error", "token_output_energy")


def error_of(error: Error | None, tau: float | None) -> Error:
    """The reading that is meant: by default the one without a temperature, where none is given."""
    return error or ("explained" if tau is None else "relative")


def log_importance(stats: CalibrationStats, tau: float | None = None, error: Error | None = None) -> list[np.ndarray]:
    """Logarithms of the importance of each expert for each sample ``(S, E)``, by MoE layer.

    Args:
        stats: The statistics; where they are of a format that lacks what ``"explained"`` reads, that is
            ``"relative"``.
        tau: The temperature of the reading; by default its own.
        error: The reading (:func:`error_of`).
    """
    from scipy.special import log_softmax

    error = error_of(error, tau)
    if error == "explained" and not holds_tokens(stats):
        error = "relative"
    importance = []
    for _, layer in sorted(stats.layers.items()):
        if error == "explained":
            weights = np.log(np.maximum(explained(layer, len(stats.samples)), _LEAST_SHARE))
        else:
            weights = -_errors(layer, relative=error == "relative") / (TAU[error] if tau is None else tau)
        importance.append(log_softmax(weights, axis=1))
    return importance


def holds_tokens(stats: CalibrationStats) -> bool:
    """Whether statistics hold what ``"explained"`` is made of; those of formats 1 and 2 do not."""
    return set(_OF_TOKENS) <= set(next(iter(stats.layers.values())).tensors)


def explained(layer: LayerStats, num_samples: int) -> np.ndarray:
    """The share of the output's energy that each expert explains in each sample ``(S, E)``; 0 where there is none."""
    import torch

    from ..statistics.mapped import mapped  # it needs torch

    norms, errors, energies = (mapped(layer.tensors, name) for name in _OF_TOKENS)
    logits = mapped(layer.tensors, "logits")
    found = torch.zeros(num_samples, layer.num_experts, dtype=torch.float64)
    whole = torch.zeros(num_samples, 1, dtype=torch.float64)
    for first in range(0, len(norms), _ROWS):
        rows = slice(first, first + _ROWS)
        norm, error, energy = (tensor[rows].double() for tensor in (norms, errors, energies))
        weight = layer.routing.lone_weights(logits[rows].float())[:, : layer.num_experts].double()
        # |a f - F|^2 = a^2 |f|^2 - 2 a f F + |F|^2 holds the product of an expert's output and the layer's.
        product = ((weight * norm).square() + energy - error) / (2 * weight.clamp(min=_LEAST_WEIGHT))
        product = torch.where(weight >= _LEAST_WEIGHT, product, 0.0).clamp(min=0)
        of_token = torch.where(norm > 0, product / norm, 0.0).square().minimum(energy)
        samples = layer.token_sample[rows].long()
        found.index_add_(0, samples, of_token)
        whole.index_add_(0, samples, energy)
    return torch.where(whole > 0, found / whole, 0.0).numpy()


def _errors(layer: LayerStats, relative: bool) -> np.ndarray:
    """The error ``L`` of each expert alone in each sample ``(S, E)``, relative to the layer's output or as it is."""
    error, output = (np.sqrt(layer.tensors[n].double().numpy()) for n in ("single_error", "output_energy"))
    if relative:
        return np.divide(error, output, out=np.zeros_like(error), where=output > 0)
    return error
