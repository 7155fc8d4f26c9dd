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
from ..models.experts import ExpertsForward
from ..processes import ALONE, Processes
from ..storage.tensor_files import Shapes
from .least_squares import SWEEPS, Sums, added, best_change, grouped, precision

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
    """What went into the experts of a pruned layer, and what the cut takes from their output, of every token.

    Args:
        block: The block.
        retained: The experts that are left.
        num_tokens: Tokens, of all batches.
        num_fit: The first so many are fitted to; the others are held back.
        allocate: Makes the tensors of a layer.
    """

    def __init__(
        self,
        block: MoEBlock,
        retained: Sequence[int],
        num_tokens: int,
        num_fit: int,
        allocate: Callable[[Shapes], Mapping[str, Tensor]],
    ) -> None:
        self.block = block
        self.retained = tuple(retained)
        self.num_tokens, self.num_fit = num_tokens, num_fit
        self._allocate = allocate
        self._tensors: Mapping[str, Tensor] = {}
        self._filled = 0
        self._whole: Tensor | None = None  # of the batch at work: the output of all experts

    def seen(self, real: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """What takes a batch's run with the retained experts, after the one with all of them.

        Args:
            real: Rows of tokens among all rows of the batch.
        """

        def take(hidden: Tensor, ids: Tensor, weights: Tensor, output: Tensor) -> None:
            rows = real.to(hidden.device)
            assert self._whole is not None
            x, output = hidden.reshape(-1, hidden.shape[-1])[rows], output.reshape(-1, output.shape[-1])[rows]
            whole, self._whole = self._whole[rows], None
            values = {
                "x": x,
                "ids": ids.reshape(-1, ids.shape[-1])[rows],
                "weights": weights.reshape(-1, weights.shape[-1])[rows],
                "residual": whole.float() - output.float(),
            }
            if not self._tensors:
                dtypes = {"x": x.dtype, "ids": torch.int64}
                shapes: Shapes = {
                    name: ((self.num_tokens, value.shape[1]), dtypes.get(name, torch.float32))
                    for name, value in values.items()
                }
                self._tensors = self._allocate(shapes)
            for name, value in values.items():
                self._tensors[name][self._filled : self._filled + len(value)] = value.cpu()
            self._filled += len(x)

        return take

    def all_experts(self, own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Stands in for the experts in the run with all of them."""
        output = own(hidden, ids, weights)
        self._whole = output.reshape(-1, output.shape[-1])
        return output

    def refit(self, down: Down, device: torch.device, processes: Processes = ALONE) -> Refitted:
        """Solve for what the retained experts' down projections change by.

        Args:
            down: Where they are.
            device: Where to calculate.
            processes: Those that share the tokens; all have the whole result.
        """
        width, experts = down.width, len(self.retained)
        outputs = self._width(processes)
        counts = torch.stack(processes.meet(self._routed())).sum(0)
        able = [place for place, count in enumerate(counts.tolist()) if count >= width]
        groups = [_Group(self, down, [able[i] for i in group], device) for group in grouped(len(able), width)]
        changes = [group.unchanged(outputs) for group in groups]
        ridges: list[float | None] = [None] * len(groups)
        residual = self.tensors.get("residual", torch.zeros(0, outputs))
        before = sum(processes.meet(_energy(residual[self.num_fit :])))
        after = before
        for sweep in range(SWEEPS if len(groups) > 1 else 1):
            for number, group in enumerate(groups):
                now = changes[number]
                fit, held_back = (
                    added(processes.meet(group.sums(rows, outputs))).without(now) for rows in (self.fit, self.held)
                )
                changes[number], ridge = best_change(fit, held_back, now)
                after = held_back.error(changes[number])
                ridges[number] = ridge if ridge is not None or sweep == 0 else ridges[number]
                if len(groups) > 1:
                    group.take_off(changes[number] - now, residual)
        each: list[Tensor | None] = [None] * experts
        for group, change, ridge in zip(groups, changes, ridges, strict=True):
            for i, place in enumerate(group.places):
                each[place] = change[i * width : (i + 1) * width] if ridge is not None else None
        held = sum(processes.meet(self.num_tokens - self.num_fit)) or 1
        fewest = min((float(counts[place]) / width for place in able), default=0.0)
        left_out = tuple(self.retained[place] for place in range(experts) if place not in able)
        return Refitted(
            tuple(each),
            LayerResult(self.block.layer, tuple(ridges), before / held, after / held, left_out, fewest),
        )

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What was seen of every token, by name."""
        return self._tensors

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
        ids = self._tensors["ids"]
        places = torch.full((max([int(ids.max()), *self.retained]) + 1,), -1)
        places[list(self.retained)] = torch.arange(len(self.retained))
        return places[ids]

    def _routed(self) -> Tensor:
        """Tokens to fit to of each retained expert."""
        count = len(self.retained)
        if not self.num_fit:
            return torch.zeros(count, dtype=torch.int64)
        return torch.bincount(self.places[: self.num_fit].flatten() + 1, minlength=count + 1)[1:]

    def _width(self, processes: Processes) -> int:
        """H, which a process without tokens learns from the others."""
        own = self._tensors["residual"].shape[1] if self._tensors else 0
        return max(processes.meet(own))


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
        device: Where to calculate.
    """

    def __init__(self, layer: LayerTokens, down: Down, places: Sequence[int], device: torch.device) -> None:
        self.layer, self.down, self.places, self.device = layer, down, tuple(places), device
        self._kept: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def unchanged(self, outputs: int) -> Tensor:
        """A change of the weights by nothing."""
        features = len(self.places) * self.down.width
        return torch.zeros(features, outputs, dtype=precision(features), device=self.device)

    def sums(self, tokens: range, outputs: int) -> Sums:
        """Sums over some of the tokens."""
        total = Sums.zeros(len(self.places) * self.down.width, outputs, self.device)
        chunks = self._chunks(tokens)
        for chunk in chunks:
            phi, rows = self._features(chunk)
            if len(chunks) == 1:
                self._kept[chunk.start] = (phi, rows)
            total.add(phi, rows, self.layer.tensors["residual"][chunk.start : chunk.stop].to(self.device))
        return total

    def take_off(self, change: Tensor, residual: Tensor) -> None:
        """Take what a change of the weights gives off the residuals of all tokens."""
        width = self.down.width
        change = change.float()
        for tokens in (self.layer.fit, self.layer.held):
            for chunk in self._chunks(tokens):
                phi, rows = self._kept.pop(chunk.start, None) or self._features(chunk)
                for i, (a, of_a) in enumerate(zip(phi, rows, strict=True)):
                    residual[chunk.start + of_a.cpu()] -= (a @ change[i * width : (i + 1) * width]).cpu()

    def _chunks(self, tokens: range) -> list[range]:
        """Tokens whose features are there at once."""
        routed = self.layer.tensors["ids"].shape[1] if self.layer.tensors else 1
        size = max(1, _FEATURE_BYTES // (4 * self.down.width * min(routed, max(1, len(self.places)))))
        return [range(first, min(first + size, tokens.stop)) for first in range(tokens.start, tokens.stop, size)]

    def _features(self, chunk: range) -> tuple[list[Tensor], list[Tensor]]:
        """Weighted features of each expert's tokens ``(t, I)``, and which tokens of the chunk these are ``(t,)``."""
        tensors, phi, rows = self.layer.tensors, [], []
        of_chunk = slice(chunk.start, chunk.stop)
        places = self.layer.places[of_chunk]
        x, weights = (tensors[name][of_chunk].to(self.device) for name in ("x", "weights"))
        for place in self.places:
            at, slots = (places == place).nonzero().unbind(1)
            at, slots = at.to(self.device), slots.to(self.device)
            if len(at):
                single = SingleExpert(self.layer.block, self.layer.retained[place])
                phi.append(single.features(x[at], self.down) * weights[at, slots, None])
            else:
                phi.append(x.new_zeros(0, self.down.width, dtype=torch.float32))
            rows.append(at)
        return phi, rows


def _energy(residual: Tensor) -> float:
    return float(residual.double().square().sum())


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
