# SPDX-License-Identifier: Apache-2.0
"""What the original model predicts for each token of some samples, once and for all: what a pruned one is taught.

Of a small vocabulary all log-probabilities are kept, in float32. Of a large one the ``TOP`` most likely tokens and
what all others have together are: the divergence is then that of these distributions, of which "any other token" is
one outcome. It is never more than the whole one (2% less for this project's small models at half of their experts);
before and after are measured alike.

Shapes: N predicted tokens (all of a sample but its first), V vocabulary, K kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..calibration.states import States, state_shapes
from ..compat import text_config
from ..errors import RequestError, RunError
from ..evaluation.divergence import batch_size_for
from ..models.batches import Batch
from ..models.checks import evaluating, input_device
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of, rows_of, sent
from ..models.widened import widened
from ..progress import progress, working
from ..storage.growing import Store
from ..storage.tensor_files import Shapes, shapes_bytes
from ..storage.values import Values
from ..storage.workspace import Workspace

FULL_VOCABULARY = 2048
"""Up to here everything is kept: it takes no more than four times what the top takes."""
TOP = 256

_FILE = "teacher.safetensors"
_DOING, _DID = "asking the original", "asked"
_Keep = Callable[[Batch, Tensor], None]  # takes a batch and its logits
_LOG_P, _IDS, _REST = "log_p", "ids", "rest"


@dataclass(frozen=True)
class Targets:
    """What the original predicts for some tokens.

    Attributes:
        log_p: Log-probabilities ``(N, K)`` float32.
        ids: Of which tokens ``(N, K)`` int64; None where they are of the whole vocabulary, in its order.
        rest: The logarithm of what all others have together ``(N,)``; None likewise.
    """

    log_p: Tensor
    ids: Tensor | None = None
    rest: Tensor | None = None

    def __len__(self) -> int:
        return len(self.log_p)

    def kl(self, logits: Tensor) -> Tensor:
        """``KL(original || model)`` in nats of a model's logits ``(N, V)`` for these tokens: ``(N,)`` float32."""
        logits = logits.float()
        if self.ids is None or self.rest is None:
            return _kl(self.log_p, torch.log_softmax(logits, dim=1)).sum(1)
        every = logits.logsumexp(1)
        top = logits.gather(1, self.ids) - every[:, None]
        others = logits.scatter(1, self.ids, -torch.inf).logsumexp(1) - every
        return _kl(self.log_p, top).sum(1) + _kl(self.rest, others)

    def slices(self, rows: int) -> Iterator[tuple[slice, Targets]]:
        """A few tokens at a time, and which they are."""
        for first in range(0, len(self), rows):
            part = slice(first, first + rows)
            yield part, self[part]

    def __getitem__(self, part: slice) -> Targets:
        ids, rest = self.ids, self.rest
        return Targets(self.log_p[part], None if ids is None else ids[part], None if rest is None else rest[part])

    def to(self, device: torch.device) -> Targets:
        """The same on a device."""
        ids, rest = self.ids, self.rest
        return Targets(
            sent(self.log_p, device),
            None if ids is None else sent(ids, device),
            None if rest is None else sent(rest, device),
        )


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p log(p / q)``; nothing where ``p`` is nothing, whatever ``q`` is."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)


@dataclass(frozen=True)
class TeacherOutputs:
    """What the original model predicts for samples, by their hash.

    Attributes:
        vocab_size: Its vocabulary.
        places: Where the tokens of each sample begin and end.
        tensors: Of all tokens, as in :class:`Targets` (``ids`` in int32).
    """

    vocab_size: int
    places: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, Tensor]

    def of(self, samples: CalibrationSet, batch: Batch) -> Targets:
        """For the predicted tokens of a batch of some samples, one sample's after another's.

        Raises:
            RequestError: If it was not asked about a sample.
        """
        hashes = [samples.samples[number].hash for number in batch.samples.tolist()]
        if missing := [name for name in hashes if name not in self.places]:
            raise RequestError(f"the teacher's outputs are of other samples: {missing[0][:12]} is not among them.")
        parts = [slice(*self.places[name]) for name in hashes]
        found = {name: torch.cat([tensor[part] for part in parts]) for name, tensor in self.tensors.items()}
        if _IDS not in found:
            return Targets(found[_LOG_P])
        return Targets(found[_LOG_P], found[_IDS].long(), found[_REST])

    @property
    def is_whole(self) -> bool:
        """Whether the whole vocabulary is kept, and divergences are those of whole distributions."""
        return _IDS not in self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def teacher_shapes(num_tokens: int, vocab_size: int, top: int = TOP) -> Shapes:
    """What is kept for so many predicted tokens."""
    if vocab_size <= max(top, FULL_VOCABULARY):
        return {_LOG_P: ((num_tokens, vocab_size), torch.float32)}
    return {
        _LOG_P: ((num_tokens, top), torch.float32),
        _IDS: ((num_tokens, top), torch.int32),
        _REST: ((num_tokens,), torch.float32),
    }


def teacher_bytes(samples: CalibrationSet, vocab_size: int) -> int:
    """Bytes that :func:`teacher_outputs` keeps."""
    return shapes_bytes(teacher_shapes(samples.num_tokens - len(samples), vocab_size))


def teacher_outputs(
    runner: LayerByLayer,
    samples: CalibrationSet,
    *,
    batch_size: int = 8,
    work: Values | None = None,
    settings: Values | None = None,
    workspace: Workspace = Workspace(),
) -> TeacherOutputs:
    """Run the original model on samples, and keep what it predicts.

    In memory this is done batch by batch; a checkpoint is read once, layer by layer.

    Args:
        runner: The original model.
        samples: Both those to fit to and those held back.
        batch_size: Samples in a forward pass, at most; fewer where the vocabulary is large.
        work: What else decides about the numbers, as nested plain values: a later call for something else is refused.
        settings: What of that follows from, as ``Store`` takes it.
        workspace: Where finished batches (on disk: layers) are kept; a later call for the same continues.

    Raises:
        RunError: If the original predicts no finite numbers, or the disk is full.
    """
    vocab_size = text_config(runner.model.config).vocab_size
    samples.check_vocabulary(vocab_size)
    places, total = {}, 0
    for sample in samples.samples:
        places[sample.hash] = (total, total + sample.num_tokens - 1)
        total += sample.num_tokens - 1
    batches = list(samples.batches(batch_size_for(vocab_size, samples, batch_size)))
    shapes = teacher_shapes(total, vocab_size)
    identity = {
        **(work or {}),
        "samples": samples.fingerprint,
        "batches": [list(batch.input_ids.shape) for batch in batches],
        "kept": list(shapes[_LOG_P][0]),
    }
    store = Store(workspace.folder, identity, workspace.restart, "teacher's outputs", settings)

    def rows_in(batch: Batch) -> list[slice]:
        return [slice(*places[samples.samples[number].hash]) for number in batch.samples.tolist()]

    def finished_in(tensors: Mapping[str, Tensor], step: int) -> Iterable[Tensor]:
        if runner.streams:
            return tensors.values() if step == runner.num_layers else ()
        return [tensors[name][rows] for name in sorted(shapes) for rows in rows_in(batches[step])]

    try:
        store.check_space(shapes_bytes(shapes))
        tensors = store.tensors(_FILE, shapes, keep=store.finished > 0, part=finished_in)

        def keep(batch: Batch, logits: Tensor) -> None:
            _write(tensors, rows_in(batch), _predicted(batch, logits, vocab_size, shapes))

        if runner.streams:
            _from_disk(runner, batches, store, keep)
        else:
            _in_memory(runner, batches, store, keep)
        return TeacherOutputs(vocab_size, places, tensors)
    finally:
        store.close()


def _in_memory(runner: LayerByLayer, batches: Sequence[Batch], store: Store, keep: _Keep) -> None:
    store.check_steps(len(batches), "batch")
    sizes = [batch.input_ids.numel() for batch in batches]
    with (
        widened(runner.model, runner.dtype),
        torch.no_grad(),
        evaluating(runner.model),
        working(_DOING, len(batches), "batch", _DID, begun=store.finished, costs=sizes) as work,
    ):
        for number in range(store.finished, len(batches)):
            keep(batches[number], logits_of(runner.model, batches[number]))
            store.commit(number + 1)
            work.update()


def _from_disk(runner: LayerByLayer, batches: Sequence[Batch], store: Store, keep: _Keep) -> None:
    layers = runner.num_layers
    store.check_steps(layers + 1)
    runner.prepare()
    sizes = [batch.input_ids.numel() for batch in batches]
    with (
        runner.running(),
        runner.reading_ahead() as ahead,
        working(_DOING, layers + 1, "step", _DID, begun=store.finished) as work,
    ):
        states = States(store, state_shapes(batches, runner.state_shape, None), Carrier(lane_of(runner.device)))
        store.check_space(2 * states.nbytes)
        if store.finished:
            states.open()
        else:
            states.begin(runner.embedded(batches))
        for layer in range(store.finished, layers):
            with runner.loaded(layer):
                ahead(layer + 1)
                states.turn(layer)
                for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=sizes)):
                    states.put(number, runner.forward(layer, batch, states.hidden()), None)
            store.commit(layer + 1, states.whole(layer + 1))
            work.update()
        if store.finished == layers:
            states.turn(layers)
            with runner.head():
                for batch in progress(batches, "batches", unit="batch", costs=sizes):
                    keep(batch, runner.logits(batch, states.hidden()))
            store.commit(layers + 1, states.whole(layers))
            work.update()


def logits_of(model: Any, batch: Batch) -> Tensor:
    """The logits ``(B, L, V)`` of a model in memory, by its own forward."""
    device = input_device(model)
    has_routers = hasattr(text_config(model.config), "output_router_logits")
    options = {"output_router_logits": False} if has_routers else {}
    ids, mask = (sent(tensor, device) for tensor in (batch.input_ids, batch.attention_mask))
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits


def predicted_rows(batch: Batch, logits: Tensor) -> Tensor:
    """The logits ``(N, V)`` that predict a token, of all ``(B, L, V)``, one sample's after another's."""
    return rows_of(logits[:, :-1], batch.attention_mask[:, 1:].bool())


def _predicted(batch: Batch, logits: Tensor, vocab_size: int, shapes: Shapes) -> dict[str, Tensor]:
    """What is kept of a batch, one sample's after another's."""
    log_p = torch.log_softmax(predicted_rows(batch, logits)[:, :vocab_size].float(), dim=1)
    if not bool(torch.isfinite(log_p.amax(1)).all()):
        raise RunError("the original model predicts NaN for some of the samples; nothing can be recovered by it.")
    if _IDS not in shapes:
        return {_LOG_P: log_p}
    top, ids = log_p.topk(shapes[_IDS][0][1], dim=1)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    return {_LOG_P: top, _IDS: ids.int(), _REST: rest}


def _write(tensors: Mapping[str, Tensor], rows: Sequence[slice], made: Mapping[str, Tensor]) -> None:
    lengths = [part.stop - part.start for part in rows]
    for name, values in made.items():
        for part, own in zip(rows, values.cpu().split(lengths), strict=True):
            tensors[name][part] = own
