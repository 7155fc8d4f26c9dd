# SPDX-License-Identifier: Apache-2.0
"""Calibrate: a model in memory, or a checkpoint by whichever way fits the machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Union

import torch

from ..architectures.own_code import OwnCode
from ..architectures.routers import RoutingRule
from ..checkpoints.layout import Layout, identity, model_dtype, open_layout
from ..checkpoints.source import Source
from ..config import MoEPrunerConfig
from ..errors import RequestError, RunError, faults_of
from ..methods import get_method, make_options
from ..models.blocks import model_facts, moe_blocks
from ..models.checks import usable_model
from ..models.heads import Heads, open_heads
from ..models.memory import Compute, begun_with, load_model, open_skeleton
from ..models.precision import dtype_of_weights
from ..models.widened import widened
from ..names import dtype_text
from ..processes import shared
from ..processes.folders import own_workspace
from ..progress import working
from ..provenance import versions
from ..statistics.needs import WITHOUT_RULE
from ..statistics.samples import MaxTokens
from ..statistics.stats import CalibrationStats, Need
from ..storage.growing import Store, process_folder, unfinished
from ..storage.values import Json
from ..storage.workspace import Workspace
from .in_memory import collect, empty_stats
from .samples import CalibrationInput, CalibrationSet, sample_length
from .shares import check_same_samples, merged, shared_folder, shares_of
from .streamed import collect_streamed
from .texts import needs_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Model = Union["PreTrainedModel", Layout, Source, str, os.PathLike]
"""A model in memory, wrapped (``models.wrappers``) or not; or the folder, Hub id or ``Source`` of one."""
Needs = str | Need | MoEPrunerConfig | Iterable[str | Need | MoEPrunerConfig]
"""``"all"``, methods by name, recipes, or single needs."""


@shared
def calibrate(
    model: Model,
    samples: CalibrationInput,
    needs: Needs = "all",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    max_tokens: MaxTokens = 8192,
    seed: int = 0,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> CalibrationStats:
    """Run a model over calibration samples once and gather statistics of its MoE layers.

    Args:
        model: A causal language model with real parameters, on any device or ``device_map``; or the folder, Hub id or
            ``Source`` of one, which is held in memory for it, or one layer at a time.
        samples: Texts, files, records, a dataset, token tensors, or a ``CalibrationSet`` (which selects and packs).
        needs: What to gather: ``"all"``, what methods (by name) or recipes read, or single needs.
        tokenizer: For texts; by default the one in the model's folder.
        max_length: Tokens of a sample at most; less if the model was made for less.
        batch_size: Samples in a forward pass.
        max_tokens: The most tokens for which statistics per token are kept, or ``"all"``; they are of all samples,
            and what takes the output of every expert is gathered of these alone.
        seed: Decides which tokens are kept when there are more.
        compute: How a checkpoint is run, and which processes share the work: each of several that were launched takes
            its share of the batches, and all have the statistics of the whole in the end, as one would have them. Of a
            model in memory ``dtype`` counts: ``"auto"`` is its own, or float32 where the processor multiplies that far
            faster.
        workspace: Where unfinished work on a checkpoint is kept, and continued by a later call for the same. Several
            processes have to share its disk, or that of temporary files.

    Raises:
        RequestError: If the request is wrong, a tensor is missing or has another shape than the config says, or the
            workspace holds unfinished work on something else.
        RunError: If the model holds NaN or infinite values, or something cannot be written.
    """
    settings: Json = {"batch_size": batch_size, "max_tokens": max_tokens, "seed": seed}
    processes = compute.together
    layout = layout_of(model)
    model = usable_model(model if layout is None else layout)
    gathered = _possible(needs_of(needs), _required(needs), rule_of(model if layout is None else layout))
    config = model.config if layout is None else layout.config  # type: ignore[union-attr]
    if tokenizer is None and layout is not None and needs_tokenizer(samples):
        tokenizer = layout.checkpoint.source.require_tokenizer()
    calibration = CalibrationSet.build(samples, tokenizer, max_length=sample_length(max_length, config))
    precision = None if layout is not None else compute.precision_of(model)
    if processes.is_alone:
        if layout is None:
            return _of_model(model, calibration, gathered, settings, precision)
        found = _of_checkpoint(layout, calibration, calibration, gathered, settings, needs, compute, workspace)
        assert found is not None
        return found
    check_same_samples(processes, calibration)
    shares = shares_of(calibration, batch_size, processes)
    share = shares[processes.rank]
    with shared_folder(processes, workspace, temporary=layout is None) as folder:
        stats = None
        if layout is not None:
            inside = replace(workspace, folder=folder)
            stats = _of_checkpoint(layout, calibration, share, gathered, settings, needs, compute, inside)
        elif len(share):
            store = Store(process_folder(folder, processes.rank), look=processes.look)
            stats = _of_model(model, share, gathered, settings, precision, store)
        return merged(calibration, shares, stats, folder, processes)


def _of_model(
    model: Model,
    calibration: CalibrationSet,
    gathered: frozenset[Need],
    settings: Json,
    precision: torch.dtype | None,
    store: Store | None = None,
) -> CalibrationStats:
    """What a model in memory gives of a calibration, calculated in a precision."""
    with widened(model, precision or dtype_of_weights(model)):  # type: ignore[arg-type]
        stats = collect(model, calibration, gathered, **settings, store=store)  # type: ignore[arg-type]
    held = {"checkpoint_dtype": dtype_text(dtype_of_weights(model))}  # type: ignore[arg-type]
    return replace(stats, provenance={**stats.provenance, **held})


def _of_checkpoint(
    layout: Layout,
    whole: CalibrationSet,
    calibration: CalibrationSet,
    gathered: frozenset[Need],
    settings: Json,
    needs: Needs,
    compute: Compute,
    workspace: Workspace,
) -> CalibrationStats | None:
    """What a checkpoint gives of a calibration, or of a share of the whole one; None where that is empty."""
    processes = compute.together
    own = own_workspace(processes, workspace, "calibration")
    begun = None if own.folder is None or own.restart else unfinished(own.folder)
    compute = compute.agreed(layout, *begun_with(begun))
    work = {
        "model": identity(layout),
        "calibration": whole.fingerprint,
        "needs": sorted(map(str, gathered)),
        **settings,
        "dtype": compute.dtype,
        "computing_dtype": compute.computing,
        "device": compute.device_type,
        "stream": compute.stream,
        "versions": versions(),
    }
    if not processes.is_alone:
        work["processes"] = processes.count
    if not len(calibration):
        return None
    asked = {"calibration": calibration.settings, "needs": _asked(needs), "computing_dtype": {"dtype": compute.dtype}}
    skeleton = open_skeleton(layout, compute)  # checks all tensors
    found = open_heads(layout, skeleton)
    heads = found if isinstance(found, Heads) else None
    store = Store(own.folder, work, own.restart, settings=asked, look=processes.look)
    runs = faults_of(f"config.json of {layout.checkpoint.name_or_path}", RunError)
    try:
        if compute.stream:
            with runs:
                stats = collect_streamed(skeleton, calibration, gathered, **settings, store=store, heads=heads)
        else:
            try:
                with working("loading the model", None, did="loaded the model"):
                    loaded = load_model(layout, compute)
                of_heads = contextlib.nullcontext() if heads is None else heads.loaded(loaded)
                with runs, of_heads, widened(loaded, skeleton.dtype):
                    stats = collect(loaded, calibration, gathered, **settings, store=store, heads=heads)
            except RunError:
                layout.checkpoint.check_finite()  # names the file and the tensor, where it is one
                raise
            stats = replace(stats, model=layout.facts())  # of the checkpoint's own precision
    finally:
        store.close()
    provenance = {**stats.provenance, "streamed": compute.stream, "statistics_on_disk": store.spilled}
    provenance["checkpoint_dtype"] = dtype_text(model_dtype(layout.config, layout.checkpoint))
    if not processes.is_alone:
        provenance["processes"] = processes.count
    if layout.plain.formats:
        provenance["dequantised"] = layout.plain.formats
    if isinstance(found, str):
        provenance["heads_left_out"] = found
    return replace(stats, provenance=provenance)


def statistics_for(
    recipes: Sequence[MoEPrunerConfig],
    model: Model,
    samples: CalibrationSet | None,
    compute: Compute = Compute(),
    workspace: Workspace = Workspace(),
) -> CalibrationStats:
    """What the methods of recipes read: statistics of the samples, or of no calibration where none needs one.

    Batches, kept tokens and seed are the first recipe's.

    Raises:
        RequestError: If samples are needed and there are none.
    """
    first = recipes[0]
    if not any(recipe.needs for recipe in recipes):
        return no_calibration(model, first.seed)
    if samples is None:
        raise RequestError(f"method {first.method!r} needs a calibration; pass calibration=texts.")
    return calibrate(
        model,
        samples,
        recipes,
        batch_size=first.batch_size,
        max_tokens=first.max_tokens,
        seed=first.seed,
        compute=compute,
        workspace=workspace,
    )


def no_calibration(model: Model, seed: int = 0) -> CalibrationStats:
    """Statistics of no calibration at all, for methods that need none.

    Args:
        model: As for :func:`calibrate`.
        seed: Carried along.
    """
    layout = layout_of(model)
    model = usable_model(model if layout is None else layout)
    if layout is None:
        blocks = moe_blocks(model)
        counts = {block.layer: block.num_experts for block in blocks}
        return empty_stats(model_facts(model), counts, blocks[0].rule, seed=seed)  # type: ignore[arg-type]
    open_skeleton(layout, Compute("float32", "cpu"))  # looks whether all tensors are there
    return empty_stats(layout.facts(), layout.num_experts, layout.spec.routing(layout.config), seed=seed)


def needs_of(needs: Needs) -> frozenset[Need]:
    """The statistics that are meant by ``"all"``, by methods, recipes, or single needs.

    Raises:
        RequestError: If a method is not known, or nothing is needed.
    """
    if isinstance(needs, str) and needs == "all":
        return frozenset(Need)
    if isinstance(needs, (str, Need, MoEPrunerConfig)):
        needs = [needs]
    found: set[Need] = set()
    names = []
    for need in needs:
        if isinstance(need, Need):
            found.add(need)
        elif isinstance(need, MoEPrunerConfig):
            names.append(need.method)
            found |= need.needs
        else:
            method = get_method(need)
            names.append(method.name)
            found |= method.needs(make_options(method, {}))
    if not found:
        raise RequestError(
            f"method {' or '.join(map(repr, names))} needs no calibration, so there is nothing to score."
        )
    return frozenset(found)


def _asked(needs: Needs) -> Json:
    """What was asked for, as settings that a person gave."""
    if isinstance(needs, (str, Need, MoEPrunerConfig)):
        needs = [needs]
    asked = list(needs)
    if any(isinstance(need, Need) for need in asked):
        return {}  # they say it themselves
    recipes = [need for need in asked if isinstance(need, MoEPrunerConfig)]
    return {
        "method": ", ".join(need.method if isinstance(need, MoEPrunerConfig) else str(need) for need in asked),
        "method_options": {name: value for recipe in recipes for name, value in recipe.method_options.items()},
        "protect_super_experts": any(recipe.protect_super_experts for recipe in recipes),
    }


def rule_of(model: Model) -> RoutingRule:
    """The rule of a model's routers."""
    return model.spec.routing(model.config) if isinstance(model, Layout) else moe_blocks(model)[0].rule


def _required(needs: Needs) -> frozenset[Need]:
    """What cannot be done without: of all there is nothing, nor of what a method can choose from that measures."""
    if isinstance(needs, str) and needs == "all":
        return frozenset()
    found: set[Need] = set()
    for need in [needs] if isinstance(needs, (str, Need, MoEPrunerConfig)) else needs:
        if isinstance(need, Need):
            found.add(need)
            continue
        recipe = need if isinstance(need, MoEPrunerConfig) else MoEPrunerConfig(method=need)
        if not get_method(recipe.method).measures or recipe.method_options:  # candidates that were named
            found |= recipe.needs
    return frozenset(found)


def _possible(needs: frozenset[Need], required: frozenset[Need], rule: RoutingRule) -> frozenset[Need]:
    """What can be gathered of routers by a rule; all, unless they are known by what they did alone.

    Raises:
        RequestError: If something else is required.
    """
    missing = frozenset() if rule.formula else needs - WITHOUT_RULE
    if refused := missing & required:
        assert isinstance(rule, OwnCode)
        raise rule.refusal(f"gathering {', '.join(sorted(map(str, refused)))}")
    if missing:
        logger.warning(
            "not gathered, since it needs the rule of the routers: %s.", ", ".join(sorted(map(str, missing)))
        )
    return needs - missing


def layout_of(model: Model) -> Layout | None:
    """The checkpoint that is meant, or None for a model in memory."""
    if isinstance(model, Layout):
        return model
    return open_layout(model) if isinstance(model, (Source, str, os.PathLike)) else None
