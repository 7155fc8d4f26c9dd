# SPDX-License-Identifier: Apache-2.0
"""Distillation of a pruned checkpoint that does not fit in memory: a step reads it twice, a layer at a time.

Forward, what goes into each layer is kept. Backward, each layer is run once more from what went into it, its gradients
are taken, and what is trained of it is changed. The float32 copies and their moments are in files on the host; the
files of the checkpoint stay as they are. The held-back text goes along with the forward pass of the next step.

With the same options the steps are those of a model in memory, up to rounding.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..checkpoints.layout import Layout, model_dtype
from ..errors import faults_of
from ..evaluation.divergence import batch_size_for
from ..models.batches import Batch
from ..models.memory import Compute, available_memory
from ..models.precision import NARROW
from ..models.skeleton import Skeleton
from ..models.widened import widened
from ..names import dtype_text
from ..progress import say, working
from ..storage.growing import Store, unfinished
from ..storage.tensor_files import Shapes, shapes_bytes
from ..storage.values import Values
from ..storage.workspace import Workspace
from .cost import streamed_cost
from .folded import Folded
from .masters import KINDS, VALUE, Master, kept_name, leaf_shapes, reached
from .shares import Shares
from .steps import Distilled, DistilOptions, Watch, by_domain, predicted, step_batches
from .student import (
    add_divergences,
    calculating,
    check_gradients,
    check_vocabularies,
    layers_path,
    loss_and_gradient,
    masters_of,
    notes_before,
    notes_of_unreached,
    numbers_of,
    rank_and_memory,
)
from .teacher import TeacherOutputs, predicted_rows
from .trained import ROLES, Trained, check_roles, raw, trained_of

_COURSE = "course.safetensors"
_SUMS, _SHARES, _LOSS = "sums", "shares", "loss"


def distil_streamed(
    layout: Layout,
    fit: CalibrationSet,
    held_back: CalibrationSet,
    teacher: TeacherOutputs,
    what: Sequence[str] = ROLES,
    options: DistilOptions = DistilOptions(),
    *,
    compute: Compute = Compute(),
    work: Values | None = None,
    settings: Values | None = None,
    workspace: Workspace = Workspace(),
) -> Distilled:
    """Train some of a pruned checkpoint's weights to predict what the original did, with one layer in memory.

    What it will read, and how long it will take, is said before it begins (:func:`cost.streamed_cost`). The
    checkpoint is not changed.

    Args:
        layout: The pruned checkpoint.
        fit: The samples it is trained on.
        held_back: The samples that decide which of its states is kept, and when it is over.
        teacher: What the original predicts for both.
        what: What is trained, as in ``distil``.
        options: How.
        compute: Where to calculate, and in which precision, if that is wider than the checkpoint's.
        work: What else decides about the numbers, as nested plain values, such as which checkpoint it is: a later call
            for something else is refused.
        settings: What of that follows from, as ``Store`` takes it.
        workspace: Where finished steps are kept; a later call for the same continues.

    Raises:
        RequestError: If the samples cannot be used, or nothing can be trained.
        RunError: If the unchanged model predicts NaN, or the disk is full.
    """
    what, options = check_roles(what), options.streamed(fit)
    begun = unfinished(workspace.folder) if workspace.folder is not None and not workspace.restart else None
    before = {} if begun is None else begun[0]  # what was free then decided
    compute = compute.settled(layout, True, before.get("computing_dtype"))
    skeleton = _opened(layout, compute)
    check_vocabularies(skeleton.model, teacher)
    trained = _found(skeleton, fit, what)
    notes = notes_before(trained, what, held_back)
    like = skeleton.model.state_dict()
    asked = before.get("rank") if options.rank is None else options.rank
    rank, memory = rank_and_memory(trained, lambda t: like[t.name], asked, available_memory("cpu"))
    identity = {
        **(work or {}),
        "fit": fit.fingerprint,
        "held_back": held_back.fingerprint,
        "what": list(what),
        "options": asdict(options),
        "rank": rank,
        "computing_dtype": dtype_text(skeleton.dtype),
    }
    store = Store(workspace.folder, identity, workspace.restart, "distillation", settings)
    try:
        course = _Course(skeleton, trained, fit, held_back, teacher, options, rank, store)
        cost = streamed_cost(layout, fit, held_back, options, compute, course.nbytes)
        say(f"distilling one layer at a time: {cost.sentence()}")
        store.check_space(course.nbytes)
        return course.run(memory, notes)
    finally:
        store.close()


def _opened(layout: Layout, compute: Compute) -> Skeleton:
    """The checkpoint in its own precision, whatever wider one is calculated in: what is trained is rounded to it."""
    with faults_of(f"config.json of {layout.checkpoint.name_or_path}"):
        held, asked = model_dtype(layout.config, layout.checkpoint), compute.computing_dtype(layout)
        computing = asked if held in NARROW and asked not in NARROW else held
        return Skeleton(layout, held, compute.runs_on, computing)


def _found(skeleton: Skeleton, fit: CalibrationSet, what: Sequence[str]) -> list[Trained]:
    """What is trained of a checkpoint; of layers that are alike one is read."""
    few = fit.token_ids[0][:8]
    batch = Batch(few[None], torch.ones_like(few)[None], torch.zeros(1, dtype=torch.int64))
    known: list[tuple[Any, list[Trained], str]] = []
    found: list[Trained] = []
    path = layers_path(skeleton.model)
    skeleton.prepare()
    for block in skeleton.blocks:
        start = f"{path}.{block.layer}."
        alike = (block.structure, block.num_experts, type(block.decoder_layer))
        if (one := next(((t, s) for kind, t, s in known if kind == alike), None)) is None:

            def run(index: int = block.layer) -> None:
                with skeleton.running():
                    skeleton.forward(index, batch, skeleton.random_state(batch))

            with skeleton.loaded(block.layer):
                own = trained_of(skeleton.model, [block], what, run)
            known.append((alike, own, start))
            found += own
        else:
            found += [t.moved(start + t.name.removeprefix(one[1]), block.layer) for t in one[0]]
    return found


class _Course:
    """One step after another, each two passes through the checkpoint.

    ``store`` has two files with the state of what is trained, which a step reads and writes in turn, two likewise
    with the best state there was, and one with what each look found: so whatever is interrupted, the last finished
    step is whole.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        trained: Sequence[Trained],
        fit: CalibrationSet,
        held_back: CalibrationSet,
        teacher: TeacherOutputs,
        options: DistilOptions,
        rank: int,
        store: Store,
    ) -> None:
        self._skeleton, self._blocks = skeleton, {block.layer: block for block in skeleton.blocks}
        self._start = layers_path(skeleton.model)
        self._trained = {layer: [t for t in trained if t.layer == layer] for layer in self._blocks}
        self._lowest = min(layer for layer, own in self._trained.items() if own)
        self._fit, self._held_back, self._teacher = fit, held_back, teacher
        self._options, self._rank, self._store = options, rank, store
        size = batch_size_for(teacher.vocab_size, held_back, options.batch_size)
        self._judged = list(held_back.batches(size))
        assert options.steps is not None and options.check_every is not None
        self.steps, self._check_every = options.steps, options.check_every
        self._like = skeleton.model.state_dict()
        self._shapes = _kept_shapes(trained, self._like, rank, KINDS)
        self._best_shapes = _kept_shapes(trained, self._like, rank, (VALUE,))
        looks = self.steps + 1
        self._course_shapes: Shapes = {
            _SUMS: ((looks, len(held_back)), torch.float64),
            _SHARES: ((looks, len(self._blocks)), torch.float64),
            _LOSS: ((looks,), torch.float64),
        }
        self._watch, self._shares = Watch(options.patience), Shares()
        self._improved = 0

    @property
    def nbytes(self) -> int:
        """What is kept on disk."""
        return 2 * shapes_bytes(self._shapes) + 2 * shapes_bytes(self._best_shapes)

    def run(self, memory: int, notes: list[str]) -> Distilled:
        """All steps that are left."""
        store, skeleton = self._store, self._skeleton
        store.check_steps(self.steps + 1)
        begun = store.finished
        self._states = [store.tensors(f"trained_{n}.safetensors", self._shapes, begun > 0) for n in range(2)]
        self._bests = [store.tensors(f"best_{n}.safetensors", self._best_shapes, begun > 0) for n in range(2)]
        self._course = store.tensors(
            _COURSE, self._course_shapes, begun > 0, lambda tensors, step: [t[step] for t in tensors.values()]
        )
        is_over = any([self._ends(step, notes) for step in range(begun)])
        done = begun
        batches = itertools.islice(step_batches(self._fit, self._options), begun, None)
        with (
            widened(skeleton.model, skeleton.dtype, in_pieces=False),
            skeleton.running(),
            skeleton.reading_ahead() as ahead,
            working("distilling", self.steps + 1, "step", "distilled", begun=begun) as progress,
        ):
            while not is_over and done <= self.steps:
                is_over = self._step(done, next(batches) if done < self.steps else [], ahead, notes)
                done += 1
                store.commit(done, [f"trained_{done % 2}.safetensors", f"best_{self._improved % 2}.safetensors"])
                progress.update()
        like = self._like
        every = [t for own in self._trained.values() for t in own]
        numbers = numbers_of(every, lambda t: like[t.name], self._rank)
        if done > 1:
            notes += notes_of_unreached(list(numbers), reached(every, self._states[(done - 1) % 2]))
        best = Folded(skeleton, every, self._bests[self._improved % 2], self._rank) if self._watch.best else {}
        return Distilled.of(
            self._watch,
            best,
            done - 1,
            self._shares.changes,
            self._rank,
            numbers,
            memory,
            notes,
        )

    # -- one step

    def _step(self, step: int, batches: list[Batch], ahead: Callable[[int], None], notes: list[str]) -> bool:
        """Look at the held-back text, where it is time, and then make a step with some batches; whether it is over."""
        skeleton, scratch = self._skeleton, Store()
        judged = self._judged if self._is_look(step) else []
        every = [*judged, *batches]
        shapes: Shapes = {str(n): skeleton.state_shape(batch) for n, batch in enumerate(every)}
        kept = {0: scratch.tensors("0", shapes)}
        for n, state in enumerate(skeleton.embedded(every)):
            kept[0][str(n)].copy_(state)
        for layer in range(skeleton.num_layers):
            with skeleton.loaded(layer):
                ahead(layer + 1)
                kept[layer + 1] = scratch.tensors(str(layer + 1), shapes)
                self._forward(step, layer, judged, batches, kept[layer], kept[layer + 1])
            if layer < self._lowest or not batches:  # nobody comes back for it
                del kept[layer]
                scratch.remove(str(layer))
        last = kept.pop(skeleton.num_layers)
        with skeleton.head():
            if judged:
                self._course[_SUMS][step] = self._divergences(judged, last)
                found = self._shares.end()
                self._course[_SHARES][step] = torch.tensor([found[layer] for layer in self._blocks])
            gradients = self._at_head(step, batches, [last[str(len(judged) + n)] for n in range(len(batches))])
        del last
        scratch.remove(str(skeleton.num_layers))
        if self._ends(step, notes, is_new=True):
            return True
        for layer in reversed(range(self._lowest, skeleton.num_layers) if batches else range(0)):
            with skeleton.loaded(layer):
                ahead(layer - 1 if layer > self._lowest else skeleton.num_layers)
                states = [kept[layer][str(len(judged) + n)] for n in range(len(batches))]
                self._backward(step, layer, batches, states, gradients)
            del kept[layer], states
            scratch.remove(str(layer))
        return False

    def _forward(
        self,
        step: int,
        layer: int,
        judged: Sequence[Batch],
        batches: Sequence[Batch],
        states: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> None:
        """Run a loaded layer: held-back text with what would be written now, text to fit to with the copies."""
        masters = self._masters(step, layer, changes=False)
        for n, batch in enumerate([*judged, *batches]):
            looks = self._shares if n < len(judged) else None
            self._shares.of(batch)
            with self._calculating(layer, masters, looks):
                after[str(n)].copy_(self._skeleton.forward(layer, batch, states[str(n)].clone()))

    def _divergences(self, judged: Sequence[Batch], states: Mapping[str, Tensor]) -> Tensor:
        """Of the held-back text, summed over the tokens of each sample ``(S,)``."""
        sums = torch.zeros(len(self._held_back), dtype=torch.float64)
        for n, batch in enumerate(judged):
            logits = self._skeleton.logits(batch, states[str(n)].clone())
            add_divergences(sums, batch, self._teacher.of(self._held_back, batch), logits)
        return sums

    def _at_head(self, step: int, batches: Sequence[Batch], states: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of what came out of the last layer, of each batch."""
        total, loss, gradients = sum(map(predicted, batches)), 0.0, []
        for batch, state in zip(batches, states, strict=True):
            with torch.enable_grad():
                leaf, logits = self._skeleton.traced_logits(batch, state.clone())
                rows = predicted_rows(batch, logits)
                found, gradient = loss_and_gradient(rows, self._teacher.of(self._fit, batch), total)
                rows.backward(gradient)
            assert leaf.grad is not None
            gradients.append(leaf.grad.cpu())
            loss += found
        self._course[_LOSS][step] = loss
        return gradients

    def _backward(
        self, step: int, layer: int, batches: Sequence[Batch], states: Sequence[Tensor], gradients: list[Tensor]
    ) -> None:
        """Run a loaded layer once more, change what is trained of it, and have the gradients of what went in."""
        masters = self._masters(step, layer)
        for n, (batch, state) in enumerate(zip(batches, states, strict=True)):
            with torch.enable_grad(), self._calculating(layer, masters):
                leaf, output = self._skeleton.traced(layer, batch, state.clone())
            check_gradients(output)
            output.backward(gradients[n].to(output))
            assert leaf.grad is not None
            gradients[n] = leaf.grad.cpu()
        target = self._states[(step + 1) % 2]
        for master in masters:
            master.step(step, self._options.pace(step, self.steps))
            for name, tensor in master.tensors.items():
                target[name].copy_(tensor)

    def _masters(self, step: int, layer: int, changes: bool = True) -> list[Master]:
        """The copies of a loaded layer as they are before a step; before the first they are made."""
        model = self._skeleton.model
        masters = masters_of(
            self._trained.get(layer, ()), lambda t: raw(model, t.name), self._options.rate, self._rank,
            self._options.seed, changes,
        )  # fmt: skip
        for master in masters:
            if step:
                master.set(self._states[step % 2])
        return masters

    def _calculating(
        self, layer: int, masters: Sequence[Master], looks: Shares | None = None
    ) -> contextlib.AbstractContextManager[None]:
        block = self._blocks.get(layer)
        if block is None:
            return contextlib.nullcontext()
        return calculating(block, masters, self._start, self._skeleton.dtype, looks)

    # -- what is found

    def _is_look(self, step: int) -> bool:
        return step % self._check_every == 0 or step == self.steps

    def _ends(self, step: int, notes: list[str], is_new: bool = False) -> bool:
        """Take in what was found before a step; whether it is over. Of a new one the best state is written."""
        course = self._course
        if self._is_look(step):
            shares = dict(zip(self._blocks, course[_SHARES][step].tolist(), strict=True))
            if fault := self._shares.take(shares):
                notes.append(fault)
                return True
            sums = course[_SUMS][step]
            if self._watch.look(step, by_domain(self._held_back, sums), sums) and step:
                self._shares.keep()
                self._improved += 1
                if is_new:
                    for name, tensor in self._bests[self._improved % 2].items():
                        tensor.copy_(self._states[step % 2][name])
        if not math.isfinite(float(course[_LOSS][step])):
            notes.append(f"the loss became NaN at step {step + 1}; what was best before is kept")
            return True
        return self._watch.is_over


def _kept_shapes(trained: Sequence[Trained], like: Mapping[str, Tensor], rank: int, kinds: Sequence[str]) -> Shapes:
    """Names, shapes and dtypes of what is kept of what is trained."""
    return {
        kept_name(one, number, kind): (shape, torch.float32)
        for one in trained
        for number, shape in enumerate(leaf_shapes(one, like[one.name].shape, rank))
        for kind in kinds
    }
