# SPDX-License-Identifier: Apache-2.0
r"""What a change of an expert's weight does to the model's own predictions, to first order, from one backward pass.

At a token :math:`t` the experts' output is :math:`F_t = \sum_e \pi_{te} f_e(x_t)`. With labels :math:`y` drawn from
what the model itself predicts, one for each position of a sample, and :math:`g_{tj} = \partial \log p(y_j) / \partial
F_t` the gradient of the sum of their log-probabilities for the j-th draw, the statistic is

.. math:: a_{tje} = f_e(x_t) \cdot g_{tj}.

Labels of different positions are independent and their scores have mean 0, so that the mean of :math:`(c \cdot
a_{tj})^2` over draws is what a change :math:`c` of the routing weights at :math:`t` gives the divergence of the model's
predictions, at that position and at all that follow, to second order and twice over (``methods.fisher_replay``).
The gradient is that at the experts' own output: whatever an architecture does with the sum before it is added to the
hidden states (norms, factors) is part of it.

Hidden states go forward and are kept before each layer; then each layer runs once more, from the last to the first
with experts, and gradients go back through it. Nothing of a layer is kept beyond that, so it is the same for a model
in memory and one of which a layer at a time is read. Which labels are drawn follows from the seed, the sample and the
position alone.

Shapes: B samples of a batch, L positions, H hidden size, T tokens of a batch, N kept tokens, J draws, E experts.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compat import text_config
from ..errors import RunError
from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.experts import ExpertsForward
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of, rows_of, sent
from ..progress import progress, working
from ..statistics.needs import LABEL_DRAWS, Need, layer_shapes
from ..statistics.samples import label_quantiles
from ..statistics.stats import LayerStats
from ..storage.growing import Store
from ..storage.tensor_files import Shapes, shapes_bytes
from .current import Current
from .dense import chunk_size, every_expert, products
from .outbox import Outbox, Take
from .samples import CalibrationSet

_LOGIT_BYTES = 256 * 2**20  # of logits in float32, for which gradients are calculated at once
_SLICE_BYTES = 64 * 2**20  # of probabilities from which labels are drawn at once
_FLOAT16_SCALE = 1024.0  # of gradients in float16, whose smallest would be lost
_GROUP_SECONDS = 10.0  # in which batches are finished together, of a model in memory


FOLDER = "fisher"
"""In the folder of a calibration that can be continued."""


def fisher_file(index: int) -> str:
    """The name of the file with a layer's part of the statistics, while they are gathered."""
    return f"fisher_{index:05d}.safetensors"


def gather_fisher(
    runner: LayerByLayer,
    calibration: CalibrationSet,
    current: Current,
    *,
    batch_size: int,
    seed: int,
    store: Store,
    read_ahead: bool = True,
) -> dict[int, Mapping[str, Tensor]]:
    """The tensors of ``Need.FISHER`` of each MoE layer, for the kept tokens.

    Args:
        runner: The model.
        calibration: The samples.
        current: Their kept tokens.
        batch_size: Samples in a forward pass.
        seed: Decides which labels are drawn.
        store: That of the calibration, in which they grow. With a folder what is finished is kept there, and a later
            call continues.
        read_ahead: Read the next layer's bytes while a layer calculates.

    Raises:
        RequestError: If the model cannot be run one layer at a time.
        RunError: If a gradient is NaN or infinite, or something cannot be written.
    """
    store = store.inner(FOLDER, "backward pass")
    try:
        work = _Work(runner, calibration, current, list(calibration.batches(batch_size)), seed, store)
        with runner.running(), _frozen(runner.model), Outbox() as outbox:
            return work.streamed(outbox, read_ahead) if runner.streams else work.in_memory(outbox)
    finally:
        store.close()


def with_fisher(
    layers: Mapping[int, LayerStats], found: Mapping[int, Mapping[str, Tensor]], current: Current
) -> dict[int, LayerStats]:
    """Statistics of layers with what was gathered here; of heads, which have no part in what is predicted, zeros."""
    joined = {}
    for index, layer in layers.items():
        own = found.get(index)
        if own is None:
            tokens = len(current.token_sample)
            shapes = layer_shapes({Need.FISHER}, 0, tokens, layer.num_experts, 0, 0, *2 * (torch.float32,), layer.routing)
            own = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
        joined[index] = replace(layer, tensors={**layer.tensors, **own})
    return joined


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """A model none of whose parameters is differentiated by, inside a ``with``: nothing is held for them."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@dataclass
class _Work:
    """One gathering: what it is of, and where it grows."""

    runner: LayerByLayer
    calibration: CalibrationSet
    current: Current
    batches: Sequence[Batch]
    seed: int
    store: Store

    def __post_init__(self) -> None:
        self.blocks = {block.layer: block for block in self.runner.blocks}
        self.first = min(self.blocks)  # nothing is asked of layers below
        self.sizes = [batch.input_ids.numel() for batch in self.batches]
        self.scale = _FLOAT16_SCALE if self.runner.dtype == torch.float16 else 1.0

    # -- in memory: all layers for one batch after another

    def in_memory(self, outbox: Outbox) -> dict[int, Mapping[str, Tensor]]:
        store, runner = self.store, self.runner
        store.check_steps(len(self.batches), "batch")

        def finished_in(tensors: Mapping[str, Tensor], step: int) -> Iterator[Tensor]:
            rows = torch.isin(self.current.token_sample, self.batches[step].samples).nonzero().flatten()
            return (tensors[name][rows] for name in sorted(tensors))

        keep = store.finished > 0
        tensors = {
            index: store.tensors(fisher_file(index), self._shapes(block), keep=keep, part=finished_in)
            for index, block in self.blocks.items()
        }
        carrier, since = Carrier(lane_of(runner.device)), time.monotonic()
        with working(
            "differentiating", len(self.batches), "batch", "differentiated", begun=store.finished, costs=self.sizes
        ) as work:
            for number in range(store.finished, len(self.batches)):
                batch = self.batches[number]
                self.current.set(batch)
                with outbox.batch():
                    self._whole(batch, carrier, tensors, outbox)
                if time.monotonic() - since >= _GROUP_SECONDS or number + 1 == len(self.batches):
                    outbox.wait()
                    store.commit(number + 1)
                    since = time.monotonic()
                work.update()
        return tensors

    def _whole(
        self, batch: Batch, carrier: Carrier, tensors: Mapping[int, Mapping[str, Tensor]], outbox: Outbox
    ) -> None:
        """Of one batch all layers, forward and back."""
        runner, kept = self.runner, list[Tensor]()
        state = next(runner.embedded([batch]))
        for index in range(runner.num_layers):
            kept.append(torch.empty(state.shape, dtype=state.dtype))
            carrier.put(state, kept[-1])
            state = runner.forward(index, batch, state.clone())
        carrier.finish()
        gradients = self._of_logits(batch, state)
        back = range(runner.num_layers - 1, self.first - 1, -1)
        for index, state in zip(back, carrier.each(kept[index] for index in back), strict=True):
            gradients = self._back(index, batch, state, gradients, tensors.get(index), outbox)

    # -- streamed: all batches for one layer after another

    def streamed(self, outbox: Outbox, read_ahead: bool) -> dict[int, Mapping[str, Tensor]]:
        store, runner, layers = self.store, self.runner, self.runner.num_layers
        steps = 2 * layers + 1 - self.first
        store.check_steps(steps, "layer")
        runner.prepare()
        shapes: Shapes = {f"{n}": runner.state_shape(batch) for n, batch in enumerate(self.batches)}
        back: Shapes = {
            f"{n}": ((LABEL_DRAWS, *runner.hidden_shape(batch)), runner.dtype) for n, batch in enumerate(self.batches)
        }
        store.check_space(
            (layers + 1 - self.first) * shapes_bytes(shapes)
            + 2 * shapes_bytes(back)
            + sum(shapes_bytes(self._shapes(block)) for block in self.blocks.values())
        )
        carrier = Carrier(lane_of(runner.device))
        files: dict[str, Mapping[str, Tensor]] = {}

        def opened(name: str) -> Mapping[str, Tensor]:
            """A file that an earlier step wrote, or an earlier run."""
            if name not in files:
                files[name] = store.tensors(name, None)
                store.release(name)
            return files[name]

        def made(name: str, shapes: Shapes) -> Mapping[str, Tensor]:
            files[name] = store.tensors(name, shapes)
            return files[name]

        if not store.finished:
            begun = made(_states_file(0), shapes)
            for number, hidden in enumerate(runner.embedded(self.batches)):
                carrier.put(hidden, begun[f"{number}"])
            carrier.finish()
        with (
            runner.reading_ahead() as ahead,
            working("differentiating", steps, "layer", "differentiated", begun=store.finished) as work,
        ):
            for step in range(store.finished, steps):
                index = step if step < layers else 2 * layers - step
                batches = enumerate(progress(self.batches, "batches", unit="batch", costs=self.sizes))
                if step < layers:
                    given, after = opened(_states_file(index)), made(_states_file(index + 1), shapes)
                    with runner.loaded(index):
                        if read_ahead:
                            ahead(index + 1 if index + 1 < layers else -1)
                        states = carrier.each(given[f"{number}"] for number in range(len(self.batches)))
                        for number, batch in batches:
                            carrier.put(runner.forward(index, batch, next(states)), after[f"{number}"])
                        carrier.finish()
                elif step == layers:
                    given, after = opened(_states_file(layers)), made(_gradients_file(layers), back)
                    with runner.head():
                        if read_ahead:
                            ahead(layers - 1)
                        states = carrier.each(given[f"{number}"] for number in range(len(self.batches)))
                        for number, batch in batches:
                            carrier.put(self._of_logits(batch, next(states)), after[f"{number}"])
                        carrier.finish()
                else:
                    given, later = opened(_states_file(index)), opened(_gradients_file(index + 1))
                    after = {} if index == self.first else made(_gradients_file(index), back)
                    block = self.blocks.get(index)
                    tensors = None if block is None else made(fisher_file(index), self._shapes(block))
                    with runner.loaded(index):
                        if read_ahead and index > self.first:
                            ahead(index - 1)
                        pairs = (
                            tensor
                            for number in range(len(self.batches))
                            for tensor in (given[f"{number}"], later[f"{number}"])
                        )
                        coming = carrier.each(pairs)
                        for number, batch in batches:
                            self.current.set(batch)
                            with outbox.batch():
                                state, gradients = next(coming), next(coming)
                                gradients = self._back(index, batch, state, gradients, tensors, outbox)
                            if after:
                                carrier.put(gradients, after[f"{number}"])
                        carrier.finish()
                    outbox.wait()
                needed = self._needed(step)
                store.commit(step + 1, sorted(needed))
                for name in needed:
                    store.release(name)
                for name in self._needed(step - 1) - needed:
                    files.pop(name, None)
                    store.remove(name)
                work.update()
        return {index: opened(fisher_file(index)) for index in self.blocks}

    def _needed(self, step: int) -> set[str]:
        """The files that are needed when a step is finished."""
        layers = self.runner.num_layers
        if step < layers:
            return {_states_file(step + 1), *map(_states_file, range(self.first, step + 1))}
        index = 2 * layers - step
        below = map(_states_file, range(self.first, index))
        done = (fisher_file(layer) for layer in self.blocks if layer >= index)
        return {*below, *done, *([_gradients_file(index)] if index > self.first else [])}

    # -- of one batch

    def _of_logits(self, batch: Batch, state: Tensor) -> Tensor:
        """Gradients ``(J, B, L, ...)`` at what came out of the last layer, of log-probabilities of drawn labels."""
        found = []
        size = _LOGIT_BYTES // (4 * batch.input_ids.shape[1] * text_config(self.runner.model.config).vocab_size)
        for rows in torch.arange(len(batch.samples)).split(max(1, size)):
            part = Batch(batch.input_ids[rows], batch.attention_mask[rows], batch.samples[rows])
            given, logits = self.runner.logits_with_graph(part, state[int(rows[0]) : int(rows[-1]) + 1])
            mask = part.attention_mask[:, 1:].bool()  # after the last token of a sample nothing is predicted
            samples = [self.calibration.samples[number] for number in part.samples.tolist()]
            quantiles = torch.cat([label_quantiles(each, self.seed, LABEL_DRAWS) for each in samples])
            with torch.enable_grad():
                log_p = torch.log_softmax(rows_of(logits[:, :-1], mask).float(), dim=-1)
            labels = draw_labels(log_p.detach(), sent(quantiles, log_p.device))
            gradients = []
            for draw in range(LABEL_DRAWS):
                with torch.enable_grad():
                    total = self.scale * log_p.gather(1, labels[:, draw, None]).sum()
                gradients += torch.autograd.grad(total, given, retain_graph=draw + 1 < LABEL_DRAWS)
            found.append(torch.stack(gradients))
        return torch.cat(found, dim=1)

    def _back(
        self,
        index: int,
        batch: Batch,
        state: Tensor,
        gradients: Tensor,
        tensors: Mapping[str, Tensor] | None,
        outbox: Outbox,
    ) -> Tensor:
        """Gradients at what goes into a layer, from those at what comes out; what they say of its experts goes out."""
        block = self.blocks.get(index)
        watched = _Watched()
        with contextlib.nullcontext() if block is None else block.observed(_ignore, watched.forward):
            given, output = self.runner.with_graph(index, batch, state)
            inputs = [*([given] if index > self.first else []), *([] if block is None else [watched.change])]
            found = [
                torch.autograd.grad(output, inputs, gradient.to(output.device), retain_graph=number + 1 < LABEL_DRAWS)
                for number, gradient in enumerate(gradients)
            ]
            if block is not None and tensors is not None and len(self.current.kept_row):
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
        current, own = self.current, watched.own
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
            values = products(g[rows], y.to(g.dtype)) / self.scale
            energy = g[rows].float().square().sum(-1) / self.scale**2
            for name, found in (("fisher", values), ("gradient_energy", energy)):
                outbox.send(found, _taker(tensors[name], kept[rows]))
            outbox.hold(values.abs().amax() + energy.amax(), functools.partial(_check_finite, block.layer))

    def _shapes(self, block: MoEBlock) -> Shapes:
        current = self.current
        return layer_shapes(
            {Need.FISHER}, current.num_samples, len(current.token_sample), block.num_experts, 0, 0,
            torch.float32, torch.float32, block.rule,
        )  # fmt: skip


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


def _states_file(index: int) -> str:
    return f"states_{index:05d}.safetensors"


def _gradients_file(index: int) -> str:
    return f"gradients_{index:05d}.safetensors"
