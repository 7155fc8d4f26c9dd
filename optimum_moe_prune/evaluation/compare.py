# SPDX-License-Identifier: Apache-2.0
"""Several models measured side by side: losses on held-out texts, benchmark tasks, speed."""

from __future__ import annotations

import gc
import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Union

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.substitution import READER, substituted_in
from ..calibration.samples import CalibrationInput, CalibrationSet, sample_length
from ..calibration.texts import needs_tokenizer
from ..checkpoints.source import Source
from ..compat import text_config
from ..errors import RequestError, RunError
from ..formats import GGUF_FILE, MLX_FOLDER, form_of
from ..models.memory import Compute, load_model
from ..models.wrappers import plain_model
from ..names import AUTO, dtype_text
from ..plan import PruningPlan
from ..processes import shared
from ..progress import working
from ..provenance import versions
from ..storage.values import Json, Values
from .comparison import Comparison, ModelResult, reference_of
from .draft import Drafting, measure_draft
from .losses import Evaluation, evaluate
from .overlap import overlap_of
from .speed import Generation, measure_in_turn
from .tasks import check_tasks, run_tasks

logger = logging.getLogger(__name__)

_SAME_TOKENS = 0.9  # of all tokens of two tokenizers that are taken for the same one

AnyModel = Union[str, os.PathLike, Source, PreTrainedModel]  # noqa: UP007 - evaluated on Python 3.10 as well
"""A model's folder or Hub id, how it is reached, or the model itself."""


@shared
def compare(
    models: AnyModel | Sequence[AnyModel],
    data: CalibrationInput | None = None,
    *,
    reference: AnyModel | None = None,
    tasks: Sequence[str] = (),
    speed: bool = False,
    draft: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    new_tokens: int = 64,
    draft_tokens: int | None = None,
    compute: Compute = Compute(),
    seed: int = 0,
    **task_settings: Any,
) -> Comparison:
    """Evaluate models, one of them in memory at a time beside the reference.

    Args:
        models: Folders, Hub ids or loaded models, one or several.
        data: Held-out texts, as :func:`~optimum_moe_prune.evaluation.losses.evaluate` takes them; the first model's
            tokenizer reads them for all. A ``CalibrationSet`` where they are read in a way of their own
            (``text_column``, ``template_args``, ``skip_bad``).
        reference: The model to compare with, usually the unpruned one.
        tasks: Tasks of lm-evaluation-harness to run on each, the reference included.
        speed: Whether to measure generation and peak memory, each model in a process of its own and in turn with the
            reference; a loaded model has none.
        draft: Whether to measure each model as the draft of the reference, by the data (``evaluation.draft``).
        tokenizer: In place of those that come with the models.
        batch_size: Samples, or prompts, in a forward pass.
        max_length: Tokens of a sample at most.
        new_tokens: Tokens to generate, for the speed and for drafts.
        draft_tokens: Tokens that a draft proposes at once; by default as transformers does.
        compute: Precision and device of models that are loaded here.
        seed: Of the resamples behind intervals, and of tasks.
        task_settings: Further arguments of :func:`~optimum_moe_prune.evaluation.tasks.run_tasks`: ``include``,
            ``limit``, ``num_fewshot``, ``allow_code``, ``apply_chat_template`` ...

    Returns:
        Results by name: the last part of a model's folder or id, with a number where that is taken.

    Raises:
        RequestError: Before a model is loaded: if there is nothing to evaluate on, a model is named twice, data,
            tasks or models cannot be used, or the vocabularies differ.
        RunError: If a model's loss or output is NaN, or a task's data cannot be read.
    """
    processes, own = compute.together, compute.on_own_device()
    several = [models] if isinstance(models, (str, os.PathLike, Source, nn.Module)) else models
    compared = [_source(model) for model in several]
    original = None if reference is None else _source(reference)
    every = [*compared, *([] if original is None else [original])]
    _check_draft(draft, draft_tokens, data, original, new_tokens)
    _check_forms(every)
    if speed or draft:
        _check_constants(every)
    _check(every, data, tasks, speed, batch_size, new_tokens, task_settings)
    texts = None if data is None else held_out(every[0], data, tokenizer, max_length)
    if (tasks or speed or draft) and processes.is_main and not processes.is_alone:
        logger.warning("tasks, speed and drafts are measured by the main process alone; the others wait.")

    def loaded(model: Source | PreTrainedModel) -> PreTrainedModel:
        if not isinstance(model, Source):
            return model
        with working(f"loading {_name(model)}", None, did=f"loaded {_name(model)}"):
            return load_model(model, own)

    def result(source: Source | PreTrainedModel, model: PreTrainedModel, evaluation: Evaluation | None) -> ModelResult:
        settings = {"batch_size": batch_size, "seed": seed, **task_settings}
        if compute.dtype != AUTO:
            settings["dtype"] = compute.dtype

        def run() -> Any:
            return run_tasks(model, tokenizer or _tokenizer(source), tasks, **settings)

        return ModelResult.of(model, evaluation, processes.from_main(run) if tasks else None)

    labels, computing = _labels(every), ""
    results = {label: ModelResult() for label in labels}
    if texts is not None or tasks:
        last, other = None, None if original is None else loaded(original)
        for label, source in zip(labels, compared, strict=False):
            model = loaded(source)
            computing = computing or dtype_text(compute.precision_of(model))
            if texts is not None:
                last = evaluate(
                    model, texts, reference=other, batch_size=batch_size, seed=seed, processes=processes,
                    dtype=compute.dtype,
                )  # fmt: skip
            results[label] = result(source, model, last)
            if draft and texts is not None and other is not None:
                done = processes.from_main(partial(_drafting, label, other, model, texts, new_tokens, draft_tokens))
                results[label] = replace(results[label], draft=done)
            del model
            gc.collect()
        if original is not None and other is not None:
            results[labels[-1]] = result(original, other, None if last is None else reference_of(last))
        del other
        gc.collect()  # before other processes need the memory
    if texts is not None:
        for label, source in zip(labels, every, strict=True):
            results[label] = replace(results[label], overlap=overlap_of(_plan(source), texts))
    if speed:
        named = dict(zip(labels, every, strict=True))
        speeds = processes.from_main(lambda: _speeds(named, original, new_tokens, compute))
        for label, generation in speeds.items():
            results[label] = replace(results[label], generation=generation)
    settings: Json = {}
    if texts is not None:
        settings = {"text": ", ".join(texts.sources), "samples_fingerprint": texts.fingerprint[:12]}
        settings["max_length"] = max_length
    first = every[0]
    settings["dtype"] = compute.dtype if isinstance(first, Source) else dtype_text(first.dtype)
    if computing:
        settings["computing_dtype"] = computing
    settings["device"] = compute.runs_on if isinstance(first, Source) else str(first.device)
    known = versions()
    settings |= {name: known[name] for name in ("transformers", "torch") if name in known}
    return Comparison(results, None if original is None else labels[-1], settings)


def _drafting(
    label: str,
    reference: PreTrainedModel,
    model: PreTrainedModel,
    texts: CalibrationSet,
    new_tokens: int,
    draft_tokens: int | None,
) -> Drafting | None:
    """A model as a draft of the reference; None where transformers cannot use it so."""
    try:
        return measure_draft(reference, model, texts, new_tokens=new_tokens, draft_tokens=draft_tokens)
    except RunError as error:  # what was evaluated before is not lost for it
        logger.warning("%s: %s", label, error)
        return None


def _speeds(
    models: dict[str, Source | PreTrainedModel],
    reference: Source | PreTrainedModel | None,
    new_tokens: int,
    compute: Compute,
) -> dict[str, Generation]:
    """The speed of each model, in turn with the reference; without one all of them in turn."""
    labels = list(models)
    sources = {label: model for label, model in models.items() if isinstance(model, Source)}
    found: dict[str, Generation] = {}
    for group in [labels] if reference is None else [[label, labels[-1]] for label in labels[:-1]]:
        try:
            measured = measure_in_turn([sources[label] for label in group], new_tokens=new_tokens, compute=compute)
        except RunError as error:  # what was evaluated before is not lost for it
            logger.warning("%s", error)
            continue
        if reference is None:
            measured = [replace(generation, speedup=None, speedup_range=None) for generation in measured]
        found |= dict(zip(group, measured, strict=True))
    return found


def held_out(
    model: Source | PreTrainedModel,
    data: CalibrationInput,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    **reading: Any,
) -> CalibrationSet:
    """Texts as samples for a model, by its tokenizer.

    Args:
        model: The model.
        data: As :func:`~optimum_moe_prune.evaluation.losses.evaluate` takes them.
        tokenizer: In place of the model's own.
        max_length: Tokens of a sample at most.
        reading: ``text_column``, ``template_args``, ``skip_bad``: see ``CalibrationSet.build``.

    Raises:
        RequestError: If they, or the model, cannot be read, or a token id is outside its vocabulary.
    """
    config = model.config
    if tokenizer is None and needs_tokenizer(data):
        tokenizer = model.require_tokenizer() if isinstance(model, Source) else _tokenizer(model)
    samples = CalibrationSet.build(data, tokenizer, max_length=sample_length(max_length, config), **reading)
    samples.check_vocabulary(text_config(config).vocab_size)
    return samples


def _check(
    models: Sequence[Source | PreTrainedModel],
    data: CalibrationInput | None,
    tasks: Sequence[str],
    speed: bool,
    batch_size: int,
    new_tokens: int,
    task_settings: Values,
) -> None:
    """Refuse what can be refused before a model is loaded."""
    if not models:
        raise RequestError("no model is named.")
    if twice := [model for model in models if models.count(model) > 1]:
        raise RequestError(f"{_name(twice[0])} is named twice.")
    for name, value, least in (("batch_size", batch_size, 1), ("new_tokens", new_tokens, 2)):
        if value < least:
            raise RequestError(f"{name} is {value}; it must be at least {least}.")
    if data is None and not tasks and not speed:
        raise RequestError("there is nothing to evaluate on; name texts (data), tasks, or speed.")
    if speed and not all(isinstance(model, Source) for model in models):
        raise RequestError("speed is measured in a process of its own; name folders or ids in place of loaded models.")
    inspect.signature(run_tasks).bind_partial(**task_settings)  # a setting that is none
    if tasks:
        check_tasks(tasks, task_settings.get("include", ()), task_settings.get("allow_code", False))
    sizes = [text_config(model.config).vocab_size for model in models]
    if data is not None and len(set(sizes)) > 1:
        told = ", ".join(f"{_name(model)} {size}" for model, size in zip(models, sizes, strict=True))
        raise RequestError(f"models of different vocabularies cannot be compared on the same tokens: {told}.")
    if data is not None and len(models) > 1:
        _check_same_tokens(models)


def _check_forms(models: Sequence[Source | PreTrainedModel]) -> None:
    """Refuse what transformers would open with random experts: those of an MLX folder have other names."""
    for model in models:
        form = form_of(model.name_or_path) if isinstance(model, Source) else None
        if form is not None and form in (GGUF_FILE, MLX_FOLDER):
            raise RequestError(
                f"{_name(model)} is {form.name}, and models are judged in transformers; judge the transformers "
                "checkpoint that the same plan makes of the original."
            )


def _check_draft(
    draft: bool,
    draft_tokens: int | None,
    data: CalibrationInput | None,
    reference: Source | PreTrainedModel | None,
    new_tokens: int,
) -> None:
    if draft and (data is None or reference is None):
        raise RequestError(
            "a draft is measured on texts, beside the model that it drafts for: name data, and reference."
        )
    if draft_tokens is not None and (not draft or draft_tokens < 1):
        raise RequestError(f"draft_tokens is {draft_tokens}; it is for draft, and at least 1.")
    if draft and reference is not None and (most := sample_length(new_tokens + 1, reference.config)) <= new_tokens:
        raise RequestError(
            f"new_tokens is {new_tokens}, and the reference was made for texts of {most} tokens; ask for "
            f"{most - 1} or fewer."
        )


def _check_constants(models: Sequence[Source | PreTrainedModel]) -> None:
    """Refuse to time what runs elsewhere: here it is calculated with zeros for experts that were left out."""
    for model in models:
        if isinstance(model, Source) and substituted_in(model.config):
            raise RequestError(
                f"speed and drafts are those of transformers, and {_name(model)} holds experts that answer with a "
                f"constant, which run in {READER}; measure it there."
            )


def _check_same_tokens(models: Sequence[Source | PreTrainedModel]) -> None:
    """Refuse models whose tokenizers say different things by the same numbers; single tokens may be others."""
    tokenizers = {_name(model): _tokenizer(model) for model in models}
    vocabularies = {name: tokenizer.get_vocab() for name, tokenizer in tokenizers.items() if tokenizer is not None}
    first, *others = vocabularies or [""]
    for other in others:
        shared = vocabularies[first].keys() | vocabularies[other].keys()
        same = sum(vocabularies[first].get(token) == vocabularies[other].get(token) for token in shared)
        if same < _SAME_TOKENS * len(shared):
            raise RequestError(
                f"the tokenizers of {first} and {other} give the same numbers to different tokens ({same} of "
                f"{len(shared)} agree); models cannot be compared on the same tokens then."
            )


def _source(model: AnyModel) -> Source | PreTrainedModel:
    return Source(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else plain_model(model)


def _name(model: Source | PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _tokenizer(model: Source | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    if isinstance(model, Source):
        return model.tokenizer
    return Source(model.name_or_path).tokenizer if model.name_or_path else None


def _plan(model: Source | PreTrainedModel) -> PruningPlan | None:
    """The plan that made a model, where its folder holds one."""
    source = model if isinstance(model, Source) else Source(model.name_or_path or "")
    if not isinstance(model, Source) and not source.is_local:
        return None
    try:
        return source.stored_plan()
    except (RequestError, OSError, ValueError) as error:  # the model can be judged without it
        logger.warning("whether %s was calibrated on these texts is not known: %s", source.name_or_path, error)
        return None


def _labels(models: Sequence[Source | PreTrainedModel]) -> list[str]:
    """A short name for each model, as results are published by: its last part, with a number where that is taken."""
    labels: list[str] = []
    for path in map(_name, models):
        name = label = Path(path).resolve().name if Path(path).exists() else path.rpartition("/")[2]
        number = 2
        while label in labels:
            label, number = f"{name} ({number})", number + 1
        labels.append(label)
    return labels
