# SPDX-License-Identifier: Apache-2.0
"""Refit: down projections of retained experts in closed form, layer by layer, with no backward pass.

One pass over the model's layers, in memory or from files with one layer there at a time, carries three streams of
hidden states: of the original and of the pruned model on text that is held back, and of the pruned model with new
weights, *the recovered one*, on all text. In each layer that loses experts the retained ones are fitted to what the
whole layer gives for the tokens of the recovered stream (``least_squares``), and the stream goes on with the new
weights, rounded as they will be kept. What comes out of the last layer says what it was worth.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..architectures.structure import structure_of
from ..calibration.samples import CalibrationSet
from ..calibration.shares import numbers_of
from ..calibration.states import States, state_shapes
from ..compat import text_config
from ..errors import RunError
from ..evaluation.divergence import batch_size_for, kl_per_token
from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.down import Down, down_projection
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of, rows_of
from ..models.widened import WIDENING
from ..processes import ALONE, Processes
from ..processes.folders import own_workspace
from ..progress import progress, working
from ..storage.growing import Store
from ..storage.tensor_files import Shapes
from ..storage.values import Values
from ..storage.workspace import Workspace
from .added import added_share
from .layer_refit import LayerResult, LayerTokens, matrix_of, replace_down, with_changes
from .split import Split

Retained = Mapping[int, tuple[int, ...]]
Dtypes = Callable[[int, torch.dtype], torch.dtype]
"""The precision that a layer's down projections are kept in, of the one that the model has them in."""

_ORIGINAL, _PRUNED, _RECOVERED = "original", "pruned", "recovered"
_RESULT = "result"


@dataclass(frozen=True)
class Refit:
    """New down projections, and what they are worth.

    Attributes:
        weights: By parameter of the pruned model; fused experts in the numbering after the cut.
        layers: What became of each layer that lost experts.
        divergences: ``KL(original || pruned)`` and ``KL(original || recovered)``, summed over the predicted tokens of
            each sample that is held back ``(2, S)`` float64.
    """

    weights: Mapping[str, Tensor]
    layers: tuple[LayerResult, ...]
    divergences: Tensor


def refit(
    runner: LayerByLayer,
    split: Split,
    retained: Retained,
    *,
    batch_size: int = 8,
    dtypes: Dtypes = lambda layer, dtype: dtype,
    work: Values | None = None,
    settings: Values | None = None,
    workspace: Workspace = Workspace(),
    processes: Processes = ALONE,
) -> Refit:
    """Fit the down projections of retained experts to what the original layers give.

    Args:
        runner: The unpruned model, which is as it was afterwards.
        split: The text.
        retained: The plan: the experts that are left in each layer.
        batch_size: Samples in a forward pass, at most.
        dtypes: The precision that new weights are rounded to.
        work: What else decides about the numbers, as nested plain values: a later call for something else is refused.
        settings: What of that follows from, as ``Store`` takes it.
        workspace: Where finished layers are kept; a later call for the same continues.
        processes: Those that share the batches; all have the whole result.

    Raises:
        RunError: If a weight is NaN or infinite, or the disk is full.
    """
    vocab_size = text_config(runner.model.config).vocab_size
    parts = []
    for samples in (split.fit, split.held_back):
        samples.check_vocabulary(vocab_size)
        every = list(samples.batches(batch_size_for(vocab_size, samples, batch_size)))
        parts.append([every[number] for number in processes.share(len(every))])
    own = own_workspace(processes, workspace, "refit")
    identity = {
        **(work or {}),
        "samples": [split.fit.fingerprint, split.held_back.fingerprint],
        "batches": [list(batch.input_ids.shape) for batches in parts for batch in batches],
        "plan": [[layer, list(experts)] for layer, experts in sorted(retained.items())],
        **({} if processes.is_alone else {"processes": processes.count}),
    }
    store = Store(own.folder, identity, own.restart, "refit", settings, processes.look)
    try:
        return _Pass(runner, parts[0], parts[1], retained, store, dtypes, processes, split.held_back).run()
    finally:
        store.close()


class _Pass:
    """One pass over the layers."""

    def __init__(
        self,
        runner: LayerByLayer,
        fit: Sequence[Batch],
        held_back: Sequence[Batch],
        retained: Retained,
        store: Store,
        dtypes: Dtypes,
        processes: Processes,
        judged: CalibrationSet,
    ) -> None:
        self.runner, self.store, self.dtypes, self.processes, self.judged = runner, store, dtypes, processes, judged
        self.fit, self.held_back = fit, held_back
        self.every = [*fit, *held_back]
        self.retained = retained
        self.num_fit = sum(int(batch.attention_mask.sum()) for batch in fit)
        self.num_tokens = sum(int(batch.attention_mask.sum()) for batch in self.every)
        self.layers_path = structure_of(runner.model, runner.blocks[0].spec).layers
        self.cut = {b.layer: b for b in runner.blocks if len(retained.get(b.layer, ())) not in (0, b.num_experts)}
        self.streams: dict[str, tuple[States, Sequence[Batch]]] = {}
        self.weights: dict[str, Tensor] = {}
        self.layers: list[LayerResult] = []

    def run(self) -> Refit:
        """Do the layers that an earlier run did not, and what comes after them."""
        runner, store = self.runner, self.store
        steps = runner.num_layers + 1
        store.check_steps(steps, "layer")
        for layer in sorted(self.cut):
            if layer < store.finished:
                self._take_up(layer)
        if store.finished == steps:
            return self._result(store.tensors("divergences.safetensors", None)["kl"])
        runner.prepare()
        with (
            runner.running(),
            runner.reading_ahead() as ahead,
            working("refitting", steps, "layer", "refitted", begun=store.finished) as work,
        ):
            self._begin()
            for index in range(store.finished, runner.num_layers):
                with runner.loaded(index):
                    ahead(index + 1)
                    self._layer(index)
                whole = [name for states, _ in self.streams.values() for name in states.whole(index + 1)]
                files = [_file(layer) for layer in self.cut if layer <= index]
                store.commit(index + 1, [*files, *whole])
                work.update()
            kl = self._divergences()
            store.tensors("divergences.safetensors", {"kl": (tuple(kl.shape), kl.dtype)})["kl"].copy_(kl)
            store.commit(steps, ["divergences.safetensors", *map(_file, self.cut)])
            work.update()
        return self._result(kl)

    def _begin(self) -> None:
        """The streams before the first layer that is to be done."""
        runner, carrier = self.runner, Carrier(lane_of(self.runner.device))
        for name, batches in ((_ORIGINAL, self.held_back), (_PRUNED, self.held_back), (_RECOVERED, self.every)):
            shapes = state_shapes(batches, runner.state_shape, None)
            states = States(self.store, shapes, carrier, name)
            self.streams[name] = states, batches
        self.store.check_space(sum(2 * states.nbytes for states, _ in self.streams.values()))
        for states, batches in self.streams.values():
            if self.store.finished:
                states.open()
            else:
                states.begin(runner.embedded(batches))

    # -- a layer

    def _layer(self, index: int) -> None:
        block = self.cut.get(index)
        self._forward(_ORIGINAL, index)
        if block is None:
            self._forward(_PRUNED, index)
            self._forward(_RECOVERED, index)
            return
        retained = self.retained[index]
        with block.restricted(retained):
            self._forward(_PRUNED, index)
        down = down_projection(block)
        if down is None:
            with block.restricted(retained):
                self._forward(_RECOVERED, index)
            self._keep(index, block, None, torch.zeros(0), LayerResult(index, (), 0.0, 0.0, tuple(retained), 0.0))
            return
        tokens, share = self._seen(index, block)
        refitted = tokens.refit(down, self.processes)
        dtype = self.dtypes(index, matrix_of(block, down, retained[0]).dtype)
        values = with_changes(block, retained, down, refitted.changes, dtype)
        self._keep(index, block, down, values, refitted.result)
        if share:
            self._lack(tokens, share)
        undo = replace_down(block, retained, down, values)
        try:
            with block.restricted(retained):
                self._forward(_RECOVERED, index, len(self.fit) if share else 0)
        finally:
            undo()
        self.store.remove(_tokens_file(index))

    def _forward(self, stream: str, index: int, first: int = 0) -> None:
        """Run a stream through the layer as it is, from one of the batches on."""
        states, batches = self.streams[stream]
        states.turn(index, first)
        for number in range(first, len(batches)):
            states.put(number, self.runner.forward(index, batches[number], states.hidden()), None)

    def _seen(self, index: int, block: MoEBlock) -> tuple[LayerTokens, float]:
        """What goes through the layer in the recovered stream, and by which share its experts add to that.

        Where they do, what comes out of the whole layer stands in the stream for what comes out of the refitted one.
        """
        tokens = LayerTokens(
            block,
            self.retained[index],
            self.num_tokens,
            self.num_fit,
            lambda shapes: self.store.tensors(_tokens_file(index), shapes),
            self.runner.device,
        )
        states, batches = self.streams[_RECOVERED]
        states.turn(index)
        share = 0.0
        for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=_sizes(batches))):
            hidden = states.hidden()
            if number == 0:
                share = added_share(self.runner, block, batch, hidden)
                share = min(self.processes.meet(share), key=abs)
            output = self._run(block, batch, hidden, tokens)
            if share and number < len(self.fit):
                states.put(number, output, None)
        if not batches:  # others have some, and wait
            share = min(self.processes.meet(math.inf), key=abs)
        return tokens, share

    def _run(self, block: MoEBlock, batch: Batch, hidden: Tensor, tokens: LayerTokens) -> Tensor:
        """A batch through the whole layer, watched: where its tokens would go in the pruned one, and what they get."""
        real = batch.attention_mask.flatten().nonzero().flatten()
        retained, run = tokens.retained, functools.partial(self.runner.forward, block.layer, batch)
        is_fixed = WIDENING in block.router.__dict__  # while the model runs it finds copies of its tensors
        if not block.structure.block or block.calls_modules or is_fixed:
            with block.restricted(retained, tokens.left):
                run(hidden.clone())
            with block.observed(_unheard, tokens.taker(real)):
                return run(hidden)
        module = block.module
        before, forward = module.__dict__.get("forward"), module.forward

        def twice(*args: Any, **kwargs: Any) -> Any:
            with block.restricted(retained, tokens.left):
                forward(*args, **kwargs)
            with block.observed(_unheard, tokens.taker(real)):
                return forward(*args, **kwargs)

        try:
            module.forward = twice
            return run(hidden)
        finally:
            if before is None:
                del module.forward
            else:
                module.forward = before

    def _lack(self, tokens: LayerTokens, share: float) -> None:
        """Take what the refitted layer lacks off what comes out of the whole one, of the text that is fitted to."""
        states, _ = self.streams[_RECOVERED]
        begin = 0
        for number, batch in enumerate(self.fit):
            real = batch.attention_mask.flatten().nonzero().flatten()
            residual = tokens.tensors["residual"][begin : begin + len(real)]
            begin += len(real)
            lacks = torch.zeros(batch.input_ids.numel(), residual.shape[1])
            lacks[real] = -share * residual
            shaped = lacks.view(*batch.input_ids.shape, -1)
            states.change(number, lambda state, shaped=shaped: self.runner.moved(state, shaped))  # type: ignore[misc]

    # -- what is kept of a layer

    def _keep(self, index: int, block: MoEBlock, down: Down | None, values: Tensor, result: LayerResult) -> None:
        """Keep new weights, those of the layer that changed, and what became of it."""
        said = torch.frombuffer(bytearray(json.dumps(asdict(result)).encode()), dtype=torch.uint8)
        named: dict[str, Tensor] = {}
        if down is not None and result.is_changed:
            parts = list(values) if block.structure.numbered else [values]
            named = dict(zip(self._names(block, down), parts, strict=True))
        shapes: Shapes = {name: (tuple(value.shape), value.dtype) for name, value in (*named.items(), (_RESULT, said))}
        file = self.store.tensors(_file(index), shapes)
        for name, value in (*named.items(), (_RESULT, said)):
            file[name].copy_(value)
        self._take(file)

    def _take_up(self, index: int) -> None:
        self._take(self.store.tensors(_file(index), None))

    def _take(self, file: Mapping[str, Tensor]) -> None:
        values = json.loads(bytes(file[_RESULT].numpy()))
        for name in ("ridges", "left_out"):
            values[name] = tuple(values[name])
        self.layers.append(LayerResult(**values))
        self.weights |= {name: file[name] for name in file if name != _RESULT}

    def _names(self, block: MoEBlock, down: Down) -> list[str]:
        """The parameters of the pruned model that hold a layer's down projections."""
        start = f"{self.layers_path}.{block.layer}"
        if not block.structure.numbered:
            return [f"{start}.{down.path}"]
        return [f"{start}.{block.structure.experts}.{n}.{down.path}" for n in range(len(self.retained[block.layer]))]

    # -- what comes after the layers

    def _divergences(self) -> Tensor:
        """``KL(original || pruned)`` and of the recovered model, of each sample held back ``(2, S)``."""
        kl = torch.zeros(2, len(self.judged), dtype=torch.float64)
        streams = [self.streams[name][0] for name in (_ORIGINAL, _PRUNED, _RECOVERED)]
        for states in streams:
            states.turn(self.runner.num_layers)
        for _ in self.fit:
            streams[2].hidden()
        with self.runner.head():
            for batch in self.held_back:
                mask = batch.attention_mask[:, 1:].bool()
                sample = batch.samples[:, None].expand(mask.shape)[mask]

                def log_p(states: States, batch: Batch = batch, mask: Tensor = mask) -> Tensor:
                    logits = self.runner.logits(batch, states.hidden())
                    return torch.log_softmax(rows_of(logits[:, :-1], mask).float(), dim=-1)

                original = log_p(streams[0])
                for row, states in enumerate(streams[1:]):
                    kl[row].index_add_(0, sample, kl_per_token(original, log_p(states)).cpu())
        rows = numbers_of(self.held_back)
        for numbers, found in self.processes.meet((rows, kl[:, rows])):
            kl[:, numbers] = found
        if not bool(torch.isfinite(kl).all()):
            raise RunError("the divergence of the pruned model is not finite: the model holds NaN or infinite values.")
        return kl.clamp_(min=0)

    def _result(self, kl: Tensor) -> Refit:
        return Refit(self.weights, tuple(sorted(self.layers, key=lambda result: result.layer)), kl)


def _file(layer: int) -> str:
    return f"refit_{layer:05d}.safetensors"


def _tokens_file(layer: int) -> str:
    return f"tokens_{layer:05d}.safetensors"


def _unheard(logits: Tensor) -> None:
    """For logits that nobody asks for."""


def _sizes(batches: Sequence[Batch]) -> list[int]:
    return [batch.input_ids.numel() for batch in batches]
