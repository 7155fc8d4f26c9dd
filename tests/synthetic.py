# SPDX-License-Identifier: Apache-2.0
"""Statistics of layers that never were: from router logits and expert outputs of single tokens, by the definitions.

And a router that chooses among groups of experts.
"""

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
class GroupedTopK(RoutingRule, kind="test_grouped"):
    """As DeepSeek-V3 chooses: the best groups by the sum of their best experts, then the best experts of these."""

    top_k: int
    groups: int = 1
    top_groups: int = 1
    best: int = 2
    normalised_over = "chosen"  # type: Normalisation

    @property
    def ranked(self) -> bool:
        return self.groups == 1

    @property
    def fewest(self) -> int:
        return self.groups * max(self.best, math.ceil(self.top_k / self.top_groups)) if self.groups > 1 else self.top_k

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        scores = logits.float().sigmoid()
        left = torch.arange(scores.shape[1]) if retained is None else torch.tensor(retained)
        masked = torch.full_like(scores, -math.inf).index_copy_(1, left, scores[:, left])
        by_group = masked.view(len(scores), self.groups, -1)
        worth = by_group.topk(min(self.best, by_group.shape[2])).values.sum(-1)
        taken = torch.zeros_like(worth).scatter_(1, worth.topk(self.top_groups).indices, 1.0)
        among = by_group.masked_fill(taken[..., None] == 0, -math.inf).flatten(1)
        chosen = among.topk(min(self.top_k, len(left))).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(dim=1, keepdim=True)

    def ranking(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def numerators(self, logits: Tensor) -> Tensor:
        return logits.double().clamp(min=-300).sigmoid()


def random_statistics(rule: RoutingRule, layers: int, experts: int, tokens: int = 40) -> CalibrationStats:
    """Statistics of three samples of two domains."""
    generator = torch.Generator().manual_seed(0)

    def sample() -> Tokens:
        shape = (layers, tokens, experts)
        logits = 2 * torch.randn(shape, generator=generator)
        outputs = torch.randn(*shape, 6, generator=generator) * (1 + torch.rand(experts, 1, generator=generator))
        return Tokens(logits, outputs, torch.randn(layers, tokens, 6, generator=generator))

    return statistics_of([("a", sample()), ("b", sample()), ("a", sample())], rule)


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

        inputs = torch.cat([t.inputs[layer] for _, t in samples])
        gradients = torch.stack([inputs, inputs.flip(1)], dim=1).double()  # (T, J, H), of as many numbers
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
                "output_sum": sums(y * routed[:, :, None]).float(),
                "logits": z,
                "token_single_error": single.float(),
                "gram": (y @ y.transpose(1, 2))[:, rows, columns].float(),
                "inputs": inputs,
                "weight_magnitude": y.abs().mean((0, 2)).double(),
                "weight_square": y.square().mean((0, 2)).double(),
                "fisher": torch.einsum("teh,tjh->tje", y, gradients).float(),
                "gradient_energy": gradients.square().sum(-1).float(),
            },
            torch.ones(len(entries), dtype=torch.float64),
            token_sample,
        )
        routed_before = routed
    model = {"model_type": "mixtral", "top_k": rule.top_k, "fingerprint": "none"}
    return CalibrationStats(
        model, entries, made, frozenset(Need), token_sample, token_position, len(token_sample), seed=0
    )
