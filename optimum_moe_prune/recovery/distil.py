# SPDX-License-Identifier: Apache-2.0
"""Distillation of a pruned model in memory: some of its weights are changed until it predicts what the original did.

The loss is the mean over tokens of ``KL(original || pruned)``. Float32 copies are trained; the model calculates with
them in its own precision, or in float32 where the processor multiplies that far faster. What is measured and returned
is rounded to the parameters' own dtype. The model itself is never changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..architectures.structure import structure_of
from ..architectures.table import architecture_of
from ..calibration.samples import CalibrationSet
from ..compat import text_config
from ..errors import RequestError
from ..evaluation.divergence import batch_size_for
from ..models.batches import Batch
from ..models.blocks import MoEBlock, decoder_layers, moe_blocks
from ..models.checks import evaluating, input_device, usable_model
from ..models.memory import available_memory
from ..models.precision import NARROW
from ..models.widened import precision_of, widened
from ..names import AUTO
from ..planning.sensitivity import ALL
from ..progress import working
from .masters import BYTES, RANK, Master, master_numbers
from .shares import Shares
from .steps import FEWEST_HELD_BACK, KL, DistilOptions, Watch, by_domain, predicted, step_batches
from .teacher import Targets, TeacherOutputs, logits_of, predicted_rows
from .trained import EXPERTS, NORMS, ROLES, ROUTER, Trained, check_roles, raw, swapped, trained_of

_OF_MEMORY = 0.8  # of what is free, that training may take
_TOKENS = 8  # of a text, by which it is found what there is to train
_SLICE_BYTES = 64 * 2**20  # of logits in float32, of which the loss is calculated at once
_ACTIVATION_BYTES = 2**30  # kept for gradients at most; beyond it layers are run once more instead
_KEPT_BYTES = 160  # for gradients, of a layer and token, for each of the hidden size
_WHY = {
    EXPERTS: "what its experts give is not linear in any matrix of theirs",
    ROUTER: "there is no router",
    NORMS: "no norm stands before its MoE blocks",
}


@dataclass(frozen=True)
class Distilled:
    """What a distillation found.

    Attributes:
        tensors: The changed parameters by their name in the pruned model, in their own dtype, on the processor; none
            where nothing was better than the unchanged model.
        kl_before: Nats per predicted token of the held-back text, by domain and ``"all"``, of the unchanged model.
        kl_after: With ``tensors``.
        steps: Steps that were done.
        best: The number of steps after which ``tensors`` were so.
        looks: ``(steps, nats)`` of each look at the held-back text.
        shares: By layer the largest share of the routing weight that one expert has, before and after.
        rank: Of the changes of down projections; 0 for any.
        numbers: How many numbers were trained, by role.
        memory: Bytes that training was expected to take beside the model.
        notes: What a person must know, as sentences.
    """

    tensors: Mapping[str, Tensor]
    kl_before: KL
    kl_after: KL
    steps: int
    best: int
    looks: tuple[tuple[int, float], ...]
    shares: Mapping[int, tuple[float, float]]
    rank: int
    numbers: Mapping[str, int]
    memory: int
    notes: tuple[str, ...] = field(default=())

    @property
    def is_better(self) -> bool:
        """Whether there is anything to take over."""
        return bool(self.tensors)


def distil(
    model: Any,
    fit: CalibrationSet,
    held_back: CalibrationSet,
    teacher: TeacherOutputs,
    what: Sequence[str] = ROLES,
    options: DistilOptions = DistilOptions(),
    *,
    dtype: str = AUTO,
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

    Raises:
        RequestError: If the model or the samples cannot be used, or nothing can be trained.
        RunError: If the unchanged model predicts NaN.
    """
    model = usable_model(model)
    what = check_roles(what)
    computing = precision_of(model, dtype)
    check_vocabularies(model, teacher)
    with evaluating(model), _without_gradients(model), contextlib.ExitStack() as stack:
        trained = _found(model, fit, what)
        notes = notes_before(trained, what, held_back)
        rank, memory = rank_and_memory(trained, lambda t: raw(model, t.name), options.rank, free_memory(model))
        stack.enter_context(widened(model, computing, in_pieces=False))
        student = _Student(model, trained, options, rank, computing)
        stack.enter_context(student.in_place())
        return _train(student, fit, held_back, teacher, options, rank, memory, notes)


def _found(model: Any, fit: CalibrationSet, what: Sequence[str]) -> list[Trained]:
    """What is trained of a model in memory."""
    few = fit.token_ids[0][:_TOKENS]
    batch = Batch(few[None], torch.ones_like(few)[None], torch.zeros(1, dtype=torch.int64))

    def run() -> None:
        with torch.no_grad():
            logits_of(model, batch)

    return trained_of(model, moe_blocks(model), what, run)


def check_vocabularies(model: Any, teacher: TeacherOutputs) -> None:
    """Raise unless a model predicts what its teacher did.

    Raises:
        RequestError: With both numbers.
    """
    size = text_config(model.config).vocab_size
    if size != teacher.vocab_size:
        raise RequestError(f"the model has {size} output tokens and the original {teacher.vocab_size}.")


def notes_before(trained: Sequence[Trained], what: Sequence[str], held_back: CalibrationSet) -> list[str]:
    """What can be said before anything is trained.

    Raises:
        RequestError: If there is nothing to train.
    """
    missing = [role for role in what if not any(t.role == role for t in trained)]
    if not trained:
        raise RequestError(f"this model has nothing to train of recover_what: {', '.join(what)}.")
    notes = [f"nothing of {role!r} is trained: {_WHY[role]}" for role in missing]
    if len(held_back) < FEWEST_HELD_BACK:
        notes.append(
            f"only {len(held_back)} samples are held back to judge by; {FEWEST_HELD_BACK} or more (five times as many "
            "in all) say more surely what is better"
        )
    return notes


def free_memory(model: Any) -> int:
    """Bytes that are free where a model is."""
    return available_memory(str(input_device(model)))


def rank_and_memory(
    trained: Sequence[Trained], like: Callable[[Trained], Tensor], asked: int | None, free: int
) -> tuple[int, int]:
    """The rank of the changes of down projections (0 for any), and the bytes that training takes.

    Args:
        trained: What is trained.
        like: Gives each parameter, or one of its shape and dtype.
        asked: The rank that was asked for; None leaves it to what is free.
        free: Bytes.
    """

    def memory(rank: int) -> int:
        return sum(master_numbers(t, like(t).shape, rank) * BYTES + like(t).nbytes for t in trained)

    if asked is None:
        asked = 0 if memory(0) <= _OF_MEMORY * free else RANK
    return asked, memory(asked)


class _Student:
    """A pruned model that calculates with float32 copies of what is trained.

    Args:
        model: The model.
        trained: What is trained.
        options: How.
        rank: Of the changes of down projections.
        computing: The precision that is calculated in.
    """

    def __init__(
        self, model: Any, trained: Sequence[Trained], options: DistilOptions, rank: int, computing: torch.dtype
    ) -> None:
        self.model = model
        self.blocks = moe_blocks(model)
        self._computing = computing
        self._start = layers_path(model)
        self.masters = masters_of(trained, lambda t: raw(model, t.name), options, rank)
        self._looks: Shares | None = None
        self._saves = _activations(model, options) > _ACTIVATION_BYTES

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


def layers_path(model: Any) -> str:
    """Path from a model to its decoder layers."""
    return structure_of(model, architecture_of(model.config)).layers


def masters_of(
    trained: Sequence[Trained], start: Callable[[Trained], Tensor], options: DistilOptions, rank: int
) -> list[Master]:
    """Float32 copies of what is trained.

    Args:
        trained: What it is.
        start: Gives each as it is in the model.
        options: How it is trained.
        rank: Of the changes of down projections.
    """
    found = []
    for one in trained:
        seed = int.from_bytes(hashlib.sha256(f"{options.seed} {one.name}".encode()).digest()[:6], "big")
        found.append(Master(one, start(one), options.rates[one.role], rank, seed))
    return found


@contextlib.contextmanager
def calculating(
    block: MoEBlock, masters: Sequence[Master], start: str, computing: torch.dtype, looks: Shares | None = None
) -> Iterator[None]:
    """Have a decoder layer calculate with copies of what is trained of it, inside a ``with``.

    Args:
        block: Its block.
        masters: The copies.
        start: Path from the model to its layers.
        computing: The precision to calculate in, where it is wider than a parameter's.
        looks: Where the routing is counted; the copies are rounded then, as they would be in the end.
    """

    def wide(dtype: torch.dtype) -> torch.dtype:
        return computing if dtype in NARROW and computing not in NARROW else dtype

    layer, below = block.decoder_layer, f"{start}.{block.layer}."
    values: dict[str, Tensor] = {}
    if looks is None:
        values = {m.trained.name.removeprefix(below): m.value().to(wide(m.dtype)) for m in masters}
    else:
        router = raw(layer, block.structure.logits_from).detach()
        values = {block.structure.logits_from: router} | {
            m.trained.name.removeprefix(below): m.rounded() for m in masters
        }
        # Who watches a router knows its matrix by what it is, so that it has to be there as it is multiplied. And
        # where experts are run alone, their tensors are put back as parameters.
        values = {p: nn.Parameter(v.to(wide(v.dtype)), requires_grad=False) for p, v in values.items()}
    with swapped(layer, values), contextlib.nullcontext() if looks is None else looks.counting(block):
        yield


def check_gradients(logits: Tensor) -> None:
    """Raise unless gradients flow from a model's logits.

    Raises:
        RequestError: Saying so.
    """
    if not logits.requires_grad:
        raise RequestError(
            "no gradient flows from what this model predicts to what is to be trained: its own code forbids it "
            "(torch.no_grad). Recover it by refit, which needs none."
        )


def loss_and_gradient(logits: Tensor, targets: Targets, total: int) -> tuple[float, Tensor]:
    """The divergence of some tokens, as their part of the mean of all, and its gradient for the logits.

    Args:
        logits: Of the tokens ``(N, V)``.
        targets: What the original predicts for them.
        total: All tokens of the step.
    """
    leaf = logits.detach().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    rows = max(1, _SLICE_BYTES // (4 * logits.shape[1]))
    for part, own in targets.to(logits.device).slices(rows):
        found = own.kl(leaf[part]).sum() / total
        found.backward()
        loss += found.detach()
    assert leaf.grad is not None
    return float(loss), leaf.grad


def add_divergences(sums: Tensor, batch: Batch, targets: Targets, logits: Tensor) -> None:
    """Add the divergences of a batch's predicted tokens to the sums of their samples ``(S,)`` float64.

    Args:
        sums: By sample.
        batch: The batch.
        targets: What the original predicts for its tokens.
        logits: What the model does ``(B, L, V)``.
    """
    rows = predicted_rows(batch, logits)
    size = max(1, _SLICE_BYTES // (4 * rows.shape[1]))
    parts = [own.kl(rows[part]).double() for part, own in targets.to(rows.device).slices(size)]
    counts = batch.attention_mask[:, 1:].sum(1)
    sums.index_add_(0, batch.samples.repeat_interleave(counts), torch.cat(parts).cpu())


def change(masters: Sequence[Master], number: int, pace: float | None) -> None:
    """Change copies by the gradients that have gathered; with no pace these are dropped."""
    for master in masters:
        if pace is not None:
            master.step(number, pace)
        else:
            master.drop()


def _activations(model: Any, options: DistilOptions) -> int:
    """Bytes that a step would keep for its gradients if layers were not run once more for them, roughly."""
    config = text_config(model.config)
    each = _KEPT_BYTES * config.hidden_size * len(decoder_layers(model)) * options.tokens
    narrow = sum(p.numel() for p in model.parameters() if p.dtype in NARROW)
    return each + (4 * narrow if precision_of(model) not in NARROW else 0)


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
    steps = options.steps_for(fit)
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
        shares.end()
        fault = shares.fault()
        if fault is not None:
            notes.append(fault)
        elif watch.look(done, by_domain(held_back, sums)) and done:
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
            if done % options.check_every == 0 or done == steps:
                goes_on = look()
    return Distilled(
        best,
        watch.before,
        watch.after,
        done,
        watch.best,
        tuple((step, found[ALL]) for step, found in watch.looks),
        shares.changes,
        rank,
        numbers_of(student.masters),
        memory,
        tuple(notes),
    )


def numbers_of(masters: Sequence[Master]) -> dict[str, int]:
    """How many numbers are trained, by role."""
    found: dict[str, int] = {}
    for master in masters:
        found[master.trained.role] = found.get(master.trained.role, 0) + sum(leaf.numel() for leaf in master.leaves)
    return found
