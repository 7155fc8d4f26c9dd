# SPDX-License-Identifier: Apache-2.0
"""How far pruned models are from the original in their final output, measured for many plans in one pass.

Two plans that prune the lower layers alike have the same hidden states there. The plans form a tree with a branch
where they part, and a layer is run once for each branch: a plan that changes one layer costs that layer and those
above it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..calibration.shares import numbers_of
from ..compat import text_config
from ..models.batches import Batch
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of, rows_of, sent
from ..processes import ALONE, Processes
from ..processes.folders import own_workspace
from ..progress import Work, progress, working
from ..storage.growing import Store
from ..storage.tensor_files import Shapes, shapes_bytes
from ..storage.values import Values
from ..storage.workspace import Workspace

Retained = Mapping[int, tuple[int, ...]]

LOGIT_BYTES = 256 * 2**20  # logits of a batch, in float32; a batch is made smaller to keep to it
_SLICE_BYTES = 16 * 2**20  # of a batch's log-probabilities, of which the divergence is calculated at once
_STATE_BYTES = 512 * 2**20  # hidden states of all branches of a batch; more plans are measured in several passes
_DISK_BYTES = 32 * 10**9  # hidden states of all branches of all batches, for a checkpoint that is read from disk
_RESULT = "divergence.safetensors"

Sums = Mapping[str, Tensor]
"""What is summed over the predicted tokens of each sample, for each plan: ``(P, S)`` float64."""
KL, LOSS, AGREEMENT = "kl", "loss", "agreement"


def kl_per_token(reference: Tensor, other: Tensor) -> Tensor:
    """``KL(reference || other)`` in nats of log-probabilities ``(T, V)``: ``(T,)`` float64."""
    rows = max(1, _SLICE_BYTES // (4 * reference.shape[1]))
    pairs = zip(reference.split(rows), other.split(rows), strict=True)
    return torch.cat([(r.exp() * (r - m)).sum(1).double() for r, m in pairs])


def batch_size_for(vocab_size: int, calibration: CalibrationSet, batch_size: int) -> int:
    """Samples in a forward pass, so that logits over a vocabulary of ``vocab_size`` stay within bounds."""
    longest = max(sample.num_tokens for sample in calibration.samples)
    return min(batch_size, max(1, LOGIT_BYTES // (4 * longest * vocab_size)))


def divergences(
    runner: LayerByLayer,
    calibration: CalibrationSet,
    plans: Sequence[Retained],
    *,
    batch_size: int = 8,
    work: Values | None = None,
    settings: Values | None = None,
    workspace: Workspace = Workspace(),
    processes: Processes = ALONE,
) -> Tensor:
    """``KL(original || pruned)`` of the next-token distributions, summed over the predicted tokens of each sample.

    Arguments and errors are those of :func:`outcomes`.

    Returns:
        ``(P, S)`` float64, in nats.
    """
    return outcomes(
        runner, calibration, plans, (KL,), batch_size=batch_size, work=work, settings=settings, workspace=workspace,
        processes=processes,
    )[KL]  # fmt: skip


def outcomes(
    runner: LayerByLayer,
    calibration: CalibrationSet,
    plans: Sequence[Retained],
    figures: Sequence[str] = (KL, LOSS, AGREEMENT),
    *,
    batch_size: int = 8,
    work: Values | None = None,
    settings: Values | None = None,
    workspace: Workspace = Workspace(),
    processes: Processes = ALONE,
) -> Sums:
    """What pruned models do with samples, for many plans in one pass; a model is pruned by masking, and none copied.

    A model in memory is measured batch by batch. One on disk is read layer by layer, with the hidden states of all
    batches and branches in files; once, unless these would take more than 32 GB.

    Args:
        runner: The unpruned model.
        calibration: The samples to measure on.
        plans: For each plan the retained experts by layer; a layer that is not named keeps all.
        figures: ``"kl"``, the divergence from the original, ``"loss"``, the negative log-likelihood, both in nats, and
            ``"agreement"``, the tokens for which the original finds the same next token most likely.
        batch_size: Samples in a forward pass, at most; fewer where the vocabulary is large.
        work: What else decides about the numbers, as nested plain values: a later call for something else is refused.
        settings: What of that follows from, as ``Store`` takes it.
        workspace: Where finished batches (on disk: layers) are kept; a later call for the same continues.
        processes: Those that share the batches; all have the whole result.

    Returns:
        Each figure, summed over the predicted tokens of each sample.

    Raises:
        RunError: If a weight is NaN or infinite, or the disk is full.
    """
    vocab_size = text_config(runner.model.config).vocab_size
    calibration.check_vocabulary(vocab_size)
    every = list(calibration.batches(batch_size_for(vocab_size, calibration, batch_size)))
    batches = [every[number] for number in processes.share(len(every))]
    own = own_workspace(processes, workspace, "measurement")
    shapes: Shapes = {name: ((len(plans), len(calibration)), torch.float64) for name in figures}
    sums: Sums = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    passes = _passes(runner, batches, plans) if runner.streams and batches else [list(range(len(plans)))]
    written = [[[layer, list(experts)] for layer, experts in sorted(plan.items())] for plan in plans]
    identity = {
        **(work or {}),
        "samples": calibration.fingerprint,
        "batches": [list(batch.input_ids.shape) for batch in batches],
        "passes": len(passes),
        "plans": f"{len(plans)} with hash {hashlib.sha256(json.dumps(written).encode()).hexdigest()[:12]}",
        **({} if processes.is_alone else {"processes": processes.count}),
    }
    store = Store(own.folder if batches else None, identity, own.restart, "measurement", settings, processes.look)
    try:
        steps = runner.num_layers + 1

        def finished_in(tensors: Mapping[str, Tensor], step: int) -> Iterator[Tensor]:
            """What a batch gave, or the last step of a pass."""
            for name in figures:
                if not runner.streams:
                    yield tensors[name][:, batches[step].samples]
                elif (step + 1) % steps == 0:
                    yield tensors[name][list(passes[step // steps])]

        if batches:
            sums = store.tensors(_RESULT, shapes, keep=store.finished > 0, part=finished_in)
        if runner.streams and batches:
            _measure_on_disk(runner, batches, plans, passes, store, sums)
        elif batches:
            _measure_in_memory(runner, batches, plans, store, sums)
        whole, rows = torch.stack([sums[name] for name in figures]), numbers_of(batches)
        for numbers, found in processes.meet((rows, whole[..., rows])):  # the whole of a sample is in one batch
            whole[..., numbers] = found
        return dict(zip(figures, whole.clamp_(min=0), strict=True))  # rounding can leave less than nothing
    finally:
        store.close()


# ------------------------------------------------------------------------------------------- the tree


@dataclass(frozen=True)
class _Branch:
    """One calculation of one layer.

    Attributes:
        parent: Which branch of the layer below it goes on from.
        retained: The experts of the layer, or None for all.
    """

    parent: int
    retained: tuple[int, ...] | None


def _tree(plans: Sequence[Retained], runner: LayerByLayer) -> tuple[list[list[_Branch]], list[int]]:
    """The branches of each layer, the original model's first, and the last branch of each plan."""
    num_experts = {block.layer: block.num_experts for block in runner.blocks}
    layers, last = [], [0] * len(plans)
    for layer in range(runner.num_layers):
        branches = {_Branch(0, None): 0}
        for number, plan in enumerate(plans):
            retained = plan.get(layer)
            if retained is not None and len(retained) == num_experts[layer]:
                retained = None
            last[number] = branches.setdefault(_Branch(last[number], retained), len(branches))
        layers.append(list(branches))
    return layers, last


def _grown(
    runner: LayerByLayer,
    layer: int,
    batch: Batch,
    states: Iterator[Tensor],
    branches: Sequence[_Branch],
) -> Iterator[Tensor]:
    """The hidden states of a batch after a loaded layer, of one branch after another.

    Args:
        runner: The model.
        layer: The layer.
        batch: The batch.
        states: The hidden states that each branch goes on from.
        branches: Of the layer.
    """
    block = next((block for block in runner.blocks if block.layer == layer), None)
    for branch in branches:
        with contextlib.ExitStack() as pruned:
            if branch.retained is not None:
                assert block is not None
                pruned.enter_context(block.restricted(branch.retained))
            grown = runner.forward(layer, batch, next(states))
        yield grown


def _before(states: Sequence[Tensor], branches: Sequence[_Branch]) -> Iterator[Tensor]:
    """The hidden states that branches go on from, of those in memory."""
    return (states[branch.parent].clone() for branch in branches)


def _add(
    runner: LayerByLayer, batch: Batch, states: Sequence[Tensor] | Tensor, last: Sequence[int], sums: Sums
) -> None:
    """Add what a batch gives, whose hidden states after the last layer are given."""
    mask = batch.attention_mask[:, 1:].bool()
    sample = batch.samples[:, None].expand(mask.shape)[mask]
    targets = batch.input_ids[:, 1:][mask][:, None]

    def log_p(hidden: Tensor) -> Tensor:
        logits = runner.logits(batch, hidden.clone())
        return torch.log_softmax(rows_of(logits[:, :-1], mask).float(), dim=-1)

    original = log_p(states[0])
    branches = [branch for branch in sorted(set(last)) if branch or set(sums) != {KL}]  # nothing pruned, nothing lost
    if not branches:
        return
    made = []
    for branch in branches:
        pruned = original if branch == 0 else log_p(states[branch])
        figures = _figures(original, pruned, sent(targets, pruned.device), tuple(sums))
        made.append(torch.stack(list(figures.values())))
    for branch, figures_of_tokens in zip(branches, torch.stack(made).cpu(), strict=True):  # waited for once
        for name, values in zip(sums, figures_of_tokens, strict=True):
            total = torch.zeros(sums[name].shape[1], dtype=torch.float64).index_add_(0, sample, values)
            for number, own in enumerate(last):
                if own == branch:
                    sums[name][number] += total


def _figures(original: Tensor, pruned: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What is asked for of log-probabilities ``(T, V)``: ``(T,)`` float64 each."""
    made: dict[str, Callable[[], Tensor]] = {
        KL: lambda: kl_per_token(original, pruned),
        LOSS: lambda: -pruned.gather(1, targets)[:, 0].double(),
        AGREEMENT: lambda: (original.argmax(1) == pruned.argmax(1)).double(),
    }
    return {name: made[name]() for name in names}


# ------------------------------------------------------------------------------------------- in memory


def _measure_in_memory(
    runner: LayerByLayer, batches: Sequence[Batch], plans: Sequence[Retained], store: Store, sums: Sums
) -> None:
    store.check_steps(len(batches), "batch")
    # Plans that part late share most: keep them together.
    order = sorted(range(len(plans)), key=lambda p: sorted(plans[p].items()))
    sizes = [batch.input_ids.numel() for batch in batches]
    with (
        runner.running(),
        working("measuring", len(batches), "batch", "measured", begun=store.finished, costs=sizes) as work,
    ):
        for number in range(store.finished, len(batches)):
            batch = batches[number]
            for values in sums.values():
                values[:, batch.samples] = 0  # an interrupted run may have added to them
            (embedded,) = runner.embedded([batch])
            at_once = max(1, _STATE_BYTES // (2 * embedded.nbytes) - 1)
            parts = [order[first : first + at_once] for first in range(0, len(order), at_once)]
            trees = [_tree([plans[p] for p in chosen], runner) for chosen in parts]
            sizes = [len(branches) for layers, _ in trees for branches in layers]
            with working("layers", len(sizes), "layer", costs=sizes) as inner:
                for chosen, (layers, last) in zip(parts, trees, strict=True):
                    states = [embedded]
                    for layer, branches in enumerate(layers):
                        states = list(_grown(runner, layer, batch, _before(states, branches), branches))
                        inner.update()
                    part = _empty(sums, len(chosen))
                    _add(runner, batch, states, last, part)
                    for name, values in part.items():
                        sums[name][chosen] += values
            store.commit(number + 1)
            work.update()


# ------------------------------------------------------------------------------------------- on disk


def _passes(runner: LayerByLayer, batches: Sequence[Batch], plans: Sequence[Retained]) -> list[list[int]]:
    """Plans by the pass through the files they are measured in, so that hidden states stay within bounds on disk.

    Those that part late are together; a pass reads the whole checkpoint.
    """
    hidden_size = text_config(runner.model.config).hidden_size
    state = sum(batch.input_ids.numel() for batch in batches) * hidden_size * runner.dtype.itemsize
    at_once = max(1, _DISK_BYTES // (2 * state) - 1)
    order = sorted(range(len(plans)), key=lambda p: sorted(plans[p].items()), reverse=True)
    count = -(-len(order) // at_once)
    size = max(1, -(-len(order) // max(1, count)))
    return [order[first : first + size] for first in range(0, len(order), size)]


def _measure_on_disk(
    runner: LayerByLayer,
    batches: Sequence[Batch],
    plans: Sequence[Retained],
    passes: Sequence[Sequence[int]],
    store: Store,
    sums: Sums,
) -> None:
    steps = runner.num_layers + 1
    store.check_steps(len(passes) * steps)
    trees = [_tree([plans[p] for p in chosen], runner) for chosen in passes]
    costs = [len(branches) for layers, last in trees for branches in (*layers, set(last))]
    runner.prepare()
    with (
        runner.running(),
        runner.reading_ahead() as ahead,
        working("measuring", len(costs), "step", "measured", begun=store.finished, costs=costs) as work,
    ):
        for number, chosen in enumerate(passes):
            if store.finished < (number + 1) * steps:
                _pass(runner, batches, chosen, trees[number], number * steps, store, sums, ahead, work)


def _pass(
    runner: LayerByLayer,
    batches: Sequence[Batch],
    chosen: Sequence[int],
    tree: tuple[list[list[_Branch]], list[int]],
    before: int,
    store: Store,
    sums: Sums,
    ahead: Callable[[int], None],
    work: Work,
) -> None:
    """Measure some of the plans in one pass through the files; ``before`` steps belong to earlier passes."""
    layers, last = tree
    carrier = Carrier(lane_of(runner.device))
    sizes = [batch.input_ids.numel() for batch in batches]
    shapes_of = [runner.state_shape(batch) for batch in batches]

    def states_of(layer: int, written: bool = False) -> Mapping[str, Tensor]:
        """The hidden states that go into a layer, of every batch and branch."""
        count = 1 if layer == 0 else len(layers[layer - 1])
        shapes = {f"{number}": ((count, *shape), dtype) for number, (shape, dtype) in enumerate(shapes_of)}
        return store.tensors(_states_file(layer), None if written else shapes)

    most = max(len(a) + len(b) for a, b in zip(layers, [*layers[1:], []], strict=True))
    store.check_space(most * shapes_bytes({str(number): spec for number, spec in enumerate(shapes_of)}))
    finished = store.finished - before  # of this pass
    if finished:
        states = states_of(finished, written=True)
    else:
        states = states_of(0)
        for number, embedded in enumerate(runner.embedded(batches)):
            carrier.put(embedded, states[f"{number}"][0])
        carrier.finish()
    for layer in range(finished, runner.num_layers):
        after = states_of(layer + 1)
        with runner.loaded(layer):
            ahead(layer + 1)
            every = ((states[f"{n}"], branch.parent) for n in range(len(batches)) for branch in layers[layer])
            coming = carrier.each(of_batch[parent] for of_batch, parent in every)
            for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=sizes)):
                for branch, hidden in enumerate(_grown(runner, layer, batch, coming, layers[layer])):
                    carrier.put(hidden, after[f"{number}"][branch])
            carrier.finish()
        store.commit(before + layer + 1, [_states_file(layer + 1)])
        store.remove(_states_file(layer))
        states = after
        work.update()
    part = _empty(sums, len(chosen))
    with runner.head():
        for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=sizes)):
            _add(runner, batch, states[f"{number}"], last, part)
    for name, values in part.items():
        sums[name][list(chosen)] = values
    store.commit(before + runner.num_layers + 1)
    store.remove(_states_file(runner.num_layers))
    work.update()


def _empty(sums: Sums, plans: int) -> Sums:
    """Zeros for some of the plans."""
    return {name: torch.zeros(plans, values.shape[1], dtype=torch.float64) for name, values in sums.items()}


def _states_file(layer: int) -> str:
    return f"states_{layer:05d}.safetensors"
