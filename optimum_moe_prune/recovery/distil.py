# SPDX-License-Identifier: Apache-2.0
"""Distillation of a pruned model in memory: some of its weights are changed until it predicts what the original did.

The loss is the mean over tokens of ``KL(original || pruned)``. Float32 copies are trained; the model calculates with
them in its own precision, or in float32 where the processor multiplies that far faster. What is measured and returned
is rounded to the parameters' own dtype. The model itself is never changed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration.samples import CalibrationSet
from ..compat import text_config
from ..evaluation.divergence import batch_size_for
from ..models.batches import Batch
from ..models.blocks import MoEBlock, decoder_layers, moe_blocks
from ..models.checks import evaluating, input_device, usable_model
from ..models.memory import available_memory
from ..models.precision import NARROW
from ..models.widened import precision_of, widened
from ..names import AUTO
from ..progress import working
from .masters import Master
from .shares import Shares
from .steps import Distilled, DistilOptions, Watch, by_domain, predicted, step_batches
from .student import (
    add_divergences,
    calculating,
    change,
    check_gradients,
    check_vocabularies,
    layers_path,
    loss_and_gradient,
    masters_of,
    notes_before,
    notes_of_unreached,
    rank_and_memory,
)
from .teacher import TeacherOutputs, logits_of, predicted_rows
from .trained import ROLES, Trained, check_roles, raw, trained_of

_TOKENS = 8  # of a text, by which it is found what there is to train
_ACTIVATION_BYTES = 2**30  # kept for gradients at most; beyond it layers are run once more instead
_KEPT_BYTES = 160  # for gradients, of a layer and token, for each of the hidden size


def distil(
    model: Any,
    fit: CalibrationSet,
    held_back: CalibrationSet,
    teacher: TeacherOutputs,
    what: Sequence[str] = ROLES,
    options: DistilOptions = DistilOptions(),
    *,
    dtype: str = AUTO,
    stored: torch.dtype | None = None,
) -> Distilled:
    """Train some of a pruned model's weights to predict what the original did. The model is not changed.

    Args:
        model: The pruned model, in memory, on any device.
        fit: The samples it is trained on.
        held_back: The samples that decide which of its states is kept, and when it is over.
        teacher: What the original predicts for both.
        what: What is trained: ``"experts"`` (their down projections), ``"router"`` (its rows), ``"norms"`` (those
            before the MoE blocks).
        options: How.
        dtype: The precision to calculate in, as in ``Compute``.
        stored: The dtype that changed parameters will be stored in, and are rounded to; by default the one that each
            has in the model, which may be wider than its checkpoint's.

    Raises:
        RequestError: If the model or the samples cannot be used, or nothing can be trained.
        RunError: If the unchanged model predicts NaN.
    """
    model = usable_model(model)
    what = check_roles(what)
    computing = precision_of(model, dtype)
    check_vocabularies(model, teacher)
    with evaluating(model), _without_gradients(model), contextlib.ExitStack() as stack:
        for mode in (torch.inference_mode(False), torch.enable_grad()):  # whatever mode the caller is in
            stack.enter_context(mode)
        trained = _found(model, fit, what)
        notes = notes_before(trained, what, held_back)
        free = available_memory(str(input_device(model)))
        rank, memory = rank_and_memory(trained, lambda t: raw(model, t.name), options.rank, free)
        stack.enter_context(widened(model, computing, in_pieces=False))
        options = options.in_memory(fit, held_back)
        saves = _activations(model, fit, options, computing) > _ACTIVATION_BYTES
        masters = masters_of(trained, lambda t: raw(model, t.name), options.rate, rank, options.seed, stored=stored)
        student = _Student(model, masters, computing, saves)
        stack.enter_context(student.in_place())
        return _train(student, fit, held_back, teacher, options, rank, memory, notes)


def check_trainable(model: Any, fit: CalibrationSet, what: Sequence[str]) -> None:
    """Raise unless there is something to train of a model, pruned or not yet.

    Args:
        model: In memory.
        fit: Samples that it can run on.
        what: As for :func:`distil`.

    Raises:
        RequestError: If there is nothing.
    """
    with evaluating(model), _without_gradients(model):
        notes_before(_found(model, fit, what), what, fit)


def _found(model: Any, fit: CalibrationSet, what: Sequence[str]) -> list[Trained]:
    """What is trained of a model in memory."""
    few = fit.token_ids[0][:_TOKENS]
    batch = Batch(few[None], torch.ones_like(few)[None], torch.zeros(1, dtype=torch.int64))

    def run() -> None:
        with torch.no_grad():
            logits_of(model, batch)

    return trained_of(model, moe_blocks(model), what, run)


class _Student:
    """A pruned model that calculates with float32 copies of what is trained.

    Args:
        model: The model.
        masters: The copies.
        computing: The precision that is calculated in.
        saves: Whether layers are run once more for their gradients, which keeps less in memory.
    """

    def __init__(self, model: Any, masters: Sequence[Master], computing: torch.dtype, saves: bool) -> None:
        self.model = model
        self.blocks = moe_blocks(model)
        self._computing = computing
        self._start = layers_path(model)
        self.masters = masters
        self._looks: Shares | None = None
        self._saves = saves

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the layers calculate with the copies inside a ``with``."""
        layers = decoder_layers(self.model)
        before = {block.layer: layers[block.layer].__dict__.get("forward") for block in self.blocks}
        try:
            for block in self.blocks:
                masters = [master for master in self.masters if master.trained.layer == block.layer]
                layers[block.layer].forward = self._with_copies(block, masters)
            yield
        finally:
            for index, forward in before.items():
                if forward is None:
                    layers[index].__dict__.pop("forward", None)
                else:
                    layers[index].forward = forward

    def _with_copies(self, block: MoEBlock, masters: Sequence[Master]) -> Callable[..., Any]:
        real = block.decoder_layer.forward

        @functools.wraps(real)
        def forward(*args: Any, **kwargs: Any) -> Any:
            def run(*args: Any) -> Any:
                with calculating(block, masters, self._start, self._computing, self._looks):
                    return real(*args, **kwargs)

            if self._saves and torch.is_grad_enabled():
                return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
            return run(*args)

        return forward

    @contextlib.contextmanager
    def looking(self, shares: Shares) -> Iterator[None]:
        """Calculate with what the model would have in the end, and count its routing, inside a ``with``."""
        self._looks = shares
        try:
            with torch.no_grad():
                yield
        finally:
            self._looks = None

    def tensors(self) -> dict[str, Tensor]:
        """What the model would have in the end, on the processor."""
        return {master.trained.name: master.rounded().cpu() for master in self.masters}

    def numbers(self) -> dict[str, int]:
        """How many numbers are trained, by role."""
        found: dict[str, int] = {}
        for master in self.masters:
            found[master.trained.role] = found.get(master.trained.role, 0) + sum(t.numel() for t in master.leaves)
        return found

    def step(
        self, batches: Sequence[Batch], fit: CalibrationSet, teacher: TeacherOutputs, number: int, pace: float
    ) -> bool:
        """One step: the copies are changed by the mean gradient of all tokens.

        Returns:
            Whether the loss was a number; else nothing is changed.
        """
        total, loss = sum(map(predicted, batches)), 0.0
        for batch in batches:
            rows = predicted_rows(batch, logits_of(self.model, batch))
            check_gradients(rows)
            found, gradient = loss_and_gradient(rows, teacher.of(fit, batch), total)
            loss += found
            rows.backward(gradient)
        change(self.masters, number, pace if math.isfinite(loss) else None)
        return math.isfinite(loss)


def _activations(model: Any, fit: CalibrationSet, options: DistilOptions, computing: torch.dtype) -> int:
    """Bytes that a step would keep for its gradients if layers were not run once more for them, roughly."""
    assert options.tokens is not None
    tokens = max(options.tokens, *(sample.num_tokens for sample in fit.samples))
    kept = _KEPT_BYTES * text_config(model.config).hidden_size * len(decoder_layers(model)) * tokens
    narrow = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype in NARROW)
    return kept + (0 if computing in NARROW else computing.itemsize * narrow)  # wider copies of the weights as well


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter of the model itself wants gradients inside a ``with``."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _train(
    student: _Student,
    fit: CalibrationSet,
    held_back: CalibrationSet,
    teacher: TeacherOutputs,
    options: DistilOptions,
    rank: int,
    memory: int,
    notes: list[str],
) -> Distilled:
    steps, check_every = options.steps, options.check_every
    assert steps is not None and check_every is not None
    judged = list(held_back.batches(batch_size_for(teacher.vocab_size, held_back, options.batch_size)))
    course = step_batches(fit, options)
    watch, shares = Watch(options.patience), Shares()
    best: dict[str, Tensor] = {}
    done = 0

    def look() -> bool:
        """Measure the model as it is now; whether to go on."""
        sums = torch.zeros(len(held_back), dtype=torch.float64)
        with student.looking(shares):
            for batch in judged:
                shares.of(batch)
                add_divergences(sums, batch, teacher.of(held_back, batch), logits_of(student.model, batch))
        fault = shares.take(shares.end())
        if fault is not None:
            notes.append(fault)
        elif watch.look(done, by_domain(held_back, sums), sums) and done:
            best.update(student.tensors())
            shares.keep()
        return fault is None and not watch.is_over

    with working("distilling", steps, "step", "distilled") as work:
        goes_on = look()
        while goes_on and done < steps:
            if not student.step(next(course), fit, teacher, done, options.pace(done, steps)):
                notes.append(f"the loss became NaN at step {done + 1}; what was best before is kept")
                break
            done += 1
            work.update()
            if done % check_every == 0 or done == steps:
                goes_on = look()
    if done:
        reached = {master.trained.role for master in student.masters if master.is_reached}
        notes += notes_of_unreached(list(student.numbers()), reached)
    return Distilled.of(watch, best, done, shares.changes, rank, student.numbers(), memory, notes)
