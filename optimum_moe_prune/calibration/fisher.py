# SPDX-License-Identifier: Apache-2.0
r"""What a change of an expert's weight does to the model's own predictions, to first order, from one backward pass.

At a token :math:`t` the experts' output is :math:`F_t = \sum_e \pi_{te} f_e(x_t)`. With labels :math:`y` drawn from
what the model itself predicts, one for each position of a sample, and :math:`g_{tj} = \partial \log p(y_j) / \partial
F_t` the gradient of the sum of their log-probabilities for the j-th draw, the statistic is

.. math:: a_{tje} = f_e(x_t) \cdot g_{tj}.

Labels of different positions are independent and their scores have mean 0, so that the mean of :math:`(c \cdot
a_{tj})^2` over draws is twice what a change :math:`c` of the routing weights at :math:`t` adds to the divergence of
the predictions, at that position and at all that follow, to second order
(``methods.fisher_replay``). The gradient is that at the experts' own output: whatever an architecture does with the
sum before it is added to the hidden states (norms, factors) is part of it.

Hidden states go forward and are kept before each layer; then each layer runs once more, from the last to the first
with experts, and gradients go back through it. Nothing of a layer is kept beyond that, so it is the same for a model
in memory and one of which a layer at a time is read. Which labels are drawn follows from the seed, the sample and the
position alone.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of
from ..progress import working
from ..statistics.needs import Need, layer_shapes
from ..statistics.stats import LayerStats
from ..storage.growing import Store
from ..storage.tensor_files import Shapes
from .current import Current
from .fisher_streamed import Streamed
from .gradients import Gradients, fisher_file
from .outbox import Outbox
from .samples import CalibrationSet

_GROUP_SECONDS = 10.0  # in which batches are finished together, of a model in memory


FOLDER = "fisher"
"""In the folder of a calibration that can be continued."""


def check_predicts(model: Any, needs: Collection[Need]) -> None:
    """Raise where gradients of predictions are asked for of a model that predicts nothing.

    Raises:
        RequestError: Naming what it lacks.
    """
    if Need.FISHER in needs and model.get_output_embeddings() is None:
        raise RequestError(
            f"gathering gradients (fisher) needs what a model predicts, and a {type(model).__name__} has no head that "
            "predicts tokens; calibrate the whole model."
        )


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
        batches = list(calibration.batches(batch_size))
        gradients = Gradients(runner, calibration, current, seed)
        shapes_of = functools.partial(_shapes_of, current)
        with runner.running(), _frozen(runner.model), Outbox() as outbox:
            if runner.streams:
                return Streamed(runner, gradients, current, batches, store, shapes_of).run(outbox, read_ahead)
            tensors = _tensors_in(store, runner, current, batches)
            return _in_memory(runner, gradients, current, batches, store, tensors, outbox)
    finally:
        store.close()


def with_fisher(layers: Mapping[int, LayerStats], found: Mapping[int, Mapping[str, Tensor]]) -> dict[int, LayerStats]:
    """Statistics of layers with what was gathered here; of heads, which have no part in what is predicted, zeros."""
    return {
        index: replace(layer, tensors={**layer.tensors, **found[index]}) if index in found else of_head(layer)
        for index, layer in layers.items()
    }


def of_head(layer: LayerStats) -> LayerStats:
    """Statistics of a head, whose experts have no part in what is predicted: zeros stand for their gradients."""
    shapes = layer_shapes(
        {Need.FISHER}, 0, len(layer.token_sample), layer.num_experts, 0, 0, torch.float32, torch.float32, layer.routing
    )
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    return replace(layer, tensors={**layer.tensors, **zeros})


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


def _shapes_of(current: Current, block: MoEBlock) -> Shapes:
    return layer_shapes(
        {Need.FISHER}, current.num_samples, len(current.token_sample), block.num_experts, 0, 0,
        torch.float32, torch.float32, block.rule,
    )  # fmt: skip


def _tensors_in(
    store: Store, runner: LayerByLayer, current: Current, batches: Sequence[Batch]
) -> dict[int, Mapping[str, Tensor]]:
    """The tensors of all layers, which every batch writes its rows of."""
    store.check_steps(len(batches), "batch")

    def finished_in(tensors: Mapping[str, Tensor], step: int) -> Iterator[Tensor]:
        rows = torch.isin(current.token_sample, batches[step].samples).nonzero().flatten()
        return (tensors[name][rows] for name in sorted(tensors))

    return {
        block.layer: store.tensors(
            fisher_file(block.layer), _shapes_of(current, block), keep=store.finished > 0, part=finished_in
        )
        for block in runner.blocks
    }


def _in_memory(
    runner: LayerByLayer,
    gradients: Gradients,
    current: Current,
    batches: Sequence[Batch],
    store: Store,
    tensors: dict[int, Mapping[str, Tensor]],
    outbox: Outbox,
) -> dict[int, Mapping[str, Tensor]]:
    """All layers for one batch after another."""
    carrier, since = Carrier(lane_of(runner.device)), time.monotonic()
    sizes = [batch.input_ids.numel() for batch in batches]
    with working(
        "differentiating", len(batches), "batch", "differentiated", begun=store.finished, costs=sizes
    ) as work:
        for number in range(store.finished, len(batches)):
            batch = batches[number]
            current.set(batch)
            with outbox.batch():
                _there_and_back(runner, gradients, batch, carrier, tensors, outbox)
            if time.monotonic() - since >= _GROUP_SECONDS or number + 1 == len(batches):
                outbox.wait()
                store.commit(number + 1)
                since = time.monotonic()
            work.update()
    return tensors


def _there_and_back(
    runner: LayerByLayer,
    gradients: Gradients,
    batch: Batch,
    carrier: Carrier,
    tensors: Mapping[int, Mapping[str, Tensor]],
    outbox: Outbox,
) -> None:
    """One batch through all layers, forward and back; what goes into them waits in memory."""
    kept: list[Tensor] = []
    state = next(runner.embedded([batch]))
    for index in range(runner.num_layers):
        kept.append(torch.empty(state.shape, dtype=state.dtype))
        carrier.put(state.to(runner.device), kept[-1])  # where the carrier waits for it; layers may be on other cards
        state = runner.forward(index, batch, state.clone())
    carrier.finish()
    found = gradients.at_logits(batch, state)
    back = range(runner.num_layers - 1, gradients.first - 1, -1)
    for index, state in zip(back, carrier.each(kept[index] for index in back), strict=True):
        found = gradients.back(index, batch, state, found, tensors.get(index), outbox)
