# SPDX-License-Identifier: Apache-2.0
"""What is gathered of one MoE layer while it runs, whether the model is in memory or one layer of it.

The chosen experts and their weights are taken where the model uses them. Outputs of single experts come from the
model's own experts implementation, asked for one expert per row with weight 1, so that every architecture, dtype and
kernel is observed as it is. What it costs depends on what is asked for:

- *routing*: the model's own forward; only the router is watched.
- *routed*: the experts run once on the tokens routed to them, as in the plain forward, and the block's output is put
  together here from their outputs.
- *dense*: every expert runs once on every token, in chunks; the block's output is put together from those.

Shapes: E experts, T tokens, S samples, N kept tokens, K top_k, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RunError
from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.experts import ExpertsForward
from ..statistics.needs import DENSE, Need, layer_shapes
from ..statistics.samples import keep_tokens
from ..statistics.stats import LayerStats
from ..storage.tensor_files import Shapes, all_finite
from .samples import CalibrationSet

_CHUNK_BYTES = 128 * 2**20  # outputs of all experts for a chunk of tokens, in float32

Allocate = Callable[[int, Shapes], Mapping[str, Tensor]]
"""A layer's index and the shapes of its tensors -> the tensors, zeros or what an interrupted run had gathered."""


def _sizes(y: Tensor) -> Tensor:
    """Norm and largest absolute element of outputs ``(..., H)``: ``(2, ...)`` float32."""
    orders = (2, math.inf)
    return torch.stack([torch.linalg.vector_norm(y, ord=o, dim=-1, dtype=torch.float32) for o in orders])


def _weighted_sum(y: Tensor, weight: Tensor) -> Tensor:
    """The experts' output ``(T, H)`` from ``(T, K, H)`` and ``(T, K)``, rounded as transformers rounds."""
    return (y * weight[..., None]).sum(1).to(y.dtype)


class Current:
    """The batch being computed: which rows of hidden states are real tokens, of which samples, kept as which rows.

    Args:
        calibration: All samples.
        max_tokens: The most tokens for which statistics per token are kept.
        seed: Decides which.
    """

    padded: bool
    rows: Tensor
    sample: Tensor
    kept: Tensor
    kept_row: Tensor

    def __init__(self, calibration: CalibrationSet, max_tokens: int, seed: int) -> None:
        self.num_samples = len(calibration)
        self.token_sample, self.token_position = keep_tokens(calibration.samples, max_tokens, seed)
        self._row_of_token = [  # position -> kept row
            torch.full((sample.num_tokens,), -1, dtype=torch.int64) for sample in calibration.samples
        ]
        for row, (sample, position) in enumerate(
            zip(self.token_sample.tolist(), self.token_position.tolist(), strict=True)
        ):
            self._row_of_token[sample][position] = row

    def set(self, batch: Batch) -> None:
        """Go on to a batch."""
        self.padded = not bool(batch.attention_mask.all())
        self.rows = batch.attention_mask.flatten().nonzero().flatten()
        lengths = batch.attention_mask.sum(1)
        self.sample = batch.samples.repeat_interleave(lengths)
        kept = torch.cat([self._row_of_token[index] for index in batch.samples.tolist()])
        self.kept = (kept >= 0).nonzero().flatten()  # among the real tokens
        self.kept_row = kept[self.kept]

    def real(self, tensor: Tensor) -> Tensor:
        """The rows of real tokens."""
        return tensor[self.rows.to(tensor.device)] if self.padded else tensor


@dataclass
class Routed:
    """The experts chosen in one MoE layer, for the layer after it.

    Attributes:
        num_experts: Experts of the layer.
        chosen: Their ids for the tokens of the current batch ``(T, K)``.
    """

    num_experts: int
    chosen: Tensor | None = None


class LayerObserver:
    """Gathers the statistics of one layer while it runs.

    Args:
        block: The layer's MoE block.
        needs: What to gather.
        current: The batch being computed.
        allocate: Makes the tensors, when their dtypes are known.
        before: The choice of the MoE layer before, or None in the first.
    """

    def __init__(
        self, block: MoEBlock, needs: frozenset[Need], current: Current, allocate: Allocate, before: Routed | None
    ) -> None:
        self.block = block
        self.rule = block.routing
        self.rule_is_proven = False
        self.needs = needs
        self.current = current
        self.allocate = allocate
        self.before = before
        self.num_experts = block.num_experts
        self.routed = Routed(self.num_experts)
        self.num_outputs = self.num_experts + (self.rule.fixed if self.rule.fixed_are_chosen else 0)
        triangle = torch.triu_indices(self.num_outputs, self.num_outputs)
        self.triangle = (triangle[0], triangle[1])
        self.tensors: Mapping[str, Tensor] = {}
        self.logits: Tensor | None = None

    def statistics(self, sample_weights: Tensor) -> LayerStats:
        """What was gathered."""
        return LayerStats(
            self.num_experts,
            self.rule,
            self.tensors,
            sample_weights,
            self.current.token_sample,
            is_head=self.block.is_head,
        )

    # -- called by the block

    def on_logits(self, logits: Tensor) -> None:
        logits = self.current.real(logits.detach().view(-1, logits.shape[-1]))
        if not bool(torch.isfinite(logits).all()):
            raise RunError(f"layer {self.block.layer}: the router's logits are NaN or infinite.")
        self.logits = logits

    def experts_forward(self, own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        logits, self.logits = self.logits, None
        if logits is None:
            raise RunError(
                f"layer {self.block.layer}: the experts ran without their router; this model cannot be observed."
            )
        shape = (*hidden.shape[:-1], hidden.shape[-1] - own.scores)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        real = self.current.real
        x, chosen, weight = real(hidden), real(ids), real(weights)
        self._prove_rule(logits, chosen, weight)
        if not self.tensors:
            before = 0 if self.before is None else self.before.num_experts
            shapes = layer_shapes(
                self.needs, self.current.num_samples, len(self.current.token_sample), self.num_experts, before,
                x.shape[1] - own.scores, logits.dtype, x.dtype, self.rule,
            )  # fmt: skip
            self.tensors = self.allocate(self.block.layer, shapes)
        self._routing(logits, chosen)
        if Need.INPUTS in self.needs:
            self._keep("inputs", x[:, : x.shape[1] - own.scores])
        if self.needs & DENSE:
            output = self._dense(own, x, logits, chosen, weight)
        elif Need.ROUTED_NORMS in self.needs:
            output = self._routed(own, x, logits, chosen, weight)
        else:
            return own(hidden, ids, weights).view(shape)
        if self.current.padded:  # the output on padding reaches no real token
            whole = hidden.new_zeros(len(hidden), shape[-1])
            whole[self.current.rows.to(hidden.device)] = output
            output = whole
        return output.view(shape)

    # -- the work

    def _prove_rule(self, logits: Tensor, chosen: Tensor, weight: Tensor) -> None:
        """Compare, once, what the model did with the rule that every method will take its router to follow."""
        if self.rule_is_proven:
            return
        if difference := self.rule.disagreement(logits, chosen, weight):
            raise RunError(
                f"layer {self.block.layer}: {difference}. The row of {self.block.spec.model_type!r} says that its "
                f"routers follow {self.rule}, and they do not; plans made by it would be wrong. Give the row the "
                "rule that they follow."
            )
        self.rule_is_proven = True

    def _routing(self, logits: Tensor, chosen: Tensor) -> None:
        if not self.needs & {Need.ROUTING, Need.COACTIVATION}:
            return
        if not self.rule.formula:  # probabilities are not known; LayerStats.total refuses what is missing
            if Need.ROUTING in self.needs:
                self._keep("logits", logits)
                self._add_chosen("routed_tokens", chosen, torch.ones_like(chosen, dtype=torch.float64))
            return
        log_p = self.rule.log_probabilities(logits)[:, : self.num_experts]
        p = log_p.exp()
        if Need.COACTIVATION in self.needs:
            self._coactivation(p.cpu(), chosen.cpu())
        if Need.ROUTING not in self.needs:
            return
        self._keep("logits", logits)
        self._add("probability", p)
        self._add("probability_log2", p * log_p / math.log(2))
        self._add_chosen("routed_tokens", chosen, torch.ones_like(chosen, dtype=torch.float64))
        self._add_chosen("routed_probability", chosen, p.gather(1, chosen.clamp(max=self.num_experts - 1)))

    def _coactivation(self, p: Tensor, chosen: Tensor) -> None:
        """Probabilities ``(T, E)`` here, summed over the tokens routed to each expert of the MoE layer before."""
        self.routed.chosen = chosen
        if self.before is None:
            return
        routed_before = self.before.chosen
        assert routed_before is not None
        for number in self.current.sample.unique().tolist():  # the whole of a sample is in one batch
            rows = (self.current.sample == number).nonzero().flatten()
            before = routed_before[rows]
            routed = torch.zeros(len(rows), max(self.before.num_experts, int(before.max()) + 1), dtype=torch.float64)
            routed = routed.scatter_(1, before, 1.0)[:, : self.before.num_experts]
            self.tensors["coactivation"][number] = (routed.T @ p[rows]).float()

    def _routed(self, own: ExpertsForward, x: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The block's output from the outputs of the chosen experts, each computed once."""
        top_k = chosen.shape[1]
        rows = x.repeat_interleave(top_k, dim=0)
        y = own(rows, chosen.reshape(-1, 1), torch.ones_like(weight).view(-1, 1)).view(len(x), top_k, -1)
        self._norms(_sizes(y), logits, chosen, weight)
        return _weighted_sum(y, weight)

    def _dense(self, own: ExpertsForward, x: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """The block's output from the outputs of all experts, and the statistics that need them all."""
        outputs = []
        chosen_sizes = []
        size = max(1, _CHUNK_BYTES // (4 * self.num_outputs * x.shape[1]))
        for rows in torch.arange(len(x), device=x.device).split(size):
            part, ids, w = x[rows], chosen[rows], weight[rows]
            one = torch.ones(len(rows), 1, dtype=weight.dtype, device=x.device)
            size = x.shape[1] - own.scores
            y = torch.empty(len(rows), self.num_outputs, size, dtype=torch.float32, device=x.device)
            for expert in range(self.num_outputs):
                y[:, expert] = own(part, torch.full_like(ids[:, :1], expert), one)
            if not all_finite(y):
                raise RunError(f"layer {self.block.layer}: an expert's output is NaN or infinite.")
            routed = y.gather(1, ids[..., None].expand(-1, -1, y.shape[-1]))
            full = (routed * w[..., None].float()).sum(1)
            outputs.append(_weighted_sum(routed.to(x.dtype), w))
            if Need.ROUTED_NORMS in self.needs:
                chosen_sizes.append(_sizes(routed))
            if Need.DENSE_NORMS in self.needs:
                self._add("dense_norm", torch.linalg.vector_norm(y[:, : self.num_experts], dim=-1), rows)
            if Need.SINGLE_ERROR in self.needs:
                lone = self.rule.lone_weights(logits[rows])  # what the expert alone would be weighted with
                error = torch.stack(
                    [(y[:, e] * lone[:, e, None] - full).square_().sum(-1) for e in range(self.num_experts)], dim=1
                )
                self._add("single_error", error, rows)
                self._add("output_energy", full.square().sum(-1, keepdim=True).expand_as(error), rows)
                self._keep("token_single_error", error, rows)
            if Need.GRAM in self.needs:
                self._keep_gram(y, rows)
        if Need.ROUTED_NORMS in self.needs:
            self._norms(torch.cat(chosen_sizes, dim=1), logits, chosen, weight)
        return torch.cat(outputs)

    def _norms(self, sizes: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor) -> None:
        """Sums and maxima over the tokens routed to each expert; ``chosen`` and ``weight`` are ``(T, K)``."""
        if not bool(torch.isfinite(sizes).all()):
            raise RunError(f"layer {self.block.layer}: an expert's output is NaN or infinite.")
        norm, largest = sizes.double()
        self._add_chosen("norm", chosen, norm)
        self._add_chosen("squared_norm", chosen, norm.square())
        self._add_chosen("norm_applied", chosen, norm * weight.double())
        if self.rule.formula:
            p = self.rule.probabilities(logits).gather(1, chosen)
            self._add_chosen("norm_probability", chosen, norm * p)
            self._add_chosen("norm_renormalised", chosen, norm * p / p.sum(1, keepdim=True))
        slot, real = self._slots(chosen)
        self.tensors["max_element"].view(-1).scatter_reduce_(0, slot, largest.cpu().flatten()[real], "amax")

    def _keep_gram(self, y: Tensor, rows: Tensor) -> None:
        """Keep upper triangles of Gram matrices, in float32 or better whatever the process allows elsewhere."""
        picked, _ = self._kept_among(rows)
        if len(picked) == 0:
            return
        if len(picked) < len(y):
            y = y[picked.to(y.device)]
        with torch.autocast(y.device.type, enabled=False):
            # float64 where float32 products may silently be TF32; it costs little beside the experts themselves
            y = y.double() if y.is_cuda else y
            gram = (y @ y.transpose(1, 2)).float()
        self._keep("gram", gram[:, self.triangle[0], self.triangle[1]], rows, already_picked=True)

    # -- adding up

    def _add(self, name: str, values: Tensor, rows: Tensor | None = None) -> None:
        """Add ``(T, E)`` values of all tokens (or of the tokens ``rows``) to their samples."""
        sample = self.current.sample if rows is None else self.current.sample[rows.cpu()]
        self.tensors[name].index_add_(0, sample, values.double().cpu())

    def _add_chosen(self, name: str, chosen: Tensor, values: Tensor) -> None:
        """Add ``(T, K)`` values to the samples of the tokens and the experts ``chosen``."""
        slot, real = self._slots(chosen)
        self.tensors[name].view(-1).index_add_(0, slot, values.double().cpu().flatten()[real])

    def _slots(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Where the values of chosen experts belong, and which of them are of experts: others stay and have none."""
        chosen = chosen.cpu()
        slot = self.current.sample[:, None] * self.num_experts + chosen
        real = (chosen < self.num_experts).flatten()
        return slot.flatten()[real], real

    def _kept_among(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Which of some tokens are kept: their places among ``rows`` and their rows in the kept tensors."""
        if rows is None:
            return self.current.kept, self.current.kept_row
        first, last = int(rows[0]), int(rows[-1])  # chunks are contiguous
        inside = (self.current.kept >= first) & (self.current.kept <= last)
        return self.current.kept[inside] - first, self.current.kept_row[inside]

    def _keep(self, name: str, values: Tensor, rows: Tensor | None = None, already_picked: bool = False) -> None:
        """Store values of kept tokens, of all tokens or of the tokens ``rows``."""
        picked, kept_row = self._kept_among(rows)
        if not already_picked:
            values = values[picked.to(values.device)]
        self.tensors[name][kept_row] = values.cpu()


def observers_of(
    blocks: Iterable[MoEBlock], needs: frozenset[Need], current: Current, allocate: Allocate, before: Routed | None
) -> list[LayerObserver]:
    """Observers of MoE layers that follow one another in one pass.

    Args:
        blocks: Their blocks.
        needs: As for :class:`LayerObserver`.
        current: Likewise.
        allocate: Likewise.
        before: The choice of the MoE layer before the first, or None.
    """
    observers: list[LayerObserver] = []
    for block in blocks:
        observers.append(LayerObserver(block, needs, current, allocate, before))
        before = observers[-1].routed
    return observers
