# SPDX-License-Identifier: Apache-2.0
"""Searches over retained sets by the replay's losses: all sets of a size, and greedy elimination.

Where a rule ranks experts (``RoutingRule.ranked``), the weights of a set's chosen experts follow from its ranking,
numerators and normalisation, and thousands of sets share their sums. Any other rule is asked set by set.

Shapes: E experts, T tokens, S samples, K top_k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..architectures.routers import RoutingRule
from ..errors import RequestError
from ..progress import working
from .replay import (
    WORKING_BYTES,
    check_replays,
    errors_without,
    first_minimum,
    gram_entries,
    gram_index,
    minima,
    reconstruction_loss,
    squared_errors,
)
from .replay_leaders import Found, Leaders, rank_tables
from .sets import RetainedSet, differing, num_sets, sets_of

_TABLE_BITS = 20  # a table of 2**20 entries at most
_TABLE_SUBSETS = 20_000
_SETS_AT_ONCE = 512
_CHUNK_SETS = 65_536  # a multiple of _SETS_AT_ONCE
_CHUNK_BYTES = 128 * 2**20
_DECIDED_BY_DEFINITION = 8  # sets
_NONE_LEFT = "no set with the protected experts is one that the model's routers admit; protect fewer, or keep more."


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
        self.logits = logits
        self.gram = gram
        self.sample = sample.long()
        self.weights = weights.double()
        check_replays(routing)
        self.num_tokens, self.num_experts = len(logits), logits.shape[1] - routing.fixed
        self.index = gram_index(self.num_experts)
        if routing.ranked:
            self._prepare()

    def _prepare(self) -> None:
        """What all sets share: the order of experts, their numerators, and the unpruned layer's output."""
        logits, routing = self.logits, self.routing
        # The unpruned layer's choice is the model's own; where experts tie, it decides which of them comes first.
        chosen, _ = routing.choose(logits)
        first = _in_front(chosen, logits.shape[1])
        ranking = routing.ranking(logits)
        self.order = first.gather(1, ranking.gather(1, first).sort(dim=1, descending=True, stable=True).indices)
        # An expert's weight is y over a sum of x; every sum over a subset of experts is a sum of these.
        self.x = self.y = routing.numerators(logits)
        if routing.scale != 1.0:
            self.y = self.x * torch.as_tensor(routing.scale, dtype=torch.float64)
        self.over_retained = routing.normalised_over == "retained"
        normalised = self.x if self.over_retained else self.x.gather(1, chosen)
        weight = self.y.gather(1, chosen) / self.normaliser(normalised.sum(dim=1, keepdim=True))
        # G pi and pi^T G pi of the unpruned layer.
        size = max(1, WORKING_BYTES // (16 * chosen.shape[1] * self.num_experts))
        self.gram_pi = torch.empty(self.num_tokens, self.num_experts, dtype=torch.float64)
        for tokens in torch.arange(self.num_tokens).split(size):
            entries = self.index[chosen[tokens]]
            among = self.gram[int(tokens[0]) : int(tokens[-1]) + 1].gather(1, entries.flatten(1)).view(entries.shape)
            self.gram_pi[tokens] = (among.double() * weight[tokens, :, None]).sum(1)
        self.energy = (self.gram_pi.gather(1, chosen) * weight).sum(1)

    def normaliser(self, total: Tensor) -> Tensor:
        """The denominator of weights, given the sum of the numerators that count; it may be ``total`` itself."""
        if self.routing.normalised_over == "none":
            return torch.ones_like(total)
        return total + self.routing.epsilon if self.routing.epsilon else total

    def _gram_at(self, rows: Tensor, columns: Tensor | int) -> Tensor:
        """Entries of the Gram matrices at expert ids ``rows, columns`` (broadcast, token first), in float64."""
        entries = self.index[rows, columns]
        return self.gram.gather(1, entries.reshape(len(entries), -1)).reshape(entries.shape).double()

    def gram_among(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """Of some tokens ``(n,)`` the entries among experts of their own ``(n, k)``: ``(n, k, k)`` float64."""
        return gram_entries(self.gram, tokens, self.index[experts[:, :, None], experts[:, None, :]])

    # -- losses

    def losses(self, sets: Sequence[RetainedSet]) -> Tensor:
        """Losses of retained sets of one size, ``(len(sets),)`` in float64."""
        size = len(sets[0])
        # The experts used are among this many best ones of all, whatever the set.
        window = self.routing.top_k + self.num_experts - size
        if not self.routing.ranked:
            return torch.stack([self.loss_by_definition(retained) for retained in sets])
        if size <= self.routing.top_k:
            return self._losses_all_used(sets)
        if window > _TABLE_BITS or math.comb(window, self.routing.top_k) > _TABLE_SUBSETS:
            return torch.stack([self._loss(retained) for retained in sets])
        return self._losses_by_rank(sets, window)

    def loss_by_definition(self, retained: Sequence[int]) -> Tensor:
        """The loss of one set by the rule's own choice and weights."""
        errors = squared_errors(self.logits, self.gram, self.routing, retained)
        return reconstruction_loss(errors, self.sample, self.weights)

    def _loss(self, retained: RetainedSet) -> Tensor:
        """The loss of one set of more than ``K`` experts, for shapes whose tables would be too large."""
        member = torch.zeros(self.num_experts, dtype=torch.bool)
        member[list(retained)] = True
        chosen = _best_of(member, self.order, self.routing.top_k)
        normalised = self.x[:, member] if self.over_retained else self.x.gather(1, chosen)
        weight = self.y.gather(1, chosen) / self.normaliser(normalised.sum(1, keepdim=True))
        gram = self._gram_at(chosen[:, :, None], chosen[:, None, :])
        error = torch.einsum("ti,tij,tj->t", weight, gram, weight) + self.energy
        error -= 2 * (weight * self.gram_pi.gather(1, chosen)).sum(1)
        return reconstruction_loss(error.clamp_(min=0), self.sample, self.weights)

    def _losses_all_used(self, sets: Sequence[RetainedSet]) -> Tensor:
        """Losses of sets so small that every token uses all of its experts."""
        ids = torch.tensor(sets)
        pairs = list(itertools.combinations_with_replacement(range(ids.shape[1]), 2))
        rows, columns = torch.triu_indices(self.num_experts, self.num_experts)
        totals = torch.zeros(len(self.weights), len(sets), dtype=torch.float64)
        per_token = 8 * (3 * len(rows) + 6 * min(len(sets), _SETS_AT_ONCE))
        for tokens in torch.arange(self.num_tokens).split(max(1, WORKING_BYTES // per_token)):
            x, y = self.x[tokens].T.contiguous(), self.y[tokens].T.contiguous()
            linear = y * self.gram_pi[tokens].T
            products = y[rows] * y[columns] * self.gram[tokens].T.double()
            for first in range(0, len(sets), _SETS_AT_ONCE):
                block = ids[first : first + _SETS_AT_ONCE].T
                quadratic = torch.zeros(block.shape[1], len(tokens), dtype=torch.float64)
                for i, j in pairs:  # each unordered pair stands for both of its orders
                    quadratic += (1 if i == j else 2) * products[self.index[block[i], block[j]]]
                norm = self.normaliser(x[block].sum(0))
                error = quadratic / norm.square() - 2 * linear[block].sum(0) / norm
                error = (error + self.energy[tokens]).clamp_(min=0)
                totals[:, first : first + block.shape[1]].index_add_(0, self.sample[tokens], error.T)
        return self.weights @ totals.sqrt_()

    def _losses_by_rank(self, sets: Sequence[RetainedSet], window: int) -> Tensor:
        """Losses of sets by way of the subsets of ranks that can be the chosen ones.

        A token uses the ``K`` best of a set. In the numbering of the token's own ranking these are one of ``C(window,
        K)`` subsets, far fewer than there are sets; sums over all subsets are matrix products, and a set finds its
        subset in a table under the bit mask of its ranks, itself a matrix product.
        """
        member = torch.zeros(len(sets), self.num_experts, dtype=torch.float64).scatter_(1, torch.tensor(sets), 1.0)
        lookup, subsets, pairs = rank_tables(window, self.routing.top_k)
        rows, columns = torch.triu_indices(window, window)
        bits = 2.0 ** torch.arange(window - 1, -1, -1, dtype=torch.float64)

        totals = torch.zeros(len(self.weights), len(sets), dtype=torch.float64)
        per_token = 8 * (3 * len(rows) + 4 * len(subsets) + 6 * min(len(sets), _SETS_AT_ONCE))
        for tokens in torch.arange(self.num_tokens).split(max(1, WORKING_BYTES // per_token)):
            ids = self.order[tokens, :window]
            y = self.y[tokens].gather(1, ids)
            products = y[:, rows] * y[:, columns]
            products *= self.gram[tokens].gather(1, self.index[ids[:, rows], ids[:, columns]])
            quadratic = products @ pairs.T
            linear = (y * self.gram_pi[tokens].gather(1, ids)) @ subsets.T
            energy = self.energy[tokens, None]
            if not self.over_retained:
                norm = self.normaliser(self.x[tokens].gather(1, ids) @ subsets.T)
                errors = quadratic / norm.square() - 2 * linear / norm + energy
                errors[:, 0] = 0  # the best K of all experts are all retained: nothing changes
            rank_bits = torch.zeros(len(tokens), self.num_experts, dtype=torch.float64)
            rank_bits.scatter_(1, ids, bits.expand_as(y))
            for first in range(0, len(sets), _SETS_AT_ONCE):
                block = member[first : first + _SETS_AT_ONCE].T
                which = lookup[(rank_bits @ block).long()]
                if self.over_retained:
                    norm = self.normaliser(self.x[tokens] @ block)
                    error = quadratic.gather(1, which).div_(norm).sub_(linear.gather(1, which), alpha=2)
                    error.div_(norm).add_(energy)  # in place: a / norm^2 - 2 b / norm + energy
                else:
                    error = errors.gather(1, which)
                totals[:, first : first + block.shape[1]].index_add_(0, self.sample[tokens], error.clamp_(min=0))
        return self.weights @ totals.sqrt_()

    # -- exhaustive search

    def best_set(self, size: int, required: Iterable[int] = ()) -> RetainedSet:
        """Of the sets of ``size`` experts that hold ``required``, the one with the least loss; ties to the first.

        Raises:
            RequestError: If the rule admits none.
            RunError: If a loss is NaN or infinite.
        """
        return self.search_all(size, required).retained

    def search_all(self, size: int, required: Iterable[int] = ()) -> Found:
        """As :meth:`best_set`, with the experts between which only their numbers decided."""
        # In lower precision the model rounds weights and meets ties: decide among the best by its own operations.
        exact = self.logits.dtype == torch.float32
        leaders = Leaders(0 if exact else _DECIDED_BY_DEFINITION)
        required = tuple(sorted(required))
        with working("trying sets", num_sets(self.routing, self.num_experts, size, required), "set", "tried") as work:
            for sets in work.over(self._sets(size, required), len):
                leaders.add(sets, self.losses(sets))
        if not leaders.first:
            raise RequestError(_NONE_LEFT)
        loss, best = leaders.first[0]
        if exact:
            return Found(best, leaders.tied)
        close = sorted(retained for other, retained in leaders.smallest if other <= 1.05 * loss)
        losses = torch.stack([self.loss_by_definition(retained) for retained in close])
        return Found(close[first_minimum(losses)], differing([close[i] for i in minima(losses)]))

    def _sets(self, size: int, required: RetainedSet) -> Iterator[list[RetainedSet]]:
        """The sets of ``size`` experts that hold ``required``, in lexicographic order, so many at once."""
        left = num_sets(self.routing, self.num_experts, size, required)
        sets = sets_of(self.routing, self.num_experts, size, required)
        if not self.routing.ranked:
            sets = (retained for retained in sets if self.routing.admits(retained, size, self.num_experts))
        room = _CHUNK_BYTES // (8 * (len(self.weights) + self.num_experts))
        count = max(_SETS_AT_ONCE, min(_CHUNK_SETS, room // _SETS_AT_ONCE * _SETS_AT_ONCE))
        # No short rest, which would be summed in another order than the others.
        while chunk := list(itertools.islice(sets, count if left >= count + _SETS_AT_ONCE else left)):
            yield chunk
            left -= len(chunk)

    # -- greedy search

    def eliminate(self, size: int, required: Iterable[int] = ()) -> RetainedSet:
        """Greedy backward elimination: drop the expert whose removal costs least until ``size`` are left.

        Ties drop the highest index, which leaves the lexicographically first set. Dropping an expert changes the
        chosen ones only of the tokens it was chosen for, so a step costs ``T (K^2 + E)`` and not ``T E^2``.

        Raises:
            RequestError, RunError: As :meth:`best_set`.
        """
        return self.search_greedily(size, required).retained

    def search_greedily(self, size: int, required: Iterable[int] = ()) -> Found:
        """As :meth:`eliminate`, with the experts between which only their numbers decided."""
        equals: list[set[int]] = []
        required = set(required)
        alive = torch.ones(self.num_experts, dtype=torch.bool)
        routing = self.routing
        state = _Elimination(self, alive) if routing.ranked else None
        while len(left := alive.nonzero().flatten().tolist()) > size:
            candidates = [e for e in left if e not in required]
            if not routing.ranked or routing.groups > 1:
                rests = {e: tuple(other for other in left if other != e) for e in candidates}
                candidates = [e for e in candidates if routing.admits(rests[e], size, self.num_experts)]
                if not candidates:
                    raise RequestError(_NONE_LEFT)
            if state is not None:
                losses = state.losses_without()[candidates]
            else:
                errors = errors_without(self.logits, self.gram, routing, left, candidates)
                losses = reconstruction_loss(errors, self.sample, self.weights)
            victim = candidates[len(candidates) - 1 - first_minimum(losses.flip(0))]
            equals.append({candidates[i] for i in minima(losses)})
            alive[victim] = False
            if state is not None:
                state.drop(victim)
        # Of experts that could as well have gone first it matters which one did where another is still there.
        tied = set().union(*(some for some in equals if some & set(left)))
        return Found(tuple(left), tuple(sorted(tied)))


# ----------------------------------------------------------------------------------------- greedy search, its parts


class _Elimination:
    """What greedy elimination keeps between steps: of each token its best ``K + 1`` experts of those alive.

    And what follows from them, which changes only for the tokens that lose one of them:
    ``quadratic``, ``linear`` and ``total`` (the sums that an error is made of) in column j without the j-th best, its
    successor moved up, and in the last one as they are; and where no other experts count in it, the error itself.
    """

    def __init__(self, replay: Replay, alive: Tensor) -> None:
        self.replay = replay
        self.alive = alive
        if replay.over_retained:
            self.tail = replay.x.clone()  # numerators of those alive beyond the best
        self._allocate(min(replay.routing.top_k + 1, replay.num_experts))
        self._refresh(torch.arange(replay.num_tokens))

    def _allocate(self, width: int) -> None:
        tokens, top_k = self.replay.num_tokens, self.replay.routing.top_k
        self.width, self.top_k = width, min(top_k, width)
        self.best = torch.zeros(tokens, width, dtype=torch.int64)
        self.keeps = 1.0 - torch.eye(width, dtype=torch.float64)
        if width <= top_k:  # all alive are chosen, nobody moves up
            self.keeps = torch.cat([self.keeps, torch.ones(width, 1, dtype=torch.float64)], dim=1)
        if self.replay.over_retained:
            self.chosen_x = torch.zeros(tokens, width, dtype=torch.float64)
            self.sums = torch.zeros(3, tokens, self.keeps.shape[1], dtype=torch.float64)
        else:
            self.now = torch.zeros(tokens, dtype=torch.float64)
            self.more = torch.zeros(tokens, self.top_k, dtype=torch.float64)

    def _refresh(self, rows: Tensor) -> None:
        """Find the best of those alive anew for some tokens."""
        replay, keeps = self.replay, self.keeps
        best = _best_of(self.alive, replay.order[rows], self.width)
        x = replay.x[rows].gather(1, best)
        y = x if replay.y is replay.x else replay.y[rows].gather(1, best)
        products = replay.gram_among(rows, best) * y[:, :, None] * y[:, None, :]
        quadratic = products.flatten(1) @ (keeps[:, None, :] * keeps[None, :, :]).flatten(0, 1)
        linear = (y * replay.gram_pi[rows].gather(1, best)) @ keeps
        self.best[rows] = best
        if replay.over_retained:
            self.chosen_x[rows] = x
            self.sums[:, rows] = torch.stack([quadratic, linear, x @ keeps])
            self.tail[rows] = (replay.x[rows] * self.alive).scatter(1, best, 0.0)
            return
        errors = self._squared(quadratic, x @ keeps, linear, replay.energy[rows, None])
        now = errors[:, -1].clone()
        if self.width > self.top_k:
            now[(best[:, : self.top_k] == replay.order[rows, : self.top_k]).all(1)] = 0
        self.now[rows], self.more[rows] = now, errors[:, : self.top_k] - now[:, None]

    def _squared(self, quadratic: Tensor, total: Tensor, linear: Tensor, energy: Tensor) -> Tensor:
        norm = self.replay.normaliser(total)
        return (quadratic / norm.square() - 2 * linear / norm + energy).clamp_(min=0)

    def drop(self, expert: int) -> None:
        """Go on without an expert that ``alive`` no longer holds."""
        if self.replay.over_retained:
            self.tail[:, expert] = 0
        left = int(self.alive.sum())
        if left < self.width:  # fewer than top_k + 1 alive: the same for every token
            self._allocate(left)
            self._refresh(torch.arange(self.replay.num_tokens))
        else:
            self._refresh((self.best == expert).any(1).nonzero().flatten())

    def losses_without(self) -> Tensor:
        """The loss after dropping each expert, ``(E,)``; meaningless for those not alive."""
        replay, top_k = self.replay, self.top_k
        samples, experts = len(replay.weights), replay.num_experts
        if not replay.over_retained:  # only tokens that the dropped expert was chosen for change
            totals = torch.zeros(samples, dtype=torch.float64).index_add_(0, replay.sample, self.now)
            totals = totals[:, None].repeat(1, experts)
            slot = replay.sample[:, None] * experts + self.best[:, :top_k]
            totals.view(-1).index_add_(0, slot.flatten(), self.more.flatten())
            return replay.weights @ totals.clamp_(min=0).sqrt_()
        quadratic, linear, total = self.sums
        energy, rest = replay.energy[:, None], self.tail.sum(1, keepdim=True)
        everyone = self.chosen_x.sum(1, keepdim=True) + rest
        errors = self._squared(quadratic[:, -1:], everyone - self.tail, linear[:, -1:], energy)
        chosen = self._squared(quadratic[:, :top_k], total[:, :top_k] + rest, linear[:, :top_k], energy)
        errors.scatter_(1, self.best[:, :top_k], chosen)
        if self.width > top_k:
            without_next = self.chosen_x[:, :top_k].sum(1, keepdim=True) + rest
            next_gone = self._squared(quadratic[:, -1:], without_next, linear[:, -1:], energy)
            errors.scatter_(1, self.best[:, top_k:], next_gone)
        totals = torch.zeros(samples, experts, dtype=torch.float64).index_add_(0, replay.sample, errors)
        return replay.weights @ totals.clamp_(min=0).sqrt_()


def _in_front(chosen: Tensor, num_experts: int) -> Tensor:
    """All experts for each token ``(T, E)``, the chosen ones ``(T, K)`` first, both in rising order."""
    is_chosen = torch.zeros(len(chosen), num_experts, dtype=torch.int64).scatter_(1, chosen, 1)
    before = is_chosen.cumsum(1)
    everyone = torch.arange(num_experts).expand_as(is_chosen)
    place = torch.where(is_chosen > 0, before - 1, chosen.shape[1] + everyone - before)
    return torch.empty_like(is_chosen).scatter_(1, place, everyone)


def _best_of(member: Tensor, order: Tensor, count: int) -> Tensor:
    """The first ``count`` experts of each ranking ``order`` ``(T, E)`` that ``member`` ``(E,)`` holds."""
    held = member[order]
    return order[held & (held.cumsum(1) <= count)].view(len(order), count)
