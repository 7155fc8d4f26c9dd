# SPDX-License-Identifier: Apache-2.0
"""One pass over a model in memory -> :class:`CalibrationStats`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architectures.block import dense_layers, evaluating, fingerprint, input_device, moe_blocks, vocabulary
from .calibration import CalibrationSet
from .errors import RequestError, RunError
from .observe import Current, LayerObserver
from .progress import progress
from .replay import Routing
from .resume import Store
from .stats import (
    PER_SAMPLE,
    CalibrationStats,
    LayerStats,
    Need,
    Shapes,
    layer_file,
    layer_shapes,
    shapes_bytes,
    tensor_names,
)
from .tensor_files import all_finite

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
    max_tokens: int = 8192,
    seed: int = 0,
    provenance: dict[str, Any] | None = None,
    store: Store | None = None,
) -> CalibrationStats:
    """Run a model over the calibration samples once and gather statistics of its MoE layers.

    Args:
        model: A causal language model with real parameters, on any device or ``device_map``. Its training mode is
            restored.
        calibration: The samples.
        needs: What to gather.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept.
        seed: Decides which tokens are kept when there are more.
        provenance: Added to the provenance of the result.
        store: Where the statistics grow. With a folder, each finished group of batches is kept there, and a later
            call continues after the last one. By default they are in memory, or in temporary files where they are
            large.

    Raises:
        RequestError: If the model cannot be observed, or a token id is outside its vocabulary.
        RunError: If a router gives NaN or infinite logits, or an expert such outputs.
    """
    needs = frozenset(needs)
    store = Store() if store is None else store
    check_model(model)
    check_finite(model)
    blocks = moe_blocks(model)
    calibration.check_vocabulary(vocabulary(model))
    current = Current(calibration, max_tokens, seed)
    batches = list(calibration.batches(batch_size))
    resumed = store.finished
    store.check_steps(len(batches))
    unfinished = torch.cat([torch.zeros(0, dtype=torch.int64), *(batch.samples for batch in batches[resumed:])])

    def allocate(layer: int, shapes: Shapes) -> Mapping[str, Tensor]:
        tensors = store.tensors(layer_file(layer), shapes, keep=resumed > 0)
        for name in tensor_names(needs, PER_SAMPLE) if resumed else ():
            tensors[name][unfinished] = 0  # an interrupted group may have added to them
        return tensors

    observers: list[LayerObserver] = []
    for block in blocks:
        before = observers[-1].routed if observers else None
        observers.append(LayerObserver(block, needs, current, allocate, before))
    store.check_space(statistics_bytes({b.layer: b.num_experts for b in blocks}, needs, current, model.config))
    if resumed == len(batches):  # it was interrupted after the last one: nothing will run
        for observer in observers:
            observer.tensors = store.tensors(layer_file(observer.block.layer), None)

    decoder = model.base_model
    device = input_device(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        for observer in observers:
            stack.enter_context(observer.block.observed(observer.on_logits, observer.experts_forward))
        since = time.monotonic()
        for number, batch in enumerate(progress(batches, "calibrating", len(batches), unit="batch")):
            if number < resumed:
                continue
            current.set(batch)
            decoder(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
            )
            if time.monotonic() - since >= GROUP_SECONDS or number + 1 == len(batches):
                store.commit(number + 1)
                since = time.monotonic()

    weights = torch.ones(len(calibration), dtype=torch.float64)
    return assemble(
        model_facts(model),
        calibration,
        current,
        {observer.block.layer: observer.statistics(weights) for observer in observers},
        needs,
        max_tokens,
        seed,
        {"dtype": str(model.dtype).removeprefix("torch."), **(provenance or {})},
    )


def assemble(
    facts: dict[str, Any],
    calibration: CalibrationSet,
    current: Current,
    layers: dict[int, LayerStats],
    needs: frozenset[Need],
    max_tokens: int,
    seed: int,
    provenance: dict[str, Any],
) -> CalibrationStats:
    """The statistics of a calibration that went through all layers."""
    return CalibrationStats(
        model=facts,
        samples=calibration.samples,
        layers=layers,
        needs=needs,
        token_sample=current.token_sample,
        token_position=current.token_position,
        max_tokens=max_tokens,
        seed=seed,
        provenance={
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "sources": list(calibration.sources),
            "truncated_samples": calibration.truncated,
            "duplicate_samples": calibration.duplicates,
            **provenance,
        },
    )


def statistics_bytes(num_experts: Mapping[int, int], needs: frozenset[Need], current: Current, config: Any) -> int:
    """Bytes of the statistics of all layers, with float32 where the model's own dtype is kept."""
    total, before = 0, 0
    for count in num_experts.values():
        shapes = layer_shapes(
            needs, current.num_samples, len(current.token_sample), count, before,
            config.get_text_config().hidden_size, torch.float32, torch.float32,
        )  # fmt: skip
        total += shapes_bytes(shapes)
        before = count
    return total


def empty_stats(
    facts: dict[str, Any], num_experts: Mapping[int, int], routing: Routing, *, seed: int = 0
) -> CalibrationStats:
    """Statistics of no calibration at all, for methods that need none.

    Args:
        facts: What is remembered of the model.
        num_experts: Experts of each MoE layer.
        routing: The rule of its routers.
        seed: Carried along.
    """
    nothing = torch.zeros(0, dtype=torch.int64)
    layers = {
        index: LayerStats(count, routing, {}, torch.zeros(0, dtype=torch.float64), nothing)
        for index, count in num_experts.items()
    }
    provenance = {"made": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions()}
    return CalibrationStats(facts, (), layers, frozenset(), nothing, nothing, 0, seed, provenance)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What statistics and plans remember of the model they were made for."""
    blocks = moe_blocks(model)
    return {
        "model_type": blocks[0].spec.model_type,
        "top_k": blocks[0].routing.top_k,
        "fingerprint": fingerprint(blocks),
        "dense_layers": dense_layers(model),
        "name_or_path": model.config._name_or_path or None,
        "revision": getattr(model.config, "_commit_hash", None),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("optimum-moe-prune", "transformers", "torch", "scikit-learn", "scipy")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def check_model(model: PreTrainedModel) -> None:
    """Raise unless the parameters of a model are really there, and plain.

    Raises:
        RequestError: For meta or offloaded, quantised, and PEFT-wrapped models, with the way that works.
    """
    if hasattr(model, "peft_config") or type(model).__module__.startswith("peft."):
        raise RequestError("this model carries PEFT adapters; merge them first (model.merge_and_unload()).")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise RequestError(
            "this model is quantised; load it without quantization_config, prune, and quantise the result."
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise RequestError(
                f"{name} is on the meta device (offloaded or not loaded); load the model so that it fits the "
                "machine's memory (device_map without offload)."
            )


def check_finite(model: PreTrainedModel) -> None:
    """Raise unless every weight of a model is finite.

    Raises:
        RunError: Naming the parameter that holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point() and not all_finite(parameter.detach()):
            raise RunError(f"{name} holds NaN or infinite weights; the checkpoint is damaged.")
