# SPDX-License-Identifier: Apache-2.0
"""How routers of transformers choose and weigh experts.

:class:`TopK` is the general rule: scores of the logits, perhaps a bias and groups for choosing, weights of the scores
alone. :class:`SoftmaxTopK` (``routers``) is its oldest and commonest case. :class:`Hashed` is for layers that send a
token where a table says, :class:`SparseMixer` is Phi's. A row names one by a form (``forms``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RequestError
from .routers import Normalisation, RoutingRule, likelihoods

if TYPE_CHECKING:
    from torch import Tensor

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]
SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True)
class TopK(RoutingRule, kind="top_k"):
    """Scores of the logits; the K best of score and bias, perhaps in the best groups alone; weights of the scores.

    Attributes:
        top_k: Experts used per token.
        score: What a logit becomes: ``"softmax"`` (over the experts that are there), ``"sigmoid"``,
            ``"sqrtsoftplus"`` (the root of softplus).
        by_logits: Whether experts are chosen by their logits, in place of their scores.
        bias: Added for choosing, one for each expert; no part of the weights.
        renormalise: Whether the scores of the chosen experts are divided by their sum.
        epsilon: Added to that sum.
        floor: The least that is divided by.
        scale: What weights are multiplied by: one number, or one for each expert.
        groups: Contiguous groups of experts, of which only the best are chosen from.
        top_groups: How many.
        group_score: What groups are compared by: the sum of their two best experts, or the best one.
        others_are_zero: Whether experts outside the best groups are compared by 0, in place of not at all.
        softcap: Logits become ``softcap * tanh(logits / softcap)`` first; 0 leaves them.
        multiplier: What logits are multiplied by first.
        exact: Whether scores are computed in float32 whatever the dtype of the logits.
        fixed: Columns after the experts' that stay: experts that do nothing, or (``shared``) those of shared experts.
        shared: Whether these are not chosen, and only count in the sum that is divided by.
        on_input: Whether the score multiplies what goes into an expert and not what comes out. An expert's output is
            then that of its own input, and every chosen one counts with 1.
        bias_from: Name of the router's tensor with the bias; a layer's own rule has it read.
        scale_from: Name of the one with a scale for each expert.
    """

    top_k: int
    score: Score = "softmax"
    by_logits: bool = False
    bias: tuple[float, ...] = field(default=(), repr=False)
    renormalise: bool = True
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float | tuple[float, ...] = field(default=1.0, repr=False)
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    others_are_zero: bool = False
    softcap: float = 0.0
    multiplier: float = 1.0
    exact: bool = True
    fixed: int = 0
    shared: bool = False
    on_input: bool = False
    bias_from: str = ""
    scale_from: str = ""

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 1 or self.score not in SCORES:
            raise ValueError(f"top_k is {self.top_k!r} and score {self.score!r}")
        if self.groups < 1 or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"groups is {self.groups!r} and top_groups {self.top_groups!r}")

    # -- what the rule says of itself

    @property
    def reads_router(self) -> bool:  # type: ignore[override]
        return bool(self.bias_from or self.scale_from)

    @property
    def fixed_are_chosen(self) -> bool:  # type: ignore[override]
        return self.fixed > 0 and not self.shared

    @property
    def replays(self) -> bool:  # type: ignore[override]
        return not self.shared  # what shared experts give changes with the choice as well

    @property
    def normalised_over(self) -> Normalisation:
        if self.on_input:
            return "none"
        return "chosen" if self.renormalise else "retained" if self.score == "softmax" else "none"

    @property
    def ranked(self) -> bool:
        # Probabilities over those that are left change with the set, and a bias does not change with them.
        moving = self.score == "softmax" and self.bias_from and not self.by_logits
        return self.groups == 1 and self.fixed == 0 and not moving

    @property
    def fewest(self) -> int:
        if self.groups == 1:
            return self.top_k
        return self.groups * max(2 if self.group_score == "top2" else 1, math.ceil(self.top_k / self.top_groups))

    def of_router(self, tensors: Mapping[str, Tensor]) -> RoutingRule:
        def read(name: str) -> tuple[float, ...]:
            found = [tensor for path, tensor in tensors.items() if path.rpartition(".")[2] == name]
            if len(found) != 1:
                raise RequestError(f"the router has {len(found)} tensors named {name!r}; its rule reads one.")
            return tuple(found[0].detach().double().flatten().tolist())

        changes: dict[str, Any] = {"bias": read(self.bias_from)} if self.bias_from else {}
        if self.scale_from:
            assert not isinstance(self.scale, tuple)
            scales = tuple(self.scale * scale for scale in read(self.scale_from))
            changes["scale"] = scales[0] if len(scales) == 1 else scales
        return replace(self, **changes)

    # -- how it routes

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        import torch

        count = logits.shape[1] - self.fixed
        kept = range(count) if retained is None else retained
        fixed = range(count, logits.shape[1]) if self.fixed_are_chosen else ()
        ids = torch.tensor([*kept, *fixed], device=logits.device)
        score = self._score(logits[:, ids])
        key = self._key(logits[:, ids], score, ids)
        if self.groups > 1:
            key = self._in_best_groups(key, ids, logits.shape[1])
        chosen = key.topk(min(self.top_k, len(ids)), dim=-1).indices
        weights = score.gather(1, chosen).float()
        if self.on_input:
            return ids[chosen], torch.ones_like(weights)
        if self.renormalise:
            total = weights.sum(dim=-1, keepdim=True) + self.epsilon
            if self.shared:
                total = total + self._score(logits[:, count:]).float().sum(dim=-1, keepdim=True)
            weights = weights / (total.clamp(min=self.floor) if self.floor else total)
        return ids[chosen], weights * self._scale(ids)[chosen].float()

    def moved_by(self, logits: Tensor, retained: Sequence[int]) -> Tensor | None:
        import torch

        if self.score == "softmax" or self.fixed or self.others_are_zero:
            return None
        ids = torch.as_tensor(retained, device=logits.device)
        chosen, _ = self.choose(logits, retained)
        moved = (ids[:, None] == chosen[:, None, :]).any(-1)
        if self.groups > 1:  # and those by which its group is compared
            key = self._key(logits[:, ids], self._score(logits[:, ids]), ids)
            whole = self._by_group(key, ids, logits.shape[1])
            best = whole.topk(2 if self.group_score == "top2" else 1, dim=-1).indices
            leads = torch.zeros_like(whole, dtype=torch.bool).scatter_(-1, best, True)
            moved |= leads.flatten(1)[:, ids]
        return moved

    def ranking(self, logits: Tensor) -> Tensor:
        import torch

        logits = logits[:, : logits.shape[1] - self.fixed] if self.shared else logits
        return self._key(logits, self._score(logits), torch.arange(logits.shape[1], device=logits.device))

    def numerators(self, logits: Tensor) -> Tensor:
        import torch

        logits = self._before(logits).double()
        if self.on_input:
            return torch.ones_like(logits)
        if self.score == "softmax":
            return likelihoods(logits)
        if self.score == "sigmoid":
            return logits.clamp(min=-300).sigmoid()
        return torch.nn.functional.softplus(logits.clamp(min=-300)).sqrt()

    # -- its parts

    def _before(self, logits: Tensor) -> Tensor:
        logits = logits.float() if self.exact else logits
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        return (logits / self.softcap).tanh() * self.softcap if self.softcap else logits

    def _score(self, logits: Tensor) -> Tensor:
        import torch

        logits = self._before(logits)
        if self.score == "softmax":
            return torch.softmax(logits, dim=-1)
        return logits.sigmoid() if self.score == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()

    def _key(self, logits: Tensor, score: Tensor, ids: Tensor) -> Tensor:
        import torch

        key = self._before(logits) if self.by_logits else score
        return key + torch.tensor(self.bias, device=key.device)[ids] if self.bias else key

    def _scale(self, ids: Tensor) -> Tensor:
        import torch

        scale = torch.as_tensor(self.scale, dtype=torch.float64, device=ids.device)
        return scale[ids] if scale.ndim else scale.expand(len(ids))

    def _by_group(self, key: Tensor, ids: Tensor, num_experts: int) -> Tensor:
        """Keys of some experts in the groups of the whole layer ``(T, groups, E / groups)``, of others -infinity."""
        whole = key.new_full((len(key), num_experts), -math.inf).index_copy_(1, ids, key)
        return whole.view(len(key), self.groups, -1)

    def _in_best_groups(self, key: Tensor, ids: Tensor, num_experts: int) -> Tensor:
        """The same keys, minus infinity outside the best groups: what is left of those of the whole layer."""
        import torch

        by_group = self._by_group(key, ids, num_experts)
        best = by_group.topk(2, dim=-1).values.sum(-1) if self.group_score == "top2" else by_group.amax(-1)
        taken = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(self.top_groups).indices, True)
        outside = 0.0 if self.others_are_zero else -torch.inf
        return by_group.masked_fill(~taken[..., None], outside).flatten(1)[:, ids]


@dataclass(frozen=True)
class Hashed(TopK, kind="hashed"):
    """A table says by its id which experts a token is sent to; its logits only weigh them."""

    @property
    def ranked(self) -> bool:
        return False

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        raise RequestError(
            "layers that send tokens to experts by their ids have no choice to replay: use a method of scores, or "
            "leave them whole (skip_layers)."
        )

    def disagreement(self, logits: Tensor, chosen: Tensor, weights: Tensor) -> str:
        score = self._score(logits).gather(1, chosen).float()
        expected = score / (score.sum(dim=-1, keepdim=True) + self.epsilon) * self._scale(chosen[0])[:1].float()
        difference = (expected - weights.float()).abs().max()
        if difference > (1e-5 if weights.dtype == logits.dtype and logits.element_size() == 4 else 1e-2):
            return f"experts are given weights up to {difference:.3g} away from those by the rule"
        return ""


@dataclass(frozen=True)
class SparseMixer(RoutingRule, kind="sparse_mixer"):
    """The best expert, then the best of the others (arXiv 2409.12136, as it decides after training).

    Each is weighed by the softmax over those that come near it: whose logits are less than ``2 jitter`` of their own
    size below the best one's.

    Attributes:
        top_k: Experts used per token; 2.
        jitter: How near.
    """

    top_k: int
    jitter: float

    def __post_init__(self) -> None:
        if self.top_k != 2:
            raise ValueError(f"top_k is {self.top_k!r}; this rule chooses 2 experts")

    @property
    def normalised_over(self) -> Normalisation:
        return "retained"

    @property
    def ranked(self) -> bool:
        return False

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        import torch

        ids = torch.arange(logits.shape[1], device=logits.device)
        if retained is not None:
            ids = torch.as_tensor(retained, device=logits.device)
        logits = logits[:, ids]
        left, chosen, weights = logits, [], []
        for _ in range(min(self.top_k, len(ids))):
            best, place = left.max(dim=-1, keepdim=True)
            far = (best - logits) / logits.abs().clamp(min=best) > 2 * self.jitter
            weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(1, place))
            chosen.append(place)
            left = left.scatter(1, place, -torch.inf)
        return ids[torch.cat(chosen, dim=1)], torch.cat(weights, dim=1).float()

    def ranking(self, logits: Tensor) -> Tensor:
        return logits

    def numerators(self, logits: Tensor) -> Tensor:
        return likelihoods(logits.double())
