# SPDX-License-Identifier: Apache-2.0
"""Gradients of a model's own predictions, of one batch: at the logits, and back through one layer.

What is differentiated is one layer on hidden states that were kept (``models.layerwise``), so that nothing of other
layers is held.

Shapes: B samples of a batch, L positions, H hidden size, T tokens of a batch, J draws, E experts, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..compat import text_config
from ..errors import RunError
from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.experts import ExpertsForward
from ..models.layerwise import LayerByLayer
from ..models.transfers import rows_of, sent
from ..statistics.needs import LABEL_DRAWS
from ..statistics.samples import label_quantiles
from .current import Current
from .dense import chunk_size, every_expert, products
from .outbox import Outbox, Take
from .samples import CalibrationSet

LOGIT_BYTES = 256 * 2**20  # of logits in float32, for which gradients are calculated at once
_SLICE_BYTES = 64 * 2**20  # of probabilities from which labels are drawn at once
_FLOAT16_SCALE = 1024.0  # of gradients in float16, whose smallest would be lost


def fisher_file(index: int) -> str:
    """The name of the file with a layer's part of the statistics, while they are gathered."""
    return f"fisher_{index:05d}.safetensors"


class Gradients:
    """Gradients of the log-probabilities of labels that are drawn from what a model predicts.

    Args:
        runner: The model.
        calibration: The samples.
        current: The batch being computed.
        seed: Decides which labels are drawn.

    Attributes:
        first: The first MoE layer; nothing is asked of layers below.
    """

    def __init__(self, runner: LayerByLayer, calibration: CalibrationSet, current: Current, seed: int) -> None:
        self._runner = runner
        self._calibration = calibration
        self._current = current
        self._seed = seed
        self._blocks = {block.layer: block for block in runner.blocks}
        self.first = min(self._blocks)
        self._scale = _FLOAT16_SCALE if runner.dtype == torch.float16 else 1.0

    def at_logits(self, batch: Batch, state: Tensor) -> Tensor:
        """Gradients ``(J, B, L, ...)`` at what came out of the last layer; inside the runner's ``head``."""
        found = []
        size = LOGIT_BYTES // (4 * batch.input_ids.shape[1] * text_config(self._runner.model.config).vocab_size)
        for rows in torch.arange(len(batch.samples)).split(max(1, size)):
            part = Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.samples[rows])
            given, logits = self._runner.traced_logits(part, state[int(rows[0]) : int(rows[-1]) + 1])
            mask = part.attention_mask[:, 1:].bool()  # after the last token of a sample nothing is predicted
            samples = [self._calibration.samples[number] for number in part.samples.tolist()]
            quantiles = torch.cat([label_quantiles(each, self._seed, LABEL_DRAWS) for each in samples])
            with torch.enable_grad():
                log_p = torch.log_softmax(rows_of(logits[:, :-1], mask).float(), dim=-1)
            labels = draw_labels(log_p.detach(), sent(quantiles, log_p.device))
            gradients: list[Tensor] = []
            for draw in range(LABEL_DRAWS):
                with torch.enable_grad():
                    total = self._scale * log_p.gather(1, labels[:, draw, None]).sum()
                gradients += torch.autograd.grad(total, given, retain_graph=draw + 1 < LABEL_DRAWS)
            found.append(torch.stack(gradients))
        return torch.cat(found, dim=1)

    def back(
        self,
        index: int,
        batch: Batch,
        state: Tensor,
        gradients: Tensor,
        tensors: Mapping[str, Tensor] | None,
        outbox: Outbox,
    ) -> Tensor:
        """Gradients at what goes into a layer, from those at what comes out; what they say of its experts goes out."""
        block = self._blocks.get(index)
        watched = _Watched()
        with contextlib.nullcontext() if block is None else block.observed(_ignore, watched.forward):
            given, output = self._runner.traced(index, batch, state)
            inputs = [*([given] if index > self.first else []), *([] if block is None else [watched.change])]
            found = [
                torch.autograd.grad(output, inputs, gradient.to(output.device), retain_graph=number + 1 < LABEL_DRAWS)
                for number, gradient in enumerate(gradients)
            ]
            if block is not None and tensors is not None and len(self._current.kept_row):
                self._keep(block, watched, [of_draw[-1] for of_draw in found], tensors, outbox)
        return torch.stack([of_draw[0] for of_draw in found]) if index > self.first else gradients

    def _keep(
        self,
        block: MoEBlock,
        watched: _Watched,
        gradients: Sequence[Tensor],
        tensors: Mapping[str, Tensor],
        outbox: Outbox,
    ) -> None:
        """Products of gradients and the outputs of all experts, for the batch's kept tokens."""
        current, own = self._current, watched.own
        places = current.on(watched.hidden.device)
        x = current.real(watched.hidden)[places.kept]
        g = torch.stack([current.real(gradient)[places.kept] for gradient in gradients], dim=1)
        outputs = _num_outputs(block)
        rows_at_once = current.num_tokens * block.rule.top_k
        chunk = chunk_size(rows_at_once, outputs, g.shape[-1], g.element_size(), g.device)
        kept = current.kept_row
        for first in range(0, len(x), chunk):
            rows = slice(first, first + chunk)
            y = every_expert(own, x[rows], outputs, watched.dtype).transpose(0, 1)
            values = products(g[rows], y.to(g.dtype)) / self._scale
            energy = g[rows].float().square().sum(-1) / self._scale**2
            for name, found in (("fisher", values), ("gradient_energy", energy)):
                outbox.send(found, _taker(tensors[name], kept[rows]))
            outbox.hold(values.abs().amax() + energy.amax(), functools.partial(_check_finite, block.layer))


class _Watched:
    """The experts' output of one layer while it is differentiated, with a change of it that is 0."""

    own: ExpertsForward
    hidden: Tensor
    dtype: torch.dtype
    change: Tensor

    def forward(self, own: ExpertsForward, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], hidden.shape[-1] - own.scores)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        self.own, self.hidden, self.dtype = own, hidden.detach(), weights.dtype
        output = own(hidden, ids, weights)
        self.change = torch.zeros_like(output).requires_grad_()
        return (output + self.change).view(shape)


def draw_labels(log_p: Tensor, quantiles: Tensor) -> Tensor:
    """Labels ``(T, J)`` at quantiles ``(T, J)`` of distributions of which logarithms ``(T, V)`` are given."""
    wide = torch.float32 if log_p.device.type == "mps" else torch.float64  # which it lacks
    rows = max(1, _SLICE_BYTES // (wide.itemsize * log_p.shape[1]))
    labels = []
    for some, where in zip(log_p.split(rows), quantiles.split(rows), strict=True):
        sums = some.to(wide).exp().cumsum(-1)
        labels.append(torch.searchsorted(sums, where.to(wide) * sums[:, -1:], right=True))
    return torch.cat(labels).clamp_(max=log_p.shape[1] - 1)


def _num_outputs(block: MoEBlock) -> int:
    return block.num_experts + (block.rule.fixed if block.rule.fixed_are_chosen else 0)


def _ignore(logits: Tensor) -> None:
    """Logits, which are known."""


def _taker(tensor: Tensor, rows: Tensor) -> Take:
    def take(values: Tensor) -> None:
        tensor[rows] = values

    return take


def _check_finite(layer: int, largest: Tensor) -> None:
    if not math.isfinite(float(largest)):
        raise RunError(f"layer {layer}: a gradient of the model's predictions is NaN or infinite.")
