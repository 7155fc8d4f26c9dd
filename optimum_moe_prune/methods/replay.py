# SPDX-License-Identifier: Apache-2.0
r"""Routing under a retained set, and its exact reconstruction error, without the model.

With :math:`\pi_t(S)` the routing weights of the layer pruned to the experts :math:`S`, :math:`Y_t` the outputs of all
experts and :math:`G_t = Y_t Y_t^T` their Gram matrix,

.. math:: \|F_S(x_t) - F_{all}(x_t)\|^2 = c^T G_t c, \qquad c = \pi_t(S) - \pi_t(all),

so router logits and Gram matrices, gathered in one pass, give the exact error of any retained set. The loss of a set
is the one of NAEE (arXiv 2402.14800): the Frobenius norm over a sample's tokens, summed over samples,

.. math:: L(S) = \sum_s w_s \sqrt{\sum_{t \in s} c^T G_t c}.

The weights come from the router's own rule (``architectures.routers``), which follows the model's operations to the
letter. This file is the reference; ``replay_search`` gives the losses of thousands of sets at once.

Shapes: E experts, T tokens, S samples, K top_k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..architectures.routers import RoutingRule
from ..errors import RequestError, RunError
from .selection import TIE

WORKING_BYTES = 16 * 2**20
"""Chunks of this size stay near the processor."""


def gram_index(num_experts: int) -> Tensor:
    """Where entry ``(i, j)`` of a Gram matrix stands in its stored upper triangle: ``(E, E)`` of int64."""
    rows, columns = torch.triu_indices(num_experts, num_experts)
    index = torch.empty(num_experts, num_experts, dtype=torch.int64)
    index[rows, columns] = torch.arange(len(rows))
    index[columns, rows] = index[rows, columns]
    return index


def check_replays(routing: RoutingRule) -> None:
    """Raise unless a layer with fewer experts follows from its statistics.

    Raises:
        RequestError: Saying why, and which methods work.
    """
    if not routing.replays:
        raise RequestError(
            "in this model shared experts take part in the choice, so what a layer gives with fewer experts does not "
            "follow from its statistics; use a method of scores."
        )


def squared_errors(
    logits: Tensor, gram: Tensor, routing: RoutingRule, retained: Sequence[int], tokens: Tensor | None = None
) -> Tensor:
    """``||F_S(x_t) - F_all(x_t)||^2`` of each token, by the definition.

    Args:
        logits: Router logits ``(T, E)``.
        gram: Upper triangles ``(T, E (E + 1) / 2)`` of the Gram matrices of the experts' outputs.
        routing: The rule.
        retained: Ids of the retained experts.
        tokens: Rows of the tokens that are asked about ``(n,)``; all of them by default.

    Returns:
        ``(T,)`` or ``(n,)`` float64, never negative.
    """
    if tokens is None:
        tokens = torch.arange(len(logits), device=logits.device)
    else:
        logits = logits[tokens]
    change = routing.weights(logits, sorted(retained)) - routing.weights(logits)
    # A token changes the weights of the experts it had and of those it has now, of no others.
    experts = (change != 0).to(torch.int8).topk(min(2 * routing.top_k, change.shape[1]), dim=1).indices
    change = change.gather(1, experts)
    index = gram_index(logits.shape[1]).to(logits.device)
    size = max(1, WORKING_BYTES // (8 * experts.shape[1] ** 2))
    errors = []
    for c, e, t in zip(change.split(size), experts.split(size), tokens.split(size), strict=True):
        among = gram_entries(gram, t, index[e[:, :, None], e[:, None]])
        errors.append(torch.einsum("ti,tij,tj->t", c, among, c))
    return torch.cat(errors).clamp_(min=0)


def squared_changes(logits: Tensor, products: Tensor, routing: RoutingRule, retained: Sequence[int]) -> Tensor:
    """``(c_t . a_tj)^2``, the mean over draws, of the change c of each token's routing weights: ``(T,)`` float64.

    Args:
        logits: Router logits ``(T, E)``.
        products: What each expert's output comes to ``(T, J, E)``, float64.
        routing: The rule.
        retained: Ids of the retained experts.
    """
    change = routing.weights(logits, sorted(retained)) - routing.weights(logits)
    return torch.einsum("te,tje->tj", change, products).square().mean(1)


def gram_entries(gram: Tensor, tokens: Tensor, entries: Tensor) -> Tensor:
    """Of some tokens ``(n,)`` entries ``(n, ...)`` of their Gram matrices, in float64.

    Nothing else is read or copied: the matrices of a token take a hundred kilobytes where there are many experts.
    """
    begin = tokens.to(entries.device).view(-1, *[1] * (entries.ndim - 1)) * gram.shape[1]
    return gram.view(-1)[entries + begin].double()


def errors_without(
    logits: Tensor, gram: Tensor, routing: RoutingRule, left: Sequence[int], candidates: Sequence[int]
) -> Tensor:
    """Squared errors ``(T, n)`` of the sets that are left when one of ``candidates`` goes, by the definition.

    A set is only asked about the tokens whose routing can change with that expert, where the rule says which.

    Args:
        logits, gram, routing: As for :func:`squared_errors`.
        left: Sorted ids of the experts that are there.
        candidates: Those of them that may go.
    """
    moved = routing.moved_by(logits, left)
    now = squared_errors(logits, gram, routing, left) if moved is not None else None
    columns = []
    for expert in candidates:
        others = [other for other in left if other != expert]
        if moved is None or now is None:
            columns.append(squared_errors(logits, gram, routing, others))
            continue
        tokens = moved[:, left.index(expert)].nonzero().flatten()
        column = now.clone()
        if len(tokens):
            column[tokens] = squared_errors(logits, gram, routing, others, tokens)
        columns.append(column)
    return torch.stack(columns, dim=1)


def reconstruction_loss(errors: Tensor, sample: Tensor, weights: Tensor) -> Tensor:
    """``L_recon`` from squared errors: the weighted sum over samples of the root of their summed errors.

    Args:
        errors: Squared errors ``(T,)`` or ``(T, n)`` for ``n`` sets, float64.
        sample: The sample of each token ``(T,)``.
        weights: The weight of each sample ``(S,)``.

    Returns:
        The loss, a scalar or ``(n,)``.
    """
    totals = torch.zeros(len(weights), *errors.shape[1:], dtype=torch.float64).index_add_(0, sample.long(), errors)
    return torch.tensordot(weights.double(), totals.clamp_(min=0).sqrt(), dims=1)


def first_minimum(losses: Tensor) -> int:
    """Index of the smallest loss; of those within ``TIE`` of it, the first.

    Raises:
        RunError: If a loss is NaN or infinite.
    """
    if not bool(torch.isfinite(losses).all()):
        raise RunError("reconstruction losses are NaN or infinite: the statistics hold such values. Calibrate again.")
    return minima(losses)[0]


def minima(losses: Tensor) -> list[int]:
    """Indices of the smallest loss and of those within ``TIE`` of it."""
    least = losses.min()
    return (losses <= least + TIE * least.abs()).nonzero().flatten().tolist()
