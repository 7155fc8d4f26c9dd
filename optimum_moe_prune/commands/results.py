# SPDX-License-Identifier: Apache-2.0
"""The commands that judge, show and publish: ``evaluate``, ``sensitivity``, ``report``, and what follows ``run``."""

from __future__ import annotations

import argparse
import gc
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MoEPruneError, RequestError, RunError
from .arguments import domain_weights, numbers, recipe
from .inputs import calibration_samples, check_device, hub_settings

if TYPE_CHECKING:
    from ..evaluation.comparison import Comparison

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------- evaluate


def evaluate_command(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..checkpoints.source import load_model_config
    from ..evaluation.comparison import Comparison
    from ..names import EVALUATION_NAME, PLAN_NAME
    from ..publishing.card import write_card
    from ..storage.files import check_file

    check_device(args.device)
    paths = [*args.model, *([] if args.reference is None else [args.reference])]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise RequestError(f"{twice[0]} is named twice.")
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--new-tokens", args.new_tokens, 2)):
        if value < least:
            raise RequestError(f"{flag} is {value}; it must be at least {least}.")
    tasks = [name for names in args.tasks or [] for name in names.split(",")]
    if not args.data and not tasks and not args.speed:
        raise RequestError("there is nothing to evaluate on; name texts (--data FILE), --tasks or --speed.")
    if args.revision is not None and len(args.model) > 1:
        raise RequestError("--revision is for one model, and several are named.")
    if args.json and args.markdown:
        raise RequestError("--json and --markdown exclude each other.")
    if args.update_card:
        for folder in args.model:
            if not (Path(folder) / PLAN_NAME).is_file():
                raise RequestError(f"--update-card: {folder} is no folder of a checkpoint that this package pruned.")
        if len(args.model) > 1 or args.reference is None:
            raise RequestError("--update-card takes one pruned model, and --reference, the original.")
    if tasks:
        from ..evaluation.tasks import check_tasks

        check_tasks(tasks, args.task_include or (), args.allow_code)
    if args.output is not None:
        check_file(args.output, ".json", args.overwrite, _is_evaluation)
    args.revision_of = args.model[0]
    sizes = {path: load_model_config(path, **_hub_of(args, path)).get_text_config().vocab_size for path in paths}
    if args.data and len(set(sizes.values())) > 1:
        told = ", ".join(f"{path} {size}" for path, size in sizes.items())
        raise RequestError(f"models of different vocabularies cannot be compared on the same tokens: {told}.")
    comparison = compare(args, args.model, args.reference, tasks)
    if args.output is not None:
        comparison.save(args.output)
    if args.update_card:
        folder = Path(args.model[0])
        earlier = folder / EVALUATION_NAME
        whole = Comparison.load(earlier).updated(comparison) if earlier.is_file() else comparison
        whole.save(earlier)
        write_card(folder, folder.resolve().name)
    return comparison.markdown() if args.markdown else comparison.summary(), comparison.to_dict()


def compare(
    args: argparse.Namespace, models: Sequence[str], reference: str | None, tasks: Sequence[str] = ()
) -> Comparison:
    """Evaluate models, one of them in memory at a time beside the reference.

    Args:
        args: The settings: data, batch_size, max_length, speed, new_tokens, dtype, device, and those of tasks.
        models: Their folders or Hub ids.
        reference: That of the model to compare with.
        tasks: Tasks to run on each, the reference included.
    """
    from ..evaluation.comparison import Comparison, ModelResult, reference_of
    from ..evaluation.losses import evaluate

    labels = _labels([*models, *([] if reference is None else [reference])])
    texts = _texts(args, models[0])
    original = None if reference is None else _loaded(args, reference)
    results: dict[str, ModelResult] = {}
    last = None
    for path in models:
        model = _loaded(args, path)
        if texts is not None:
            last = evaluate(model, texts, reference=original, batch_size=args.batch_size)
        results[labels[path]] = _result(args, path, model, last, tasks)
        del model
        gc.collect()
    if reference is not None:
        known = None if last is None else reference_of(last)
        results[labels[reference]] = _result(args, reference, original, known, tasks)
    del original
    gc.collect()  # before other processes need the memory
    if args.speed:
        from dataclasses import replace

        from ..evaluation.speed import measure_generation

        for path, label in labels.items():
            try:
                generation = measure_generation(
                    path, new_tokens=args.new_tokens, dtype=args.dtype, device=args.device, **_hub_of(args, path)
                )
            except RunError as error:  # what was evaluated before is not lost for it
                logger.warning("%s", error)
                continue
            results[label] = replace(results[label], generation=generation)
    return Comparison(results, None if reference is None else labels[reference], _settings(args, texts))


def _settings(args: argparse.Namespace, texts: Any) -> dict[str, Any]:
    """How it was measured, for who reads the results later."""
    from ..provenance import versions

    found: dict[str, Any] = {}
    if texts is not None:
        found["text"] = ", ".join(texts.sources)
        found["samples_fingerprint"] = texts.fingerprint[:12]
        found["max_length"] = args.max_length
    found |= {"dtype": args.dtype, "device": args.device}
    known = versions()
    return found | {name: known[name] for name in ("transformers", "torch") if name in known}


def _result(args: argparse.Namespace, path: str, model: Any, evaluation: Any, tasks: Sequence[str]) -> Any:
    from dataclasses import replace

    from ..evaluation.comparison import ModelResult

    result = ModelResult() if model is None else ModelResult.of(model, evaluation)
    if tasks:
        from ..evaluation.tasks import run_tasks

        scores = run_tasks(
            model,
            _bound(args, path).tokenizer,
            tasks,
            include=args.task_include or (),
            limit=args.task_limit,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            allow_code=args.allow_code,
        )
        result = replace(result, tasks=scores)
    return result


def _loaded(args: argparse.Namespace, path: str) -> Any:
    """A model, where anything is to be done with it in this process."""
    from transformers import AutoModelForCausalLM

    if not args.data and not args.tasks:
        return None
    hub = _hub_of(args, path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, device_map=args.device, **hub)


def _texts(args: argparse.Namespace, path: str) -> Any:
    """The held-out samples, by the tokenizer of a model."""
    from ..calibration.samples import CalibrationSet, sample_length

    if not args.data:
        return None
    pruner = _bound(args, path)
    max_length = sample_length(args.max_length, pruner.model_config)
    samples = CalibrationSet.build([Path(file) for file in args.data], pruner.tokenizer, max_length=max_length)
    samples.check_vocabulary(pruner.model_config.vocab_size)
    return samples


def _bound(args: argparse.Namespace, path: str) -> Any:
    from ..checkpoints.source import load_model_config
    from ..pruner import MoEPruner

    hub = _hub_of(args, path)
    return MoEPruner(name_or_path=path, model_config=load_model_config(path, **hub), hub=hub)


def _hub_of(args: argparse.Namespace, path: str) -> dict[str, Any]:
    """How a model is reached; ``--revision`` is that of the one model it is for."""
    hub = hub_settings(args)
    if path != args.revision_of:
        hub.pop("revision", None)
    return hub


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """A short name for each model, as results are published by: its last part, with a number where that is taken."""
    labels: dict[str, str] = {}
    for path in paths:
        name = label = Path(path).resolve().name if Path(path).exists() else path.rpartition("/")[2]
        number = 2
        while label in labels.values():
            label, number = f"{name} ({number})", number + 1
        labels[path] = label
    return labels


def _is_evaluation(path: Path) -> None:
    from ..evaluation.comparison import Comparison

    Comparison.load(path)


# ------------------------------------------------------------------------------------------- sensitivity


def sensitivity_command(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..calibration.calibrate import calibrate_checkpoint
    from ..calibration.in_memory import empty_stats
    from ..checkpoints.source import load_model_config
    from ..evaluation.measure_sensitivity import SPARSITIES, check_grid, measure_checkpoint
    from ..methods import list_methods
    from ..planning.build import plan_needs
    from ..planning.sensitivity import Sensitivity
    from ..pruner import MoEPruner
    from ..statistics.samples import check_domain_weights
    from ..statistics.stats import CalibrationStats
    from ..storage.files import check_file
    from ..storage.folders import working_on
    from ..storage.growing import calibration_folder, sensitivity_folder

    check_file(args.output, ".json", args.overwrite, Sensitivity.load)
    names = list(dict.fromkeys(args.method or [None if args.config else "mosaic"]))
    if "all" in names:
        names = list(list_methods())
    if len(names) > 1 and args.option:
        raise RequestError("--option is for one method, and several are named; give a recipe for each run instead.")
    configs = []
    for name in names:
        args.method, args.sparsity = name, None if args.config else 0.5  # a recipe has a budget; it is not used
        configs.append(recipe(args))
    weights = domain_weights(args)
    counts = numbers(args.counts, "--counts", int)
    sparsities = numbers(args.sparsities, "--sparsities", float)
    if sparsities is not None and not all(0 < s < 1 for s in sparsities):
        raise RequestError(f"--sparsities is {args.sparsities}; fractions of experts to remove lie between 0 and 1.")
    check_device(args.device)
    hub = hub_settings(args)
    pruner = MoEPruner(configs[0], name_or_path=args.model, model_config=load_model_config(args.model, **hub), hub=hub)
    layout = pruner.layout()
    samples = calibration_samples(args, pruner)
    if weights is not None:
        check_domain_weights(samples.samples, weights)
    for config in configs:
        check_grid(config, layout.num_experts, layout.spec.routing(layout.config), counts)
    needs = frozenset().union(*(plan_needs(config) for config in configs))
    how: dict[str, Any] = {"dtype": args.dtype, "device": args.device, "stream": args.stream, "restart": args.restart}
    with working_on(args.output):
        if args.stats is not None:
            stats = CalibrationStats.load(args.stats)
        elif needs:
            stats = calibrate_checkpoint(
                layout,
                samples,
                needs,
                batch_size=configs[0].batch_size,
                max_tokens=configs[0].max_tokens,
                seed=configs[0].seed,
                folder=calibration_folder(args.output),
                hub=hub,
                **how,
            )
        else:
            stats = empty_stats(layout.facts(), layout.num_experts, layout.spec.routing(layout.config))
        measured = measure_checkpoint(
            layout,
            samples.take(configs[0].sensitivity_samples),
            stats,
            configs,
            domain_weights=weights,
            counts=counts,
            sparsities=SPARSITIES if sparsities is None else sparsities,
            batch_size=configs[0].batch_size,
            folder=sensitivity_folder(args.output),
            hub=hub,
            **how,
        )
        measured.save(args.output)
        for folder in (calibration_folder(args.output), sensitivity_folder(args.output)):
            shutil.rmtree(folder, ignore_errors=True)
    return f"{measured.summary()}\n{args.output}", {"output": args.output, **measured.to_dict()}


# ------------------------------------------------------------------------------------------- report


def report_command(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..evaluation.comparison import Comparison
    from ..plan import PruningPlan
    from ..planning.sensitivity import Sensitivity
    from ..publishing.report import write_report
    from ..statistics.stats import CalibrationStats

    target = Path(args.output)
    if target.suffix != ".html":
        raise RequestError(f"the report's file must end in .html, and is {args.output}.")
    plans = {}
    for path in args.plan or []:
        name = Path(path).stem if Path(path).suffix == ".json" else Path(path).name
        plans[name if name not in plans else path] = PruningPlan.load(path)
    pictures = args.pictures or target.with_name(f"{target.stem}_pictures")
    write_report(
        target,
        stats=None if args.stats is None else CalibrationStats.load(args.stats),
        plans=plans,
        sensitivity=None if args.sensitivity is None else Sensitivity.load(args.sensitivity),
        evaluation=None if args.evaluation is None else Comparison.load(args.evaluation),
        title=args.title,
        overwrite=args.overwrite,
        pictures=pictures,
    )
    told = {"output": str(target), "pictures": str(pictures), "plans": list(plans)}
    return f"{target}\npictures: {pictures}", told


# ------------------------------------------------------------------------------------------- export


def export_command(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..plan import PruningPlan
    from ..publishing.export import import_plan
    from ..storage.files import check_file, write_text

    text = PruningPlan.load(args.plan).export(args.format)
    target = check_file(args.output, ".json", args.overwrite, lambda path: import_plan(path.read_text()))
    write_text(target, text)
    return str(target), {"output": str(target), "format": args.format}


# ------------------------------------------------------------------------------------------- after run and apply


def check_finish(args: argparse.Namespace) -> None:
    """Refuse what cannot be added to a pruned checkpoint, before any work.

    Raises:
        RequestError: If a file is missing, or a package.
    """
    if args.evaluate:
        _texts(_as_evaluation(args), args.model)  # whatever is wrong with them, or with the model
    if args.report:
        from ..publishing.report.canvas import require_matplotlib

        require_matplotlib()
    if args.push_to_hub is not None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise RequestError(f"--push-to-hub: {str(error).splitlines()[0]}") from error
    elif args.private:
        raise RequestError("--private is for --push-to-hub REPO.")


def check_memory(args: argparse.Namespace, pruner: Any) -> None:
    """Refuse ``--evaluate`` where original and pruned model will not fit beside each other, before any work.

    Raises:
        RequestError: With what is needed and what is free.
    """
    from ..models.memory import available_memory, model_bytes

    if not args.evaluate:
        return
    device = "cpu" if args.device == "auto" else args.device
    needed, free = 2 * model_bytes(pruner.layout(), args.dtype), available_memory(device)
    if needed > free:
        raise RequestError(
            f"--evaluate holds the original and the pruned model in memory, up to {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Leave it out, and evaluate on a larger machine (evaluate --update-card)."
        )


def finish(args: argparse.Namespace, pruner: Any) -> tuple[str, Mapping[str, Any]]:
    """Add results and report to the checkpoint a pruner wrote, and publish it; what is to be said of that.

    Raises:
        RunError: If that fails. The checkpoint is whole.
    """
    folder = Path(args.output)
    try:
        return _finished(args, pruner, folder)
    except MoEPruneError as error:
        raise RunError(
            f"the pruned checkpoint is written in {folder}, and what should follow failed: {error} Add results with "
            "evaluate --update-card, pictures with report; MoEPruner.push_to_hub(repository, folder) publishes it."
        ) from error


def _as_evaluation(args: argparse.Namespace) -> argparse.Namespace:
    """What ``evaluate`` would be asked for."""
    asked = argparse.Namespace(**vars(args))
    asked.data, asked.tasks = args.evaluate, None
    asked.speed, asked.new_tokens, asked.revision_of = True, 64, args.model
    asked.max_length, asked.batch_size = 2048, 8
    return asked


def _finished(args: argparse.Namespace, pruner: Any, folder: Path) -> tuple[str, Mapping[str, Any]]:
    from ..names import EVALUATION_NAME, REPORT_NAME, REPORT_PICTURES
    from ..publishing.card import write_card

    text, comparison = "", None
    told: dict[str, Any] = {}
    if args.evaluate:
        comparison = compare(_as_evaluation(args), [str(folder)], args.model)
        comparison.save(folder / EVALUATION_NAME)
        text += f"\n\n{comparison.summary()}"
        told["evaluation"] = comparison.to_dict()
    if args.report:
        from ..publishing.report import write_report

        write_report(
            folder / REPORT_NAME,
            stats=pruner.stats if pruner.stats is not None and pruner.stats.samples else None,
            plans={folder.name: pruner.pruning_plan},
            sensitivity=pruner.sensitivity,
            evaluation=comparison,
            pictures=folder / REPORT_PICTURES,
        )
        text += f"\n{folder / REPORT_NAME}"
        told["report"] = str(folder / REPORT_NAME)
    if args.evaluate or args.report:
        write_card(folder, folder.resolve().name)
    if args.push_to_hub is not None:
        commit = pruner.push_to_hub(args.push_to_hub, private=args.private)
        text += f"\npublished: {commit.commit_url}"
        told["commit"] = commit.commit_url
    return text, told
