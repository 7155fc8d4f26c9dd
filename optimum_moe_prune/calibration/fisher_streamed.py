# SPDX-License-Identifier: Apache-2.0
"""Gradients of a model of which one layer at a time is there: forward through all layers, then back.

What goes into each layer is kept, in files where there is a folder, until gradients have gone back through it. Each
layer, forward and back, is a step that is finished for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of
from ..progress import progress, working
from ..statistics.needs import LABEL_DRAWS
from ..storage.growing import Store
from ..storage.tensor_files import Shapes, shapes_bytes
from .current import Current
from .gradients import Gradients, fisher_file
from .outbox import Outbox


class Streamed:
    """Gathers the statistics of ``Need.FISHER`` layer by layer.

    Args:
        runner: The model, running.
        gradients: Of its predictions.
        current: The batch being computed.
        batches: All batches.
        store: Where files grow.
        shapes_of: The shapes of what is gathered of a block.
    """

    def __init__(
        self,
        runner: LayerByLayer,
        gradients: Gradients,
        current: Current,
        batches: Sequence[Batch],
        store: Store,
        shapes_of: Callable[[MoEBlock], Shapes],
    ) -> None:
        self._runner = runner
        self._gradients = gradients
        self._current = current
        self._batches = batches
        self._store = store
        self._shapes_of = shapes_of
        self._blocks = {block.layer: block for block in runner.blocks}
        self._first = gradients.first
        self._layers = runner.num_layers
        self._carrier = Carrier(lane_of(runner.device))
        self._files: dict[str, Mapping[str, Tensor]] = {}
        runner.prepare()
        numbered = [(f"{number}", batch) for number, batch in enumerate(batches)]
        self._states: Shapes = {name: runner.state_shape(batch) for name, batch in numbered}
        self._back: Shapes = {
            name: ((LABEL_DRAWS, *runner.hidden_shape(batch)), runner.dtype) for name, batch in numbered
        }

    def run(self, outbox: Outbox, read_ahead: bool) -> dict[int, Mapping[str, Tensor]]:
        """The tensors of each MoE layer.

        Args:
            outbox: Brings them there.
            read_ahead: Read the next layer's bytes while a layer calculates.
        """
        store, layers, steps = self._store, self._layers, 2 * self._layers + 1 - self._first
        store.check_steps(steps, "layer")
        gathered = sum(shapes_bytes(self._shapes_of(block)) for block in self._blocks.values())
        kept = (layers + 1 - self._first) * shapes_bytes(self._states) + 2 * shapes_bytes(self._back)
        store.check_space(gathered + kept)
        if not store.finished:
            begun = self._made(_states_file(0), self._states)
            for number, hidden in enumerate(self._runner.embedded(self._batches)):
                self._carrier.put(hidden, begun[f"{number}"])
            self._carrier.finish()
        with (
            self._runner.reading_ahead() as ahead,
            working("differentiating", steps, "layer", "differentiated", begun=store.finished) as work,
        ):
            for step in range(store.finished, steps):
                index = self._layer_of(step)
                following = -1 if step + 1 == steps else self._layer_of(step + 1)
                with self._runner.head() if index == layers else self._runner.loaded(index):
                    if read_ahead:
                        ahead(following)  # of the head nothing is read ahead
                    if step < layers:
                        self._forward(index)
                    elif step == layers:
                        self._at_logits()
                    else:
                        self._backward(index, outbox)
                needed = self._needed(step)
                store.commit(step + 1, sorted(needed))
                for name in needed:
                    store.release(name)
                for name in self._needed(step - 1) - needed:
                    self._files.pop(name, None)
                    store.remove(name)
                work.update()
        return {index: self._opened(fisher_file(index)) for index in self._blocks}

    def _layer_of(self, step: int) -> int:
        """The layer that a step runs, forward or back; the number of layers for the head."""
        return step if step <= self._layers else 2 * self._layers - step

    def _needed(self, step: int) -> set[str]:
        """The files that are needed when a step is finished."""
        if step < self._layers:
            return {_states_file(step + 1), *map(_states_file, range(self._first, step + 1))}
        index = self._layer_of(step)
        below = map(_states_file, range(self._first, index))
        done = (fisher_file(layer) for layer in self._blocks if layer >= index)
        return {*below, *done, *([_gradients_file(index)] if index > self._first else [])}

    # -- the steps

    def _forward(self, index: int) -> None:
        before, after = self._opened(_states_file(index)), self._made(_states_file(index + 1), self._states)
        states = self._carrier.each(before[f"{number}"] for number in range(len(self._batches)))
        for number, batch in self._over():
            self._carrier.put(self._runner.forward(index, batch, next(states)), after[f"{number}"])
        self._carrier.finish()

    def _at_logits(self) -> None:
        after = self._made(_gradients_file(self._layers), self._back)
        last = self._opened(_states_file(self._layers))
        states = self._carrier.each(last[f"{number}"] for number in range(len(self._batches)))
        for number, batch in self._over():
            self._carrier.put(self._gradients.at_logits(batch, next(states)), after[f"{number}"])
        self._carrier.finish()

    def _backward(self, index: int, outbox: Outbox) -> None:
        before, later = self._opened(_states_file(index)), self._opened(_gradients_file(index + 1))
        after = self._made(_gradients_file(index), self._back) if index > self._first else None
        block = self._blocks.get(index)
        tensors = None if block is None else self._made(fisher_file(index), self._shapes_of(block))
        names = map(str, range(len(self._batches)))
        coming = self._carrier.each(tensor for name in names for tensor in (before[name], later[name]))
        for number, batch in self._over():
            self._current.set(batch)
            with outbox.batch():
                found = self._gradients.back(index, batch, next(coming), next(coming), tensors, outbox)
            if after is not None:
                self._carrier.put(found, after[f"{number}"])
        self._carrier.finish()
        outbox.wait()

    def _over(self) -> Iterator[tuple[int, Batch]]:
        sizes = [batch.input_ids.numel() for batch in self._batches]
        return enumerate(progress(self._batches, "batches", unit="batch", costs=sizes))

    # -- files

    def _made(self, name: str, shapes: Shapes) -> Mapping[str, Tensor]:
        self._files[name] = self._store.tensors(name, shapes)
        return self._files[name]

    def _opened(self, name: str) -> Mapping[str, Tensor]:
        """What an earlier step wrote, or an earlier run."""
        if name not in self._files:
            self._files[name] = self._store.tensors(name, None)
            self._store.release(name)
        return self._files[name]


def _states_file(index: int) -> str:
    return f"states_{index:05d}.safetensors"


def _gradients_file(index: int) -> str:
    return f"gradients_{index:05d}.safetensors"
