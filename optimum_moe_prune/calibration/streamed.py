# SPDX-License-Identifier: Apache-2.0
"""The same answer as ``collect`` with one decoder layer in memory at a time, straight from the checkpoint's files.

The model is built on the meta device. Of each decoder layer the tensors are read through transformers' own conversion
mapping, the hidden states of all calibration samples go through it, its statistics are finished, and it is dropped.
A calibration that prunes as it goes (``progressive``) goes this way with a model in memory as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..compat import text_config
from ..models.heads import Heads
from ..models.layerwise import LayerByLayer
from ..models.transfers import Carrier, lane_of
from ..names import dtype_text
from ..progress import progress, working
from ..statistics.files import layer_file
from ..statistics.needs import Need
from ..statistics.samples import MaxTokens, most_tokens
from ..statistics.stats import CalibrationStats, LayerStats
from ..storage.growing import Store
from ..storage.tensor_files import Shapes
from .current import Current
from .fisher import check_predicts, gather_fisher, with_fisher
from .in_memory import assemble, statistics_bytes
from .observer import LayerObserver, Routed, observers_of
from .outbox import Outbox
from .progressive import LayerChoice, Pruning
from .samples import CalibrationSet
from .states import States, state_shapes


def collect_streamed(
    skeleton: LayerByLayer,
    calibration: CalibrationSet,
    needs: Iterable[Need],
    *,
    batch_size: int = 8,
    max_tokens: MaxTokens = 8192,
    seed: int = 0,
    store: Store | None = None,
    read_ahead: bool = True,
    heads: Heads | None = None,
    choice: LayerChoice | None = None,
) -> CalibrationStats:
    """Gather statistics of a checkpoint's MoE layers with one decoder layer in memory.

    Args:
        skeleton: The model, its precision, and where to calculate. Of a ``Skeleton`` only the layer at work is there.
        calibration: The samples.
        needs: What to gather.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept, or ``"all"``.
        seed: Decides which tokens are kept when there are more.
        store: Where statistics and hidden states grow. With a folder, each finished layer is kept there, and a later
            call continues after the last one. By default they are in memory, or in temporary files where they are
            large.
        read_ahead: Read the next layer's bytes into the system's cache while a layer calculates.
        heads: The heads of the checkpoint, which are run and watched after the last layer, all at once.
        choice: Chooses the experts with which each layer goes on (``progressive``); by default all stay.

    Returns:
        The same statistics as :func:`in_memory.collect` of the same batches in the same precision, to the bit where
        parameters are aligned alike.

    Raises:
        RequestError: If the checkpoint does not fit its config, or is quantised in a way that is not read here, or a
            token id is outside its vocabulary.
        RunError: If a weight, a router's logits or an expert's output is NaN or infinite.
    """
    gathered = frozenset(needs)
    needs = gathered - {Need.FISHER}  # which follows in a pass of its own
    store = Store() if store is None else store
    config = skeleton.model.config
    check_predicts(skeleton.model, gathered)
    calibration.check_vocabulary(text_config(config).vocab_size)
    steps = skeleton.num_layers + (heads is not None)
    store.check_steps(steps, "layer")
    facts = skeleton.facts() if skeleton.is_at_hand else None
    current = Current(calibration, max_tokens, seed)
    batches = list(calibration.batches(batch_size))
    sizes = [batch.input_ids.numel() for batch in batches]
    blocks = {block.layer: block for block in skeleton.blocks}
    top_k = skeleton.blocks[0].rule.top_k if Need.COACTIVATION in needs else None

    def allocate(layer: int, shapes: Shapes) -> Mapping[str, Tensor]:
        return store.tensors(layer_file(layer), shapes)

    def stats_of(layers: dict[int, LayerStats]) -> CalibrationStats:
        kept = (current.token_sample, current.token_position, most_tokens(max_tokens), seed)
        return CalibrationStats(facts or {}, calibration.samples, layers, needs, *kept)

    pruning = Pruning(choice, stats_of)
    weights = torch.ones(len(calibration), dtype=torch.float64)
    layers: dict[int, LayerStats] = {}
    before: Routed | None = None
    for index, block in blocks.items():
        if index < store.finished:
            tensors = store.tensors(layer_file(index), None)
            store.release(layer_file(index))
            with skeleton.loaded(index) if block.rule.reads_router else contextlib.nullcontext():
                rule = block.routing
            layers[index] = LayerStats(block.num_experts, rule, tensors, weights, current.token_sample)
            before = Routed(block.num_experts)
            pruning.finished(index, layers[index])
    in_memory = None if skeleton.streams else skeleton.model
    of_heads = [] if heads is None else heads.blocks
    if heads is not None and store.finished == steps:
        with heads.loaded(in_memory):
            for block in of_heads:
                tensors = store.tensors(layer_file(block.layer), None)
                store.release(layer_file(block.layer))
                rule = block.routing
                layers[block.layer] = LayerStats(
                    block.num_experts, rule, tensors, weights, current.token_sample, is_head=True
                )

    skeleton.prepare()
    with skeleton.running(), skeleton.reading_ahead() as ahead, contextlib.ExitStack() as stack:
        states = States(store, state_shapes(batches, skeleton.state_shape, top_k), Carrier(lane_of(skeleton.device)))
        counts = {block.layer: block.num_experts for block in (*skeleton.blocks, *of_heads)}
        store.check_space(statistics_bytes(counts, gathered, current, config) + 2 * states.nbytes)
        if store.finished:
            states.open()
        else:
            states.begin(skeleton.embedded(batches))
        outbox = stack.enter_context(Outbox())
        doing = "calibrating" if choice is None else "calibrating and pruning"
        did = "calibrated" if choice is None else "calibrated and pruned"
        work = stack.enter_context(working(doing, steps, "layer", did, begun=store.finished))
        for index in range(store.finished, skeleton.num_layers):
            with skeleton.loaded(index):
                if read_ahead:
                    ahead(index + 1)
                observer = None
                with contextlib.ExitStack() as watching:
                    if index in blocks:
                        observer = LayerObserver(blocks[index], needs, current, allocate, before, outbox)
                        watching.enter_context(observer.block.observed(observer.on_logits, observer.experts_forward))
                    states.turn(index)
                    for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=sizes)):
                        current.set(batch)
                        if before is not None:
                            before.chosen = states.chosen(number)
                        with outbox.batch():
                            output = skeleton.forward(index, batch, states.hidden())
                        if observer is not None:
                            observer.prove_rule()
                        chosen = states.chosen(number) if observer is None else observer.routed.chosen
                        states.put(number, None if pruning.prunes(index) else output, chosen)
                outbox.wait()
                if observer is not None:
                    layers[index] = observer.statistics(weights)
                    before = Routed(observer.num_experts)
                    pruning.finished(index, layers[index])
                if pruning.prunes(index):
                    with blocks[index].restricted(pruning.retained[index]):
                        states.turn(index)
                        for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=sizes)):
                            states.put(number, skeleton.forward(index, batch, states.hidden()))
            store.commit(index + 1, [*map(layer_file, filter((index + 1).__gt__, blocks)), *states.whole(index + 1)])
            store.release(layer_file(index))
            work.update()
        if heads is not None and store.finished < steps:
            states.turn(skeleton.num_layers)
            with heads.loaded(in_memory), skeleton.embeddings(), contextlib.ExitStack() as watching:
                observers = observers_of(of_heads, needs, current, allocate, before, outbox)
                for observer in observers:
                    watching.enter_context(observer.block.observed(observer.on_logits, observer.experts_forward))
                for number, batch in enumerate(progress(batches, "batches", unit="batch", costs=sizes)):
                    current.set(batch)
                    if before is not None:
                        before.chosen = states.chosen(number)
                    with outbox.batch():
                        heads.run(batch, skeleton.last_hidden(batch, states.hidden()))
                    for observer in observers:
                        observer.prove_rule()
            outbox.wait()
            layers |= {observer.block.layer: observer.statistics(weights) for observer in observers}
            done = [*blocks, *(block.layer for block in of_heads)]
            store.commit(steps, [*map(layer_file, done), *states.whole(skeleton.num_layers)])
            work.update()
    if Need.FISHER in gathered:
        found = gather_fisher(
            skeleton, calibration, current, batch_size=batch_size, seed=seed, store=store, read_ahead=read_ahead
        )
        layers = with_fisher(layers, found)
    return assemble(
        facts or skeleton.facts(),
        calibration,
        current,
        layers,
        gathered,
        max_tokens,
        seed,
        {"dtype": dtype_text(skeleton.dtype), **pruning.provenance},
    )
