# SPDX-License-Identifier: Apache-2.0
r"""What retained sets do to the model's own predictions, to second order, without the model.

With :math:`a_{tje}` the products of expert outputs and gradients of the predictions' log-probabilities
(``calibration.fisher``), :math:`c_t(S) = \pi_t(S) - \pi_t(all)` the change of the routing weights and T the tokens
after which something is predicted, the divergence of the final predictions when one layer is pruned to :math:`S` is

.. math:: D(S) = \frac{1}{2 T J} \sum_{t, j} (c_t(S) \cdot a_{tj})^2

nats per predicted token, for small changes that different tokens make independently. It is an estimate and never a
loss: it ranks sets and layers, is far too small where changes are large, and sees nothing where predictions are nearly
certain, since there the gradients vanish. Damping lets every token count as if its gradient were no shorter than
others are:

.. math:: a_{tj} \leftarrow a_{tj} \sqrt{\frac{|g_{tj}|^2 + \beta \overline{|g|^2}}{|g_{tj}|^2}}

Shapes: N kept tokens, J draws, E experts and what is chosen like them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..statistics.stats import CalibrationStats, LayerStats
from ..storage.growing import Store
from .replay import WORKING_BYTES, check_replays, squared_changes
from .replay_search import Replay


def damped_products(layer: LayerStats, damping: float) -> Tensor:
    """The products ``(N, J, E)`` float64, damped.

    Args:
        layer: The layer's statistics.
        damping: :math:`\\beta`; 0 leaves them as they are.
    """
    products = layer.tensors["fisher"].double()
    if damping == 0:
        return products
    energy = layer.tensors["gradient_energy"].double()
    weights = layer.token_weights
    mean = (weights @ energy).mean() / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)
    factor = ((energy + damping * mean) / energy).sqrt()  # where there is no gradient there is no direction
    return products * torch.where(energy > 0, factor, 0.0)[..., None]


class FisherLoss:
    """``D(S)`` of retained sets of one layer, by the definition.

    Args:
        stats: The statistics.
        index: The layer.
        damping: As for :func:`damped_products`.

    Raises:
        RequestError: If the layer's output with fewer experts does not follow from its statistics.
    """

    def __init__(self, stats: CalibrationStats, index: int, damping: float = 0.0) -> None:
        layer = stats.layers[index]
        check_replays(layer.routing)
        self._routing = layer.routing
        self._logits = layer.tensors["logits"]
        self._products = damped_products(layer, damping)
        self._weights = layer.token_weights
        lengths = torch.tensor([sample.num_tokens for sample in stats.samples])
        predicts = stats.token_position + 1 < lengths[stats.token_sample]
        self._predicted = float(self._weights[predicts].sum())

    def __call__(self, retained: Sequence[int]) -> float:
        """Nats per predicted token."""
        squares = squared_changes(self._logits, self._products, self._routing, retained)
        return float(self._weights @ squares) / (2 * self._predicted) if self._predicted else 0.0


def fisher_replay(layer: LayerStats, damping: float = 0.0) -> Replay:
    r"""A replay by whose losses sets are ordered as by ``D``.

    The matrices :math:`\frac{1}{J} \sum_j a_{tj} a_{tj}^T` stand for the Gram matrices there, each token with its
    weight, and all tokens for one sample, so that its losses are multiples of :math:`\sqrt{D}`.

    Args:
        layer: The layer's statistics.
        damping: As for :func:`damped_products`.
    """
    products = damped_products(layer, damping) * layer.token_weights.sqrt()[:, None, None]
    largest = products.abs().max() if products.numel() else torch.ones(())
    products = products / torch.where(largest > 0, largest, 1.0)  # squares stay within float32
    count = products.shape[2]
    rows, columns = torch.triu_indices(count, count)
    made = Store().tensors("gram", {"gram": ((len(products), len(rows)), torch.float32)})["gram"]
    for tokens in torch.arange(len(products)).split(max(1, WORKING_BYTES // (16 * products.shape[1] * len(rows)))):
        some = products[tokens]
        made[tokens] = (some[:, :, rows] * some[:, :, columns]).mean(1).float()
    together = torch.zeros(len(products), dtype=torch.int64)
    return Replay(layer.tensors["logits"], made, layer.routing, together, torch.ones(1, dtype=torch.float64))
