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
from ..architectures.table import architecture_of
from ..checkpoints.layout import Layout, identity, model_dtype, open_layout
from ..checkpoints.source import Source
from ..checkpoints.weight_sizes import weight_sizes
from ..config import MoEPrunerConfig
from ..errors import RequestError, RunError, faults_of
from ..methods import get_method, make_options
from ..models.blocks import model_facts, moe_blocks
from ..models.checks import check_finite, usable_model
from ..models.heads import Heads, open_heads
from ..models.layerwise import LayerByLayer
from ..models.memory import Compute, begun_with, load_model, open_skeleton
from ..models.precision import dtype_of_weights
from ..models.weight_sizes import weight_sizes_of
from ..models.widened import widened
from ..names import dtype_text
from ..processes import shared
from ..processes.folders import own_workspace
from ..progress import working
from ..provenance import versions
from ..statistics.needs import OF_A_FORWARD_PASS, WITHOUT_RULE, WITHOUT_TEXT
from ..statistics.samples import MaxTokens
from ..statistics.stats import CalibrationStats, Need
from ..storage.growing import Store, process_folder, unfinished
from ..storage.values import Json
from ..storage.workspace import Workspace
from .in_memory import collect, empty_stats
from .progressive import LayerChoice
from .samples import CalibrationInput, CalibrationSet, sample_length
from .shares import SharedChoice, check_same_samples, merged, shared_folder, shares_of
from .streamed import collect_streamed
from .texts import needs_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Model = Union["PreTrainedModel", Layout, Source, str, os.PathLike]
"""A model in memory, wrapped (``models.wrappers``) or not; or the folder, Hub id or ``Source`` of one."""
Needs = str | Need | MoEPrunerConfig | Iterable[str | Need | MoEPrunerConfig]
"""``"all"``, methods by name, recipes, single needs, or several of these."""


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
    choice: LayerChoice | None = None,
) -> CalibrationStats:
    """Run a model over calibration samples once and gather statistics of its MoE layers.

    Args:
        model: A causal language model with real parameters, on any device or ``device_map``; or the folder, Hub id or
            ``Source`` of one, which is held in memory for it, or one layer at a time.
        samples: Texts, files, records, a dataset, token tensors, or a ``CalibrationSet`` (which selects and packs).
        needs: What to gather: ``"all"`` that a forward pass gives, what methods (by name) or recipes read, or single
            needs. Gradients (``Need.FISHER``) take another pass forward and one back, and are named beside.
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
        choice: Prune each layer as soon as its statistics are gathered, to the experts that this chooses: those of
            the next layers are then of what the pruned ones leave (``progressive``).

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
    if choice is not None and not (architecture := architecture_of(config)).streams:
        raise RequestError(
            f"a {architecture.model_type} cannot be run one layer at a time, so its layers cannot be pruned one after "
            "another while they are calibrated; calibrate it as it is (progressive=False)."
        )
    precision = None if layout is not None else compute.precision_of(model)
    if processes.is_alone:
        if layout is None:
            return _of_model(model, calibration, gathered, settings, precision, choice=choice)
        found = _of_checkpoint(layout, calibration, calibration, gathered, settings, needs, compute, workspace, choice)
        assert found is not None
        return found
    check_same_samples(processes, calibration)
    shares = shares_of(calibration, batch_size, processes)
    share = shares[processes.rank]
    with shared_folder(processes, workspace, temporary=layout is None) as folder:
        stats = None
        together = None if choice is None else SharedChoice(choice, calibration, shares, folder, processes)
        if layout is not None:
            inside = replace(workspace, folder=folder)
            stats = _of_checkpoint(layout, calibration, share, gathered, settings, needs, compute, inside, together)
        elif len(share):
            store = Store(process_folder(folder, processes.rank), look=processes.look)
            stats = _of_model(model, share, gathered, settings, precision, store, together)
        if together is not None and not len(share):
            together.stand_by(layers_of(model if layout is None else layout))
        return merged(calibration, shares, stats, folder, processes)


def _of_model(
    model: Model,
    calibration: CalibrationSet,
    gathered: frozenset[Need],
    settings: Json,
    precision: torch.dtype | None,
    store: Store | None = None,
    choice: LayerChoice | None = None,
) -> CalibrationStats:
    """What a model in memory gives of a calibration, calculated in a precision."""
    dtype = precision or dtype_of_weights(model)  # type: ignore[arg-type]
    stats = _in_memory(model, calibration, gathered, settings, dtype, store, choice=choice)  # type: ignore[arg-type]
    held = {"checkpoint_dtype": dtype_text(dtype_of_weights(model))}  # type: ignore[arg-type]
    return replace(stats, provenance={**stats.provenance, **held})


def _in_memory(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    gathered: frozenset[Need],
    settings: Json,
    dtype: torch.dtype,
    store: Store | None,
    heads: Heads | None = None,
    choice: LayerChoice | None = None,
) -> CalibrationStats:
    """As :func:`collect`, calculated in a precision; layer by layer, where layers are pruned meanwhile."""
    if choice is not None:
        check_finite(model)
        runner = LayerByLayer(model, dtype=dtype)
        return collect_streamed(runner, calibration, gathered, **settings, store=store, heads=heads, choice=choice)
    with contextlib.nullcontext() if heads is None else heads.loaded(model), widened(model, dtype):
        return collect(model, calibration, gathered, **settings, store=store, heads=heads)


def _of_checkpoint(
    layout: Layout,
    whole: CalibrationSet,
    calibration: CalibrationSet,
    gathered: frozenset[Need],
    settings: Json,
    needs: Needs,
    compute: Compute,
    workspace: Workspace,
    choice: LayerChoice | None = None,
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
    if choice is not None:
        work["progressive"] = choice.provenance
    if not processes.is_alone:
        work["processes"] = processes.count
    if not len(calibration):
        return None
    asked = {"calibration": calibration.settings, "needs": _asked(needs), "computing_dtype": {"dtype": compute.dtype}}
    if choice is not None:
        asked["progressive"] = choice.provenance["recipe"]
    skeleton = open_skeleton(layout, compute)  # checks all tensors
    found = open_heads(layout, skeleton)
    heads = found if isinstance(found, Heads) else None
    what = "calibration" if choice is None else "progressive calibration"
    store = Store(own.folder, work, own.restart, what, asked, processes.look)
    runs = faults_of(f"config.json of {layout.checkpoint.name_or_path}", RunError)
    try:
        if compute.stream:
            with runs:
                stats = collect_streamed(
                    skeleton, calibration, gathered, **settings, store=store, heads=heads, choice=choice
                )
        else:
            try:
                with working("loading the model", None, did="loaded the model"):
                    loaded = load_model(layout, compute)
                with runs:
                    stats = _in_memory(loaded, calibration, gathered, settings, skeleton.dtype, store, heads, choice)
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
    if not any(recipe.needs_text for recipe in recipes):
        return no_calibration(model, first.seed, frozenset[Need]().union(*(recipe.needs for recipe in recipes)))
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


def no_calibration(model: Model, seed: int = 0, needs: Iterable[Need] = ()) -> CalibrationStats:
    """Statistics of no calibration at all, for methods that need none; of a model's weights at most.

    Args:
        model: As for :func:`calibrate`.
        seed: Carried along.
        needs: What these read (``WITHOUT_TEXT``). Of a checkpoint the weights are read from its files, one tensor at
            a time.
    """
    layout, reads = layout_of(model), Need.WEIGHTS in frozenset(needs)
    model = usable_model(model if layout is None else layout)
    if layout is None:
        blocks = moe_blocks(model)
        counts = {block.layer: block.num_experts for block in blocks}
        found = {block.layer: weight_sizes_of(block) for block in blocks} if reads else None
        return empty_stats(model_facts(model), counts, blocks[0].rule, seed=seed, weights=found)  # type: ignore[arg-type]
    open_skeleton(layout, Compute("float32", "cpu"))  # looks whether all tensors are there
    found = weight_sizes(layout) if reads else None
    rule = layout.spec.routing(layout.config)
    return empty_stats(layout.facts(), layout.num_experts, rule, seed=seed, weights=found)


def needs_of(needs: Needs) -> frozenset[Need]:
    """The statistics that are meant by ``"all"`` (of a forward pass), by methods, recipes, or single needs.

    Raises:
        RequestError: If a method is not known, or nothing is needed.
    """
    found: set[Need] = set()
    names = []
    for need in _each(needs):
        if need == "all":
            found |= OF_A_FORWARD_PASS
        elif isinstance(need, Need):
            found.add(need)
        elif isinstance(need, MoEPrunerConfig):
            names.append(need.method)
            found |= need.needs
        else:
            method = get_method(need)
            names.append(method.name)
            found |= method.needs(make_options(method, {}))
    if not found - WITHOUT_TEXT:
        what = f"method {' or '.join(map(repr, names))}" if names else "the statistic weights"
        raise RequestError(f"{what} needs no calibration, so there is nothing to score.")
    return frozenset(found)


def _each(needs: Needs) -> list[str | Need | MoEPrunerConfig]:
    return [needs] if isinstance(needs, (str, MoEPrunerConfig)) else list(needs)  # a need is a string as well


def _asked(needs: Needs) -> Json:
    """What was asked for, as settings that a person gave."""
    asked = _each(needs)
    if any(isinstance(need, Need) for need in asked):
        return {}  # they say it themselves
    recipes = [need for need in asked if isinstance(need, MoEPrunerConfig)]
    return {
        "method": ", ".join(need.method if isinstance(need, MoEPrunerConfig) else str(need) for need in asked),
        "method_options": {name: value for recipe in recipes for name, value in recipe.method_options.items()},
        "protect_super_experts": any(recipe.protect_super_experts for recipe in recipes),
    }


def layers_of(model: Model) -> dict[int, int]:
    """Experts of each MoE layer of a model."""
    if isinstance(model, Layout):
        return model.num_experts
    return {block.layer: block.num_experts for block in moe_blocks(model)}


def rule_of(model: Model) -> RoutingRule:
    """The rule of a model's routers."""
    return model.spec.routing(model.config) if isinstance(model, Layout) else moe_blocks(model)[0].rule


def _required(needs: Needs) -> frozenset[Need]:
    """What cannot be done without: of all there is nothing, nor of what a method can choose from that measures."""
    found: set[Need] = set()
    for need in _each(needs):
        if isinstance(need, Need):
            found.add(need)
        if isinstance(need, Need) or need == "all":
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
