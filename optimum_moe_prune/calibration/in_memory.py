# SPDX-License-Identifier: Apache-2.0
"""One pass over a model in memory -> :class:`CalibrationStats`."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..architectures.routers import RoutingRule
from ..checkpoints.weight_sizes import WeightSizes
from ..compat import ModelConfig, text_config
from ..models.blocks import decoder_of, model_facts, moe_blocks
from ..models.checks import check_finite, evaluating, input_device, usable_model, vocabulary
from ..models.heads import Heads
from ..models.layerwise import LayerByLayer
from ..models.transfers import sent
from ..names import dtype_text
from ..progress import working
from ..provenance import now, versions
from ..statistics import passages
from ..statistics.files import layer_file
from ..statistics.needs import (
    DENSE,
    LABEL_DRAWS,
    PER_SAMPLE,
    SUMS_OF_KEPT,
    WITHOUT_TEXT,
    Need,
    layer_shapes,
    tensor_names,
)
from ..statistics.samples import MaxTokens, most_tokens
from ..statistics.stats import CalibrationStats, LayerStats
from ..storage.growing import Store
from ..storage.tensor_files import Shapes, shapes_bytes
from ..storage.values import Json
from .current import Current
from .fisher import check_predicts, gather_fisher, with_fisher
from .observer import observers_of
from .outbox import Outbox
from .samples import CalibrationSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_SECONDS = 10.0
"""Batches are finished in groups that take so long: then what they gave is put on disk."""


def collect(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    needs: Iterable[Need],
    *,
    batch_size: int = 8,
    max_tokens: MaxTokens = 8192,
    seed: int = 0,
    store: Store | None = None,
    heads: Heads | None = None,
) -> CalibrationStats:
    """Run a model over the calibration samples once and gather statistics of its MoE layers.

    Args:
        model: A causal language model with real parameters, on any device or ``device_map``. Its training mode is
            restored.
        calibration: The samples.
        needs: What to gather.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept, or ``"all"``. What takes every expert's
            output is gathered of these alone.
        seed: Decides which tokens are kept when there are more.
        store: Where the statistics grow. With a folder, each finished group of batches is kept there, and a later
            call continues after the last one. By default they are in memory, or in temporary files where they are
            large.
        heads: The heads of its checkpoint, loaded, which are run and watched as well.

    Raises:
        RequestError: If the model cannot be observed, or a token id is outside its vocabulary.
        RunError: If a router gives NaN or infinite logits, or an expert such outputs.
    """
    gathered = frozenset(needs)
    needs = gathered - {Need.FISHER}  # which follows in a pass of its own
    store = Store() if store is None else store
    model = usable_model(model)
    check_predicts(model, gathered)
    check_finite(model)
    blocks = [*moe_blocks(model), *(heads.blocks if heads is not None else ())]
    calibration.check_vocabulary(vocabulary(model))
    current = Current(calibration, max_tokens, seed)
    batches = list(calibration.batches(batch_size))
    resumed = store.finished
    store.check_steps(len(batches), "batch")

    @functools.cache
    def kept_of(step: int) -> Tensor:
        return torch.isin(current.token_sample, batches[step].samples).nonzero().flatten()

    def finished_in(tensors: Mapping[str, Tensor], step: int) -> Iterator[Tensor]:
        """What a batch gave, in the order of names: rows of its samples, and of their tokens that are kept."""
        per_sample = tensor_names(needs, PER_SAMPLE)
        by_no_batch = {*SUMS_OF_KEPT, *tensor_names(WITHOUT_TEXT)}
        for name in sorted(tensors.keys() - by_no_batch):
            yield tensors[name][batches[step].samples if name in per_sample else kept_of(step)]

    def allocate(layer: int, shapes: Shapes) -> Mapping[str, Tensor]:
        return store.tensors(layer_file(layer), shapes, keep=resumed > 0, part=finished_in)

    outbox = Outbox()
    observers = observers_of(blocks, needs, current, allocate, None, outbox)
    store.check_space(statistics_bytes({b.layer: b.num_experts for b in blocks}, gathered, current, model.config))
    if resumed == len(batches):  # it was interrupted after the last one: nothing will run
        for observer in observers:
            observer.tensors = store.tensors(layer_file(observer.block.layer), None, part=finished_in)

    decoder = decoder_of(model)
    device = input_device(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        stack.enter_context(outbox)
        for observer in observers:
            stack.enter_context(observer.block.observed(observer.on_logits, observer.experts_forward))
        sizes = [batch.input_ids.numel() for batch in batches]
        work = stack.enter_context(
            working("calibrating", len(batches), "batch", "calibrated", begun=resumed, costs=sizes)
        )
        since = time.monotonic()
        for number in range(resumed, len(batches)):
            batch = batches[number]
            current.set(batch)
            with outbox.batch():
                output = decoder(
                    input_ids=sent(batch.input_ids, device),
                    attention_mask=sent(batch.attention_mask, device),
                    use_cache=False,
                )
                if heads is not None:
                    heads.run(batch, output.last_hidden_state)
            for observer in observers:
                observer.prove_rule()
            if time.monotonic() - since >= GROUP_SECONDS or number + 1 == len(batches):
                outbox.wait()
                store.commit(number + 1)
                since = time.monotonic()
            work.update()

    weights = torch.ones(len(calibration), dtype=torch.float64)
    layers = {observer.block.layer: observer.statistics(weights) for observer in observers}
    if Need.FISHER in gathered:
        runner = LayerByLayer(model)
        found = gather_fisher(runner, calibration, current, batch_size=batch_size, seed=seed, store=store)
        layers = with_fisher(layers, found)
    return assemble(
        model_facts(model),
        calibration,
        current,
        layers,
        gathered,
        max_tokens,
        seed,
        {"dtype": dtype_text(model.dtype)},
    )


def assemble(
    facts: Json,
    calibration: CalibrationSet,
    current: Current,
    layers: dict[int, LayerStats],
    needs: frozenset[Need],
    max_tokens: MaxTokens,
    seed: int,
    provenance: Json,
) -> CalibrationStats:
    """The statistics of a calibration that went through all layers."""
    return CalibrationStats(
        model=facts,
        samples=calibration.samples,
        layers=layers,
        needs=needs,
        token_sample=current.token_sample,
        token_position=current.token_position,
        max_tokens=most_tokens(max_tokens),
        seed=seed,
        provenance={
            "made": now(),
            "versions": versions(),
            "sources": list(calibration.sources),
            "truncated_samples": calibration.truncated,
            "duplicate_samples": calibration.duplicates,
            "calibration_counts": calibration.counts.to_dict(),
            "calibration_notes": list(calibration.notes()),
            passages.KEY: calibration.passages.to_dict(),
            **({"dense_tokens": len(current.token_sample)} if needs & DENSE else {}),
            **({"label_draws": LABEL_DRAWS} if Need.FISHER in needs else {}),
            **provenance,
        },
    )


def statistics_bytes(
    num_experts: Mapping[int, int], needs: frozenset[Need], current: Current, config: ModelConfig
) -> int:
    """Bytes of the statistics of all layers, with float32 where the model's own dtype is kept."""
    total, before = 0, 0
    for count in num_experts.values():
        shapes = layer_shapes(
            needs, current.num_samples, len(current.token_sample), count, before,
            text_config(config).hidden_size, torch.float32, torch.float32,
        )  # fmt: skip
        total += shapes_bytes(shapes)
        before = count
    return total


def empty_stats(
    facts: Json,
    num_experts: Mapping[int, int],
    routing: RoutingRule,
    *,
    seed: int = 0,
    weights: Mapping[int, WeightSizes] | None = None,
) -> CalibrationStats:
    """Statistics of no calibration at all, for methods that need none.

    Args:
        facts: What is remembered of the model.
        num_experts: Experts of each MoE layer.
        routing: The rule of its routers.
        seed: Carried along.
        weights: How large the weights of each layer's experts are, for methods that read them.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    layers = {
        index: LayerStats(
            count, routing, {} if weights is None else weights[index], torch.zeros(0, dtype=torch.float64), nothing
        )
        for index, count in num_experts.items()
    }
    provenance = {"made": now(), "versions": versions()}
    needs = frozenset() if weights is None else frozenset({Need.WEIGHTS})
    return CalibrationStats(facts, (), layers, needs, nothing, nothing, 0, seed, provenance)
