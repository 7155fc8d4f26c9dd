# SPDX-License-Identifier: Apache-2.0
"""A layer of a pruned model that calculates with what is trained of it; the loss and its gradients."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.structure import structure_of
from ..architectures.table import architecture_of
from ..calibration.samples import CalibrationSet
from ..compat import text_config
from ..errors import RequestError
from ..models.batches import Batch
from ..models.blocks import MoEBlock
from ..models.precision import NARROW
from .masters import BYTES, RANK, Master, leaf_shapes
from .shares import Shares
from .steps import FEWEST_HELD_BACK
from .teacher import Targets, TeacherOutputs, predicted_rows
from .trained import EXPERTS, NORMS, ROUTER, Trained, raw, swapped

_OF_MEMORY = 0.8  # of what is free, that training may take
_SLICE_BYTES = 64 * 2**20  # of logits in float32, of which the loss is calculated at once
_WHY = {
    EXPERTS: "what its experts give is not linear in any matrix of theirs",
    ROUTER: "there is no router",
    NORMS: "no norm stands before its MoE blocks",
}


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
        samples = "sample is" if len(held_back) == 1 else "samples are"
        notes.append(
            f"only {len(held_back)} {samples} held back to judge by; {FEWEST_HELD_BACK} or more (five times as many "
            "in all) say more surely what is better"
        )
    return notes


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
        shapes = [shape for t in trained for shape in leaf_shapes(t, like(t).shape, rank)]
        return sum(map(math.prod, shapes)) * BYTES + sum(like(t).nbytes for t in trained)

    if asked is None:
        asked = 0 if memory(0) <= _OF_MEMORY * free else RANK
    return asked, memory(asked)


def layers_path(model: Any) -> str:
    """Path from a model to its decoder layers."""
    return structure_of(model, architecture_of(model.config)).layers


def masters_of(
    trained: Sequence[Trained],
    start: Callable[[Trained], Tensor],
    rate: Callable[[str], float],
    rank: int,
    seed: int,
    changes: bool = True,
    stored: torch.dtype | None = None,
) -> list[Master]:
    """Float32 copies of what is trained.

    Args:
        trained: What it is.
        start: Gives each as it is in the model.
        rate: Gives the largest relative change of a step, by role.
        rank: Of the changes of down projections.
        seed: Of what these start with.
        changes: Whether they will be changed, and not only calculated with.
        stored: The dtype that they will be stored in, where that is another than they have in the model.
    """
    found = []
    for one in trained:
        own = int.from_bytes(hashlib.sha256(f"{seed} {one.name}".encode()).digest()[:6], "big")
        found.append(Master(one, start(one), rate(one.role), rank, own, changes, stored))
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
        found = {block.structure.logits_from: router.to(wide(router.dtype))} | {
            m.trained.name.removeprefix(below): m.rounded().to(wide(m.dtype)) for m in masters
        }
        # Who watches a router knows its matrix by what it is, so that it has to be there as it is multiplied. And
        # where experts are run alone, their tensors are put back as parameters.
        values = {path: nn.Parameter(value, requires_grad=False) for path, value in found.items()}
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


def notes_of_unreached(what: Sequence[str], reached: Collection[str]) -> list[str]:
    """What has to be said where gradients reached only some of the roles that are trained."""
    return [
        f"{role!r} stayed as they were: no gradient reaches them through the model's own code (torch.no_grad)"
        for role in what
        if role not in reached
    ]


def loss_and_gradient(logits: Tensor, targets: Targets, total: int) -> tuple[float, Tensor]:
    """The divergence of some tokens, as their part of the mean of all, and its gradient for the logits.

    Args:
        logits: Of the tokens ``(N, V)``.
        targets: What the original predicts for them.
        total: All tokens of the step.
    """
    loss = torch.zeros((), dtype=torch.float64, device=logits.device)
    gradient = torch.empty_like(logits)
    rows = max(1, _SLICE_BYTES // (4 * logits.shape[1]))
    for part, own in targets.to(logits.device).slices(rows):
        leaf = logits[part].detach().requires_grad_()
        with torch.enable_grad():
            found = own.kl(leaf).sum() / total
        (gradient[part],) = torch.autograd.grad(found, leaf)
        loss += found.detach()
    return float(loss), gradient


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


def numbers_of(trained: Sequence[Trained], like: Callable[[Trained], Tensor], rank: int) -> dict[str, int]:
    """How many numbers are trained, by role."""
    found: dict[str, int] = {}
    for one in trained:
        count = sum(map(math.prod, leaf_shapes(one, like(one).shape, rank)))
        found[one.role] = found.get(one.role, 0) + count
    return found
