# SPDX-License-Identifier: Apache-2.0
"""Statistics of layers that never were: from router logits and expert outputs of single tokens, by the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optimum_moe_prune import CalibrationStats, Need
from optimum_moe_prune.architectures.routers import RoutingRule
from optimum_moe_prune.statistics.samples import Sample
from optimum_moe_prune.statistics.stats import LayerStats


@dataclass(frozen=True)
class Tokens:
    """Some tokens in every layer.

    Attributes:
        logits: ``(L, T, E)``.
        outputs: Of each expert ``(L, T, E, H)``.
        inputs: ``(L, T, H)``.
    """

    logits: Tensor
    outputs: Tensor
    inputs: Tensor

    def repeated(self, times: int) -> Tokens:
        """The same ones several times in a row."""
        return Tokens(*(torch.cat([t] * times, dim=1) for t in (self.logits, self.outputs, self.inputs)))


def statistics_of(samples: Sequence[tuple[str, Tokens]], rule: RoutingRule) -> CalibrationStats:
    """The statistics of samples ``(domain, tokens)``, all of whose tokens are kept."""
    layers, _, experts = samples[0][1].logits.shape
    entries = tuple(Sample(f"{n:064x}", domain, t.logits.shape[1]) for n, (domain, t) in enumerate(samples))
    token_sample = torch.cat([torch.full((entry.num_tokens,), n) for n, entry in enumerate(entries)])
    token_position = torch.cat([torch.arange(entry.num_tokens) for entry in entries])
    made = {}
    routed_before = None
    for layer in range(layers):
        z = torch.cat([t.logits[layer] for _, t in samples])
        y = torch.cat([t.outputs[layer] for _, t in samples]).double()
        p = torch.softmax(z.double(), -1)
        weights = rule.weights(z)
        routed = (weights > 0).double()
        norm = torch.linalg.vector_norm(y, dim=-1)
        full = torch.einsum("te,teh->th", weights, y)
        single = (y - full[:, None]).square().sum(-1)
        chosen_p = p * routed / (p * routed).sum(1, keepdim=True)
        of_token = {
            "routed_tokens": routed,
            "routed_probability": p * routed,
            "probability": p,
            "probability_log2": p * p.log() / math.log(2),
            "norm": norm * routed,
            "squared_norm": norm**2 * routed,
            "norm_applied": norm * weights,
            "norm_probability": norm * p * routed,
            "norm_renormalised": norm * chosen_p,
            "dense_norm": norm,
            "single_error": single,
            "output_energy": full.square().sum(-1, keepdim=True).expand_as(single),
        }

        def sums(values: Tensor) -> Tensor:
            empty = torch.zeros(len(entries), *values.shape[1:], dtype=torch.float64)
            return empty.index_add_(0, token_sample, values)

        before = torch.zeros(len(z), 0, dtype=torch.float64) if routed_before is None else routed_before
        rows, columns = torch.triu_indices(experts, experts)
        largest = torch.zeros(len(entries), experts, dtype=torch.float64)
        index = token_sample[:, None].expand(-1, experts)
        made[layer] = LayerStats(
            experts,
            rule,
            {
                **{name: sums(values) for name, values in of_token.items()},
                "max_element": largest.scatter_reduce(0, index, y.abs().amax(-1) * routed, "amax"),
                "coactivation": sums(before[:, :, None] * p[:, None, :]).float(),
                "logits": z,
                "token_single_error": single.float(),
                "gram": (y @ y.transpose(1, 2))[:, rows, columns].float(),
                "inputs": torch.cat([t.inputs[layer] for _, t in samples]),
            },
            torch.ones(len(entries), dtype=torch.float64),
            token_sample,
        )
        routed_before = routed
    model = {"model_type": "mixtral", "top_k": rule.top_k, "fingerprint": "none"}
    return CalibrationStats(
        model, entries, made, frozenset(Need), token_sample, token_position, len(token_sample), seed=0
    )
