# SPDX-License-Identifier: Apache-2.0
"""What is gathered of one MoE layer while it runs, whether the model is in memory or one layer of it.

The chosen experts and their weights are taken where the model uses them. Outputs of single experts come from the
model's own experts implementation, asked for one expert per row with weight 1, so that every architecture, dtype and
kernel is observed as it is. What it costs depends on what is asked for:

- *routing*: the model's own forward; only the router is watched.
- *routed*: the experts run once on the tokens routed to them, as in the plain forward, and the block's output is put
  together here from their outputs.
- *dense*: on kept tokens every expert runs once, in chunks, and their output is put together from those; on all other
  tokens it costs what the two above do.

Everything is added up on the layer's own device, for the samples of one batch, and nothing is asked of it that would
have the host wait: what was gathered goes out with the batch (``outbox``).

Shapes: E experts, T tokens of a batch, B samples of it, S samples in all, N kept tokens, K top_k, H hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RunError
from ..models.blocks import MoEBlock
from ..models.experts import ExpertsForward
from ..models.weight_sizes import weight_sizes_of
from ..statistics.needs import DENSE, ROUTED, Need, layer_shapes
from ..statistics.samples import fill_sums_of_kept
from ..statistics.stats import LayerStats
from ..storage.tensor_files import Shapes
from .current import Current
from .dense import chosen_experts, chunk_size, every_expert, lone_errors, products, sizes_of, triangle, weighted_sum
from .outbox import Outbox, Take
from .output_sums import OutputSums

_PROVEN_TOKENS = 4096  # of the first batch, by which the routers' rule is proven

Allocate = Callable[[int, Shapes], Mapping[str, Tensor]]
"""A layer's index and the shapes of its tensors -> the tensors, zeros or what an interrupted run had gathered."""


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
        outbox: Brings what was gathered to the tensors.
    """

    def __init__(
        self,
        block: MoEBlock,
        needs: frozenset[Need],
        current: Current,
        allocate: Allocate,
        before: Routed | None,
        outbox: Outbox,
    ) -> None:
        self.block = block
        self.rule = block.routing
        self.needs = needs
        self.current = current
        self.allocate = allocate
        self.before = before
        self.outbox = outbox
        self.num_experts = block.num_experts
        self.num_outputs = self.num_experts + (self.rule.fixed if self.rule.fixed_are_chosen else 0)
        self.routed = Routed(self.num_experts)
        self.triangle = functools.cache(functools.partial(triangle, self.num_outputs))
        self.tensors: Mapping[str, Tensor] = {}
        self.logits: Tensor | None = None
        self.chunk = 0  # tokens that run through all experts at once
        self._slots_of: Tensor | None = None  # of the current batch
        self._output_sums: OutputSums | None = None  # likewise, where they are gathered
        self.is_proven = False
        self.to_prove: tuple[Tensor, Tensor, Tensor] | None = None

    def statistics(self, sample_weights: Tensor) -> LayerStats:
        """What was gathered; all batches have to be over."""
        fill_sums_of_kept(self.tensors, self.current.token_sample, self.current.lengths_of_samples)
        return LayerStats(
            self.num_experts,
            self.rule,
            self.tensors,
            sample_weights,
            self.current.token_sample,
            is_head=self.block.is_head,
        )

    def prove_rule(self) -> None:
        """Compare, after the first batch, what the model did with the rule that its router is taken to follow.

        Raises:
            RunError: If it did something else.
        """
        if self.to_prove is None:
            return
        self.outbox.wait()  # what is not finite says so itself
        if difference := self.rule.disagreement(*map(_exactly, self.to_prove)):
            raise RunError(
                f"layer {self.block.layer}: {difference}. The row of {self.block.spec.model_type!r} says that its "
                f"routers follow {self.rule}, and they do not; plans made by it would be wrong. Give the row the "
                "rule that they follow."
            )
        self.is_proven, self.to_prove = True, None

    # -- called by the block

    def on_logits(self, logits: Tensor) -> None:
        self.logits = self.current.real(logits.detach().view(-1, logits.shape[-1]))
        self._check_finite(self.logits, "the router's logits are")

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
        if not self.is_proven and self.to_prove is None:
            self.to_prove = logits[:_PROVEN_TOKENS].clone(), chosen[:_PROVEN_TOKENS], weight[:_PROVEN_TOKENS]
        if not self.tensors:
            before = 0 if self.before is None else self.before.num_experts
            shapes = layer_shapes(
                self.needs, self.current.num_samples, len(self.current.token_sample), self.num_experts, before,
                x.shape[1] - own.scores, logits.dtype, x.dtype, self.rule,
            )  # fmt: skip
            self.tensors = self.allocate(self.block.layer, shapes)
            if Need.WEIGHTS in self.needs:  # now, as they may be there only while the layer runs
                for name, values in weight_sizes_of(self.block).items():
                    self.tensors[name].copy_(values)
        self._slots_of = None
        p = self._routing(logits, chosen)
        if Need.INPUTS in self.needs:
            self._keep("inputs", x[:, : x.shape[1] - own.scores])
        dense = bool(self.needs & DENSE) and len(self.current.kept_row) > 0
        if not dense and not self.needs & ROUTED:
            return own(hidden, ids, weights).view(shape)
        if Need.MEAN_OUTPUTS in self.needs:
            self._output_sums = OutputSums(len(self.current.lengths), self.num_experts, shape[-1])
        slots = self._slots(chosen).view(chosen.shape)
        if not dense:
            output, sizes = self._routed(own, x, chosen, weight, slots)
        elif self.current.all_kept:
            output, sizes = self._dense(own, x, logits, chosen, weight, slots)
        else:
            output, sizes = self._split(own, x, logits, chosen, weight, slots)
        if sizes is not None:
            self._norms(sizes, p, chosen, weight)
        if self._output_sums is not None:
            sums = self._output_sums.by_sample()
            self._check_finite(sums, "an expert's output is")
            self.outbox.send(sums, self._taker("output_sum", self.current.samples))
        if self.current.padded:  # the output on padding reaches no real token
            whole = hidden.new_zeros(len(hidden), shape[-1])
            whole[self.current.on(hidden.device).tokens] = output
            output = whole
        return output.view(shape)

    # -- the outputs of the chosen experts, and of all

    def _routed(
        self, own: ExpertsForward, x: Tensor, chosen: Tensor, weight: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output ``(T, H)``; with routed norms, from the chosen experts' outputs, and their sizes."""
        if not self.needs & ROUTED:
            return own(x, chosen, weight), None
        y, sizes = chosen_experts(own, x, chosen, weight.dtype)
        if self._output_sums is not None:
            self._output_sums.add(y, slots)
        return weighted_sum(y, weight), sizes if Need.ROUTED_NORMS in self.needs else None

    def _dense(
        self, own: ExpertsForward, x: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same, of kept tokens, from the outputs of all experts, with the statistics that need them all."""
        hidden_size = x.shape[1] - own.scores
        if not self.chunk:  # the first batch is the largest
            rows_at_once = self.current.num_tokens * chosen.shape[1]
            self.chunk = chunk_size(rows_at_once, self.num_outputs, hidden_size, x.element_size(), x.device)
        outputs, sizes = [], []
        for first in range(0, len(x), self.chunk):
            rows = slice(first, first + self.chunk)
            ids, w = chosen[rows], weight[rows]
            y = every_expert(own, x[rows], self.num_outputs, weight.dtype)
            by_token = y.transpose(0, 1)
            routed = y[ids, torch.arange(len(ids), device=y.device)[:, None]]
            outputs.append(weighted_sum(routed, w))
            if Need.ROUTED_NORMS in self.needs:
                sizes.append(sizes_of(routed))
            if self._output_sums is not None:
                self._output_sums.add(routed, slots[rows])
            norm = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32).T
            self._check_finite(norm, "an expert's output is")
            if Need.DENSE_NORMS in self.needs:
                self._keep("token_dense_norm", norm[:, : self.num_experts], rows)
            gram = products(by_token, by_token) if Need.GRAM in self.needs else None
            if Need.SINGLE_ERROR in self.needs:
                lone = self.rule.lone_weights(_exactly(logits[rows]))[:, : self.num_outputs].to(norm.device)
                partial = (
                    products(by_token, routed)
                    if gram is None
                    else gram.gather(2, ids[:, None].expand(-1, self.num_outputs, -1))
                )
                error, energy = lone_errors(norm, partial, routed, ids, w, lone)
                self._keep("token_single_error", error[:, : self.num_experts], rows)
                self._keep("token_output_energy", energy, rows)
            if gram is not None:
                self._keep("gram", gram[(slice(None), *self.triangle(gram.device))], rows)
        return torch.cat(outputs), torch.cat(sizes, dim=1) if sizes else None

    def _split(
        self, own: ExpertsForward, x: Tensor, logits: Tensor, chosen: Tensor, weight: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same, where some tokens are kept: these by :meth:`_dense`, the others by :meth:`_routed`."""
        places = self.current.on(x.device)
        parts = [
            self._dense(own, *(t[places.kept] for t in (x, logits, chosen, weight, slots))),
            self._routed(own, *(t[places.others] for t in (x, chosen, weight, slots))),
        ]
        output = parts[0][0].new_empty(len(x), parts[0][0].shape[1])
        sizes = x.new_empty((2, *chosen.shape), dtype=torch.float32) if parts[0][1] is not None else None
        for rows, (values, of_values) in zip((places.kept, places.others), parts, strict=True):
            output[rows] = values
            if sizes is not None:
                sizes[:, rows] = of_values  # type: ignore[assignment]  # both have them or none
        return output, sizes

    # -- sums over the tokens of each of the batch's samples

    def _routing(self, logits: Tensor, chosen: Tensor) -> Tensor | None:
        """What follows from the routing alone; the probabilities ``(T, E)``, where they are needed, in float64."""
        routing, together = Need.ROUTING in self.needs, Need.COACTIVATION in self.needs
        if routing:
            self._keep("logits", logits)
        if not self.rule.formula:  # probabilities are not known; LayerStats.total refuses what is missing
            if routing:
                self._add_chosen(chosen, {"routed_tokens": torch.ones_like(_exactly(chosen), dtype=torch.float64)})
            return None
        if not routing and not together and Need.ROUTED_NORMS not in self.needs:
            return None
        logits = _exactly(logits)
        log_p = self.rule.log_probabilities(logits)
        p = log_p.exp()
        if together:
            self._coactivation(p[:, : self.num_experts], chosen)
        if routing:
            both = torch.cat([values[:, : self.num_experts] for values in (p, p * log_p)], dim=1)
            sums = p.new_zeros(len(self.current.lengths), 2 * self.num_experts)
            sums.index_add_(0, self.current.on(p.device).sample, both)
            self.outbox.hold(sums, self._probabilities_taker())
            self._add_chosen(
                chosen, {"routed_tokens": torch.ones_like(_of(p, chosen)), "routed_probability": _of(p, chosen)}
            )
        return p

    def _probabilities_taker(self) -> Take:
        rows = self.current.samples

        def take(sums: Tensor) -> None:
            probability, times_log = sums.chunk(2, dim=1)
            self.tensors["probability"][rows] = probability
            self.tensors["probability_log2"][rows] = times_log / math.log(2)

        return take

    def _coactivation(self, p: Tensor, chosen: Tensor) -> None:
        """Probabilities ``(T, E)`` here, summed over the tokens routed to each expert of the MoE layer before."""
        self.routed.chosen = chosen
        if self.before is None:
            return
        before, count = self.before.chosen, self.before.num_experts
        assert before is not None
        routed = p.new_zeros(len(p), count + 1).scatter_(1, before.to(p.device).clamp(max=count), 1.0)[:, :count]
        lengths = list(self.current.lengths)  # the whole of a sample is in one batch, its tokens one after another
        sums = [r.T @ q for r, q in zip(routed.split(lengths), p.split(lengths), strict=True)]
        self.outbox.send(torch.stack(sums).float(), self._taker("coactivation", self.current.samples))

    def _norms(self, sizes: Tensor, p: Tensor | None, chosen: Tensor, weight: Tensor) -> None:
        """Sums and maxima over the tokens routed to each expert; ``chosen`` and ``weight`` are ``(T, K)``."""
        self._check_finite(sizes, "an expert's output is")
        sizes, weight, chosen = _exactly(sizes), _exactly(weight), _exactly(chosen)
        norm, largest = sizes.double()
        values = {"norm": norm, "squared_norm": norm.square(), "norm_applied": norm * weight}
        if p is not None:
            q = _of(p, chosen)
            values |= {"norm_probability": norm * q, "norm_renormalised": norm * q / q.sum(1, keepdim=True)}
        self._add_chosen(chosen, values)
        most = largest.new_zeros(len(self.current.lengths) * (self.num_experts + 1))
        most.scatter_reduce_(0, self._slots(chosen), largest.flatten(), "amax")
        self.outbox.hold(most, self._slots_taker(["max_element"]))

    def _add_chosen(self, chosen: Tensor, values: dict[str, Tensor]) -> None:
        """Add ``(T, K)`` values, by name, for the experts ``chosen``."""
        stacked = torch.stack([_exactly(v) for v in values.values()], dim=-1).flatten(0, 1)
        sums = stacked.new_zeros(len(self.current.lengths) * (self.num_experts + 1), len(values))
        self.outbox.hold(sums.index_add_(0, self._slots(_exactly(chosen)), stacked), self._slots_taker(list(values)))

    def _slots(self, chosen: Tensor) -> Tensor:
        """Where values of the chosen belong: sample by sample, and what is no expert's beside the experts."""
        if self._slots_of is None or self._slots_of.device != chosen.device:
            first = self.current.on(chosen.device).sample[:, None] * (self.num_experts + 1)
            self._slots_of = (first + chosen.clamp(max=self.num_experts)).flatten()
        return self._slots_of

    def _slots_taker(self, names: list[str]) -> Take:
        rows = self.current.samples

        def take(sums: Tensor) -> None:
            sums = sums.view(len(rows), self.num_experts + 1, len(names))[:, : self.num_experts]
            for name, values in zip(names, sums.unbind(2), strict=True):
                self.tensors[name][rows] = values.to(self.tensors[name].dtype)

        return take

    # -- what goes out

    def _keep(self, name: str, values: Tensor, rows: slice | None = None) -> None:
        """Values of all tokens, of which those of kept ones are kept; or of the kept tokens ``rows``."""
        kept = self.current.kept_row
        if len(kept) == 0:
            return
        if rows is not None:
            kept = kept[rows]
        elif not self.current.all_kept:
            values = values[self.current.on(values.device).kept]
        self.outbox.send(values, self._taker(name, kept))

    def _taker(self, name: str, rows: Tensor) -> Take:
        def take(values: Tensor) -> None:
            self.tensors[name][rows] = values.to(self.tensors[name].dtype)

        return take

    def _check_finite(self, values: Tensor, what: str) -> None:
        def take(total: Tensor) -> None:
            if not math.isfinite(float(total)):
                raise RunError(f"layer {self.block.layer}: {what} NaN or infinite.")

        self.outbox.hold(_exactly(values).sum(dtype=torch.float64), take)  # which no finite numbers overflow


def _of(p: Tensor, chosen: Tensor) -> Tensor:
    """Probabilities of the chosen ``(T, K)``; of what is no expert, any."""
    return p.gather(1, chosen.to(p.device).clamp(max=p.shape[1] - 1))


def _exactly(values: Tensor) -> Tensor:
    """The same where float64 is: on its own device, or else, of few numbers, on the host."""
    return values.cpu() if values.device.type == "mps" else values


def observers_of(
    blocks: Iterable[MoEBlock],
    needs: frozenset[Need],
    current: Current,
    allocate: Allocate,
    before: Routed | None,
    outbox: Outbox,
) -> list[LayerObserver]:
    """Observers of MoE layers that follow one another in one pass.

    Args:
        blocks: Their blocks.
        needs: As for :class:`LayerObserver`.
        current: Likewise.
        allocate: Likewise.
        before: The choice of the MoE layer before the first, or None.
        outbox: Likewise.
    """
    observers: list[LayerObserver] = []
    for block in blocks:
        observers.append(LayerObserver(block, needs, current, allocate, before, outbox))
        before = observers[-1].routed
    return observers
