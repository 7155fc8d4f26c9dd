# SPDX-License-Identifier: Apache-2.0
"""Searches over retained sets by the replay's losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..architectures.routers import RoutingRule
from .replay import WORKING_BYTES, first_minimum, gram_index, reconstruction_loss, squared_errors

_TABLE_BITS = 20  # a table of 2**20 entries at most


_TABLE_SUBSETS = 20_000


_SETS_AT_ONCE = 512


_DECIDED_BY_DEFINITION = 8  # sets


class Replay:
    """Losses of many retained sets of one layer, and the two searches over them.

    Args:
        logits: Router logits ``(T, E)``.
        gram: Upper triangles ``(T, E (E + 1) / 2)`` of the Gram matrices.
        routing: The rule.
        sample: The sample of each token ``(T,)``.
        weights: The weight of each sample ``(S,)``.
    """

    def __init__(self, logits: Tensor, gram: Tensor, routing: RoutingRule, sample: Tensor, weights: Tensor) -> None:
        self.routing = routing
        self.gram = gram
        self.sample = sample.long()
        self.weights = weights.double()
        self.num_tokens, self.num_experts = logits.shape
        self._index = gram_index(self.num_experts)
        self.logits = logits
        # The unpruned layer's choice is the model's own; where logits tie, it decides which of them comes first.
        chosen, _ = routing.choose(logits)
        first = torch.zeros(logits.shape).scatter_(1, chosen, 1.0).sort(dim=1, descending=True, stable=True).indices
        ranking = routing.ranking(logits)
        self.order = first.gather(1, ranking.gather(1, first).sort(dim=1, descending=True, stable=True).indices)
        self.x = routing.numerators(logits)  # every sum over a subset of experts is a sum of these
        self.over_chosen = routing.normalised_over == "chosen"
        weight = self.x.gather(1, chosen)
        weight /= (weight if self.over_chosen else self.x).sum(dim=1, keepdim=True)
        # G pi and pi^T G pi of the unpruned layer.
        self.gram_pi = torch.stack(
            [(self._gram_at(chosen, expert) * weight).sum(1) for expert in range(self.num_experts)], dim=1
        )
        self.energy = (self.gram_pi.gather(1, chosen) * weight).sum(1)

    def _gram_at(self, rows: Tensor, columns: Tensor | int) -> Tensor:
        """Entries of the Gram matrices at expert ids ``rows, columns`` (broadcast, token first), in float64."""
        entries = self._index[rows, columns]
        return self.gram.gather(1, entries.reshape(len(entries), -1)).reshape(entries.shape).double()

    # -- exhaustive

    def losses(self, sets: Sequence[tuple[int, ...]]) -> Tensor:
        """Losses of retained sets of one size, ``(len(sets),)`` in float64."""
        size = len(sets[0])
        # The experts used are among this many best ones of all, whatever the set.
        window = self.routing.top_k + self.num_experts - size
        if size <= self.routing.top_k:
            return self._losses_all_used(sets)
        if window > _TABLE_BITS or math.comb(window, self.routing.top_k) > _TABLE_SUBSETS:
            return torch.stack([self._loss(retained) for retained in sets])
        return self._losses_by_rank(sets, window)

    def _losses_all_used(self, sets: Sequence[tuple[int, ...]]) -> Tensor:
        """Losses of sets so small that every token uses all of its experts."""
        ids = torch.tensor(sets)
        pairs = list(itertools.combinations_with_replacement(range(ids.shape[1]), 2))
        rows, columns = torch.triu_indices(self.num_experts, self.num_experts)
        totals = torch.zeros(len(self.weights), len(sets), dtype=torch.float64)
        per_token = 8 * (3 * len(rows) + 6 * min(len(sets), _SETS_AT_ONCE))
        for tokens in torch.arange(self.num_tokens).split(max(1, WORKING_BYTES // per_token)):
            x = self.x[tokens].T.contiguous()
            linear = x * self.gram_pi[tokens].T
            products = x[rows] * x[columns] * self.gram[tokens].T.double()
            for first in range(0, len(sets), _SETS_AT_ONCE):
                block = ids[first : first + _SETS_AT_ONCE].T
                quadratic = torch.zeros(block.shape[1], len(tokens), dtype=torch.float64)
                for i, j in pairs:  # each unordered pair stands for both of its orders
                    quadratic += (1 if i == j else 2) * products[self._index[block[i], block[j]]]
                norm = x[block].sum(0)
                error = quadratic / norm.square() - 2 * linear[block].sum(0) / norm
                error = (error + self.energy[tokens]).clamp_(min=0)
                totals[:, first : first + block.shape[1]].index_add_(0, self.sample[tokens], error.T)
        return self.weights @ totals.sqrt_()

    def _losses_by_rank(self, sets: Sequence[tuple[int, ...]], window: int) -> Tensor:
        """Losses of sets by way of the subsets of ranks that can be the chosen ones.

        A token uses the ``K`` best of a set. In the numbering of the token's own ranking these are one of ``C(window,
        K)`` subsets, far fewer than there are sets; sums over all subsets are matrix products, and a set finds its
        subset in a table under the bit mask of its ranks, itself a matrix product.
        """
        top_k = self.routing.top_k
        member = torch.zeros(len(sets), self.num_experts, dtype=torch.float64).scatter_(1, torch.tensor(sets), 1.0)
        used = list(itertools.combinations(range(window), top_k))
        lookup = _top_subset_table(window, used)
        rows, columns = torch.triu_indices(window, window)
        subsets = torch.zeros(len(used), window, dtype=torch.float64).scatter_(1, torch.tensor(used), 1.0)
        pairs = subsets[:, rows] * subsets[:, columns] * torch.where(rows == columns, 1.0, 2.0)
        bits = 2.0 ** torch.arange(window - 1, -1, -1, dtype=torch.float64)

        totals = torch.zeros(len(self.weights), len(sets), dtype=torch.float64)
        per_token = 8 * (3 * len(rows) + 4 * len(used) + 6 * min(len(sets), _SETS_AT_ONCE))
        for tokens in torch.arange(self.num_tokens).split(max(1, WORKING_BYTES // per_token)):
            ids = self.order[tokens, :window]
            x = self.x[tokens].gather(1, ids)
            products = x[:, rows] * x[:, columns]
            products *= self.gram[tokens].gather(1, self._index[ids[:, rows], ids[:, columns]])
            quadratic = products @ pairs.T
            linear = (x * self.gram_pi[tokens].gather(1, ids)) @ subsets.T
            norm = x @ subsets.T
            energy = self.energy[tokens, None]
            errors = quadratic / norm.square() - 2 * linear / norm + energy
            errors[:, 0] = 0  # the best K of all experts are all retained: nothing changes
            rank_bits = torch.zeros(len(tokens), self.num_experts, dtype=torch.float64)
            rank_bits.scatter_(1, ids, bits.expand_as(x))
            for first in range(0, len(sets), _SETS_AT_ONCE):
                block = member[first : first + _SETS_AT_ONCE].T
                which = lookup[(rank_bits @ block).long()]
                if self.over_chosen:
                    error = errors.gather(1, which)
                else:
                    total = self.x[tokens] @ block  # in place: a / total^2 - 2 b / total + energy
                    error = quadratic.gather(1, which).div_(total).sub_(linear.gather(1, which), alpha=2)
                    error.div_(total).add_(energy)
                totals[:, first : first + block.shape[1]].index_add_(0, self.sample[tokens], error.clamp_(min=0))
        return self.weights @ totals.sqrt_()

    def _loss(self, retained: tuple[int, ...]) -> Tensor:
        """The loss of one set of more than ``K`` experts, for shapes whose tables would be too large."""
        member = torch.zeros(self.num_experts, dtype=torch.bool)
        member[list(retained)] = True
        chosen = _best_of(member, self.order, self.routing.top_k)
        weight = self.x.gather(1, chosen)
        weight /= weight.sum(1, keepdim=True) if self.over_chosen else self.x[:, member].sum(1, keepdim=True)
        gram = self._gram_at(chosen[:, :, None], chosen[:, None, :])
        error = torch.einsum("ti,tij,tj->t", weight, gram, weight) + self.energy
        error -= 2 * (weight * self.gram_pi.gather(1, chosen)).sum(1)
        return reconstruction_loss(error.clamp_(min=0), self.sample, self.weights)

    def best_set(self, size: int, required: Iterable[int] = ()) -> tuple[int, ...]:
        """Of the sets of ``size`` experts that hold ``required``, the one with the least loss; ties to the first."""
        required = tuple(sorted(required))
        free = [expert for expert in range(self.num_experts) if expert not in required]
        sets = sorted(
            tuple(sorted(required + chosen)) for chosen in itertools.combinations(free, size - len(required))
        )
        losses = self.losses(sets)
        best = first_minimum(losses)
        if self.logits.dtype == torch.float32 or len(sets) == 1:
            return sets[best]
        # In lower precision the model rounds weights and meets ties: decide among the best by its own operations.
        few = torch.sort(losses, stable=True).indices[:_DECIDED_BY_DEFINITION]
        near = few[losses[few] <= 1.05 * losses[best]].sort().values.tolist()
        return sets[near[first_minimum(torch.stack([self._loss_by_definition(sets[i]) for i in near]))]]

    def _loss_by_definition(self, retained: tuple[int, ...]) -> Tensor:
        errors = squared_errors(self.logits, self.gram, self.routing, retained)
        return reconstruction_loss(errors, self.sample, self.weights)

    # -- greedy

    def eliminate(self, size: int, required: Iterable[int] = ()) -> tuple[int, ...]:
        """Greedy backward elimination: drop the expert whose removal costs least until ``size`` are left.

        Ties drop the highest index, which leaves the lexicographically first set. Dropping an expert changes the
        chosen ones only of the tokens it was chosen for, so a step costs ``T (K^2 + E)`` and not ``T E^2``.
        """
        required = set(required)
        alive = torch.ones(self.num_experts, dtype=torch.bool)
        state = _Elimination(self, alive)
        while int(alive.sum()) > size:
            candidates = [e for e in alive.nonzero().flatten().tolist() if e not in required]
            losses = state.losses_without()[candidates]
            victim = candidates[len(candidates) - 1 - first_minimum(losses.flip(0))]
            alive[victim] = False
            state.drop(victim)
        return tuple(alive.nonzero().flatten().tolist())


class _Elimination:
    """What greedy elimination keeps between steps: for each token its best ``K + 1`` experts of those alive."""

    def __init__(self, replay: Replay, alive: Tensor) -> None:
        self.replay = replay
        self.alive = alive
        tokens = replay.num_tokens
        self.best = torch.zeros(tokens, min(replay.routing.top_k + 1, replay.num_experts), dtype=torch.int64)
        self.x = torch.zeros(tokens, self.best.shape[1], dtype=torch.float64)
        self.products = torch.zeros(tokens, self.best.shape[1], self.best.shape[1], dtype=torch.float64)
        self.linear = torch.zeros_like(self.x)
        self.tail = replay.x.clone()  # numerators of those alive beyond the best
        self._refresh(torch.arange(tokens))

    def _refresh(self, rows: Tensor) -> None:
        """Find the best of those alive anew for some tokens."""
        replay, width = self.replay, min(self.best.shape[1], int(self.alive.sum()))
        best = _best_of(self.alive, replay.order[rows], width)
        x = replay.x[rows].gather(1, best)
        if width < self.best.shape[1]:  # fewer than top_k + 1 alive: the same for every token
            self.best, self.x, self.linear = self.best[:, :width], self.x[:, :width], self.linear[:, :width]
            self.products = self.products[:, :width, :width]
        self.best[rows], self.x[rows] = best, x
        self.linear[rows] = x * replay.gram_pi[rows].gather(1, best)
        gram = replay.gram[rows].gather(1, replay._index[best[:, :, None], best[:, None, :]].flatten(1))
        self.products[rows] = gram.double().view(len(rows), width, width) * x[:, :, None] * x[:, None, :]
        self.tail[rows] = (replay.x[rows] * self.alive).scatter(1, best, 0.0)

    def drop(self, expert: int) -> None:
        """Remove an expert that ``alive`` no longer holds."""
        self.tail[:, expert] = 0
        affected = (self.best == expert).any(1)
        if int(self.alive.sum()) < self.best.shape[1]:
            affected[:] = True
        self._refresh(affected.nonzero().flatten())

    def losses_without(self) -> Tensor:
        """The loss after dropping each expert, ``(E,)``; meaningless for those not alive."""
        replay, routing = self.replay, self.replay.routing
        width = self.best.shape[1]
        top_k = min(routing.top_k, width)
        # Column j: the chosen without the j-th best, its successor moved up; last: the chosen as they are.
        keeps = 1.0 - torch.eye(width, dtype=torch.float64)
        if width <= routing.top_k:  # all alive are chosen, nobody moves up
            keeps = torch.cat([keeps, torch.ones(width, 1, dtype=torch.float64)], dim=1)
        quadratic = self.products.flatten(1) @ (keeps[:, None, :] * keeps[None, :, :]).flatten(0, 1)
        linear = self.linear @ keeps
        norm = self.x @ keeps
        energy = replay.energy[:, None]
        samples, experts = len(replay.weights), replay.num_experts

        def squared(q: Tensor, n: Tensor, b: Tensor) -> Tensor:
            return (q / n.square() - 2 * b / n + energy).clamp_(min=0)

        if replay.over_chosen:
            errors = squared(quadratic, norm, linear)
            unchanged = (self.best[:, :top_k] == replay.order[:, :top_k]).all(1) if width > top_k else None
            now = errors[:, -1].clone()
            if unchanged is not None:
                now[unchanged] = 0
            totals = torch.zeros(samples, dtype=torch.float64).index_add_(0, replay.sample, now)
            totals = totals[:, None].repeat(1, experts)
            difference = errors[:, :top_k] - now[:, None]
            slot = replay.sample[:, None] * experts + self.best[:, :top_k]
            totals.view(-1).index_add_(0, slot.flatten(), difference.flatten())
        else:
            # The normaliser is the sum over all alive, chosen or not.
            rest = self.tail.sum(1, keepdim=True)
            as_they_are = quadratic[:, -1:], linear[:, -1:]
            everyone = self.x.sum(1, keepdim=True) + rest
            errors = squared(as_they_are[0], everyone - self.tail, as_they_are[1])
            chosen = squared(quadratic[:, :top_k], norm[:, :top_k] + rest, linear[:, :top_k])
            errors.scatter_(1, self.best[:, :top_k], chosen)
            if width > top_k:
                without_next = self.x[:, :top_k].sum(1, keepdim=True) + rest
                errors.scatter_(1, self.best[:, top_k:], squared(as_they_are[0], without_next, as_they_are[1]))
            totals = torch.zeros(samples, experts, dtype=torch.float64).index_add_(0, replay.sample, errors)
        return replay.weights @ totals.clamp_(min=0).sqrt_()


def _best_of(member: Tensor, order: Tensor, count: int) -> Tensor:
    """The first ``count`` experts of each ranking ``order`` ``(T, E)`` that ``member`` ``(E,)`` holds."""
    held = member[order]
    return order[held & (held.cumsum(1) <= count)].view(len(order), count)


def _top_subset_table(window: int, subsets: list[tuple[int, ...]]) -> Tensor:
    """For every bit mask over ``window`` ranks (best = highest bit), the number of the subset of its highest bits."""
    left = torch.arange(2**window)
    highest_bits = torch.zeros_like(left)
    for _ in subsets[0]:
        bit = torch.where(left > 0, 2 ** torch.log2(left.clamp(min=1).double()).floor().long(), 0)
        highest_bits += bit
        left -= bit
    number = torch.zeros_like(left)
    masks = (2 ** (window - 1 - torch.tensor(subsets))).sum(1)
    number[masks] = torch.arange(len(subsets))
    return number[highest_bits]
