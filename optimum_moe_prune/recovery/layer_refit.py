# SPDX-License-Identifier: Apache-2.0
"""The tokens that go through one MoE layer, and the refit of its retained experts to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.structure import owner, part
from ..models.blocks import MoEBlock, replace_tensor
from ..models.down import Down, SingleExpert
from ..models.experts import ExpertsForward, StandIn
from ..processes import ALONE, Processes
from ..storage.tensor_files import Shapes
from .least_squares import SWEEPS, Sums, added, best_change, energy_of, grouped, precision

_FEATURE_BYTES = 512 * 2**20  # of a group, that are there at once


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer.

    Attributes:
        layer: Its index.
        ridges: Of each group of experts; None where its weights stayed as they were.
        error_before: Mean squared error of the layer's output on tokens held back, of a token.
        error_after: The same with the new weights.
        left_out: Retained experts, by their original ids, that too few tokens reach.
        tokens_per_feature: Tokens to fit to, for each feature of an expert; of the expert with the fewest.
    """

    layer: int
    ridges: tuple[float | None, ...]
    error_before: float
    error_after: float
    left_out: tuple[int, ...]
    tokens_per_feature: float

    @property
    def is_changed(self) -> bool:
        return any(ridge is not None for ridge in self.ridges)


class LayerTokens:
    """What goes into the experts of a pruned layer, and what the cut takes from their output, of every token.

    Args:
        block: The block.
        retained: The experts that are left.
        num_tokens: Tokens, of all batches.
        num_fit: The first so many are fitted to; the others are held back.
        allocate: Makes the tensors of a layer.
        device: Where to calculate.
    """

    def __init__(
        self,
        block: MoEBlock,
        retained: Sequence[int],
        num_tokens: int,
        num_fit: int,
        allocate: Callable[[Shapes], Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.block, self.retained, self.device = block, tuple(retained), device
        self.num_tokens, self.num_fit = num_tokens, num_fit
        self.tensors: Mapping[str, Tensor] = {}
        self._allocate = allocate
        self._filled = 0
        self._routed: tuple[Tensor, Tensor, Tensor] | None = None  # of the batch at work
        self._features: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    # -- called by the block

    def left(self, own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Stands in for the retained experts, whose outputs are not needed yet."""
        self._routed = hidden, ids, weights
        return hidden.new_zeros(*hidden.shape[:-1], hidden.shape[-1] - own.scores)

    def taker(self, real: Tensor) -> StandIn:
        """What stands in for all experts in a batch, after :meth:`left`.

        Args:
            real: Rows of tokens among all rows of the batch.
        """

        def take(own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            output = own(hidden, ids, weights)
            assert self._routed is not None
            (x, chosen, applied), self._routed = self._routed, None
            rows = real.to(hidden.device)
            parts = {"x": x, "ids": chosen, "weights": applied, "residual": output}
            values = {name: value.reshape(-1, value.shape[-1])[rows] for name, value in parts.items()}
            if not self.tensors:
                dtypes = {"x": x.dtype, "ids": torch.int64}
                self.tensors = self._allocate(
                    {
                        name: ((self.num_tokens, value.shape[1]), dtypes.get(name, torch.float32))
                        for name, value in values.items()
                    }
                )
            places = slice(self._filled, self._filled + len(rows))
            for name, value in values.items():
                self.tensors[name][places] = value.cpu()
            self._filled += len(rows)
            return output

        return take

    # -- the refit

    def refit(self, down: Down, processes: Processes = ALONE) -> Refitted:
        """Solve for what the retained experts' down projections change by.

        Afterwards ``residual`` is what the refitted layer lacks of the whole one.

        Args:
            down: Where they are.
            processes: Those that share the tokens; all have the whole result.
        """
        width, experts = down.width, range(len(self.retained))
        outputs = max(processes.meet(self.tensors["residual"].shape[1] if self.tensors else 0))
        self._take_off_outputs(down)
        counts = torch.stack(processes.meet(self._counts())).sum(0).tolist()
        able = [place for place in experts if counts[place] >= width]
        groups = [_Group(self, down, [able[i] for i in group]) for group in grouped(len(able), width)]
        changes = [group.unchanged(outputs) for group in groups]
        ridges: list[float | None] = [None] * len(groups)
        before = after = sum(processes.meet(self._energy()))
        for sweep in range(SWEEPS if len(groups) > 1 else 1):
            for number, group in enumerate(groups):
                now = changes[number]
                fit, held_back = (
                    added(processes.meet(group.sums(rows, outputs))).without(now) for rows in (self.fit, self.held)
                )
                changes[number], ridge = best_change(fit, held_back, now)
                after = held_back.error(changes[number])
                ridges[number] = ridge if ridge is not None or sweep == 0 else ridges[number]
                group.take_off(changes[number] - now)
        self._features.clear()
        each: list[Tensor | None] = [None for _ in experts]
        for group, change, ridge in zip(groups, changes, ridges, strict=True):
            for i, place in enumerate(group.places):
                each[place] = change[i * width : (i + 1) * width] if ridge is not None else None
        held = sum(processes.meet(len(self.held))) or 1
        fewest = min((counts[place] / width for place in able), default=0.0)
        left_out = tuple(self.retained[place] for place in experts if place not in able)
        result = LayerResult(self.block.layer, tuple(ridges), before / held, after / held, left_out, fewest)
        return Refitted(tuple(each), result)

    @property
    def fit(self) -> range:
        """The tokens that are fitted to."""
        return range(self.num_fit)

    @property
    def held(self) -> range:
        """The tokens that are held back."""
        return range(self.num_fit, self.num_tokens)

    @functools.cached_property
    def places(self) -> Tensor:
        """Of each token's choices ``(T, K)`` the place among the retained, or -1 where that is no expert."""
        ids = self.tensors["ids"]
        places = torch.full((max([int(ids.max()), *self.retained]) + 1,), -1)
        places[list(self.retained)] = torch.arange(len(self.retained))
        return places[ids]

    def chunks(self, tokens: range, down: Down) -> list[range]:
        """Tokens whose features are there at once."""
        routed = self.tensors["ids"].shape[1] if self.tensors else 1
        size = max(1, _FEATURE_BYTES // (4 * down.width * routed))
        return [range(first, min(first + size, tokens.stop)) for first in range(tokens.start, tokens.stop, size)]

    def features(self, place: int, chunk: range, down: Down) -> tuple[Tensor, Tensor]:
        """Weighted features of an expert's tokens ``(t, I)``, and which of a chunk these are ``(t,)``."""
        if (kept := self._features.get((place, chunk.start))) is not None:
            return kept
        phi, rows, _ = self._run(place, chunk, down)
        return phi, rows

    def _run(self, place: int, chunk: range, down: Down) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the expert's weighted outputs ``(t, H)``."""
        of_chunk = slice(chunk.start, chunk.stop)
        rows, slots = (self.places[of_chunk] == place).nonzero().unbind(1)
        if not len(rows):  # experts that no token reaches are not run by some models
            empty = torch.zeros(0, self.tensors["residual"].shape[1], device=self.device)
            return empty.new_zeros(0, down.width), rows.to(self.device), empty
        x, weight = (self.tensors[name][of_chunk] for name in ("x", "weights"))
        x, weight = x[rows].to(self.device), weight[rows, slots, None].to(self.device)
        phi, output = SingleExpert(self.block, self.retained[place]).features(x, down)
        return phi.mul_(weight), rows.to(self.device), output.mul_(weight)

    def _take_off_outputs(self, down: Down) -> None:
        """Take what the retained experts give off what all gave; features are kept where all of them fit."""
        every = [*self.chunks(self.fit, down), *self.chunks(self.held, down)]
        keeps = len(every) <= 2
        for chunk in every:
            residual = self.tensors["residual"][chunk.start : chunk.stop]
            for place in range(len(self.retained)):
                phi, rows, output = self._run(place, chunk, down)
                residual.index_add_(0, rows.cpu(), output.cpu(), alpha=-1)
                if keeps:
                    self._features[place, chunk.start] = phi, rows

    def _counts(self) -> Tensor:
        """Tokens to fit to of each retained expert."""
        count = len(self.retained)
        if not self.num_fit:
            return torch.zeros(count, dtype=torch.int64)
        return torch.bincount(self.places[: self.num_fit].flatten() + 1, minlength=count + 1)[1:]

    def _energy(self) -> float:
        """The squared error on tokens held back."""
        return float(energy_of(self.tensors["residual"][self.num_fit :])) if len(self.held) else 0.0


@dataclass(frozen=True)
class Refitted:
    """What a refit gives.

    Attributes:
        changes: Of each retained expert's down projection ``(I, H)``; None where it stays as it was.
        result: What became of the layer.
    """

    changes: tuple[Tensor | None, ...]
    result: LayerResult


class _Group:
    """Experts that are solved for together.

    Args:
        layer: The tokens of the layer.
        down: Where the down projections are.
        places: Of the experts, among the retained.
    """

    def __init__(self, layer: LayerTokens, down: Down, places: Sequence[int]) -> None:
        self.layer, self.down, self.places = layer, down, tuple(places)

    def unchanged(self, outputs: int) -> Tensor:
        """A change of the weights by nothing."""
        features = len(self.places) * self.down.width
        return torch.zeros(features, outputs, dtype=precision(features), device=self.layer.device)

    def sums(self, tokens: range, outputs: int) -> Sums:
        """Sums over some of the tokens."""
        total = Sums.zeros(len(self.places) * self.down.width, outputs, self.layer.device)
        for chunk in self.layer.chunks(tokens, self.down):
            found = [self.layer.features(place, chunk, self.down) for place in self.places]
            residual = self.layer.tensors["residual"][chunk.start : chunk.stop].to(self.layer.device)
            total.add([phi for phi, _ in found], [rows for _, rows in found], residual)
        return total

    def take_off(self, change: Tensor) -> None:
        """Take what a change of the weights gives off the residuals of all tokens."""
        width, change = self.down.width, change.float()
        for tokens in (self.layer.fit, self.layer.held):
            for chunk in self.layer.chunks(tokens, self.down):
                residual = self.layer.tensors["residual"][chunk.start : chunk.stop]
                for i, place in enumerate(self.places):
                    phi, rows = self.layer.features(place, chunk, self.down)
                    given = phi @ change[i * width : (i + 1) * width]
                    residual.index_add_(0, rows.cpu(), given.cpu(), alpha=-1)


def with_changes(
    block: MoEBlock, retained: Sequence[int], down: Down, changes: Sequence[Tensor | None], dtype: torch.dtype
) -> Tensor:
    """The down projections of the retained experts with their changes, rounded once.

    Args:
        block: The block, whose tensors are there.
        retained: Ids of the experts.
        down: Where the down projections are.
        changes: Of each ``(I, H)``, or None.
        dtype: The precision that they are kept in.

    Returns:
        ``(R, H, I)`` or, transposed, ``(R, I, H)``.
    """
    made = []
    for expert, change in zip(retained, changes, strict=True):
        own = matrix_of(block, down, expert).detach()
        if change is not None:
            turned = change if down.transposed else change.T
            own = own.double() + turned.to(own.device, torch.float64).reshape(own.shape)
        made.append(own.to(dtype))
    return torch.stack(made)


def replace_down(block: MoEBlock, retained: Sequence[int], down: Down, values: Tensor) -> Callable[[], None]:
    """Give retained experts of a loaded block other down projections; a function that undoes it."""
    if block.structure.numbered:
        experts: Any = block.experts
        pairs = [owner(experts[expert], down.path) for expert in retained]
        before = [getattr(module, name) for module, name in pairs]
        for (module, name), value in zip(pairs, values, strict=True):
            replace_tensor(module, name, value.to(getattr(module, name).dtype).view_as(getattr(module, name)))
    else:
        pairs = [owner(block.decoder_layer, down.path)]
        before = [getattr(*pairs[0])]
        whole = before[0].detach().clone()  # another tensor: what is kept of the one before is kept by its identity
        whole[list(retained)] = values.to(whole.device, whole.dtype).view_as(whole[list(retained)])
        replace_tensor(*pairs[0], whole)

    def undo() -> None:
        for (module, name), value in zip(pairs, before, strict=True):
            setattr(module, name, value)

    return undo


def matrix_of(block: MoEBlock, down: Down, expert: int) -> Tensor:
    """An expert's down projection, as the model has it."""
    if block.structure.numbered:
        experts: Any = block.experts
        return part(experts[expert], down.path)
    return part(block.decoder_layer, down.path)[expert]
