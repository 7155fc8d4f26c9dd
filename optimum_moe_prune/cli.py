# SPDX-License-Identifier: Apache-2.0
"""The command line: ``optimum-cli moe-prune ...`` and ``python -m optimum_moe_prune ...``.

Exit codes: 0 on success, 2 for a wrong request (nothing was written), 1 for a failure while running. Nothing heavy is
imported before a command runs, so that help is fast.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .arguments import (
    add_calibration,
    add_common,
    add_device,
    add_dtype,
    add_method,
    add_model,
    add_seed,
    add_streaming,
    add_writing,
    domain_weights,
    recipe,
)
from .errors import MoEPruneError, RequestError

if TYPE_CHECKING:
    from .plan import PruningPlan

# ------------------------------------------------------------------------------------------- the work


def _hub(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say about the Hub, for the calls that take it."""
    given = {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code or None}
    return {key: value for key, value in given.items() if value is not None}


def _load_model(args: argparse.Namespace, path: str | None = None) -> Any:
    """The model at ``path`` (by default ``--model``); its architecture is checked before its weights are read."""
    from transformers import AutoModelForCausalLM

    from .source import load_model_config

    path = path or args.model
    hub = _hub(args)
    if path != args.model:
        hub.pop("revision", None)  # the revision is one of --model
    load_model_config(path, **hub)
    return AutoModelForCausalLM.from_pretrained(path, dtype=args.dtype, device_map=args.device, **hub)


def _samples(args: argparse.Namespace, pruner: Any) -> Any:
    """The calibration samples the arguments name, their tokens checked against the model's vocabulary."""
    from .calibration import hub_records

    sources = args.calibration or []
    if not sources:
        raise RequestError("a calibration is needed; name a file (--calibration FILE).")
    hub = [source.removeprefix("hub:") for source in sources if source.startswith("hub:")]
    files = [Path(source) for source in sources if not source.startswith("hub:")]
    if hub and files:
        raise RequestError("--calibration takes files or hub: mixtures, not both at once.")
    source: Any = [record for mixture in hub for record in hub_records(mixture)] if hub else files
    samples = pruner.samples(source)
    samples.check_vocabulary(pruner.model_config.vocab_size)
    return samples


def _check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import torch

    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise RequestError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .files import check_target
    from .plan import plan_needs
    from .pruner import MoEPruner

    check_target(args.output, args.overwrite, [args.model])
    config = recipe(args)
    weights = domain_weights(args)
    _check_device(args.device)
    pruner = MoEPruner.from_pretrained(args.model, config, **_hub(args))
    pruner.prune_checkpoint(
        args.output,
        calibration=_samples(args, pruner) if plan_needs(config) else None,
        domain_weights=weights,
        stream=args.stream,
        dtype=args.dtype,
        device=args.device,
        restart=args.restart,
        **_writing(args),
    )
    return _written(pruner, args)


def _score(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .calibrate import calibrate_checkpoint
    from .files import check_target, working_on
    from .plan import plan_needs
    from .pruner import MoEPruner
    from .resume import calibration_folder
    from .source import load_model_config
    from .stats import Need

    check_target(args.output, args.overwrite, [args.model])
    every = args.method == "all" or (args.method is None and not args.config)
    # A recipe checks the calibration's settings and knows their defaults; its budget is not used.
    args.method, args.sparsity = None if every else args.method, None if args.config else 0.5
    settings = recipe(args)
    needs = frozenset(Need) if every else plan_needs(settings)
    if not needs:
        raise RequestError(f"method {settings.method!r} needs no calibration, so there is nothing to score.")
    _check_device(args.device)
    pruner = MoEPruner(
        settings, name_or_path=args.model, model_config=load_model_config(args.model, **_hub(args)), hub=_hub(args)
    )
    samples = _samples(args, pruner)
    with working_on(args.output):
        stats = calibrate_checkpoint(
            pruner.layout(),
            samples,
            needs,
            batch_size=settings.batch_size,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            dtype=args.dtype,
            device=args.device,
            stream=args.stream,
            folder=calibration_folder(args.output),
            restart=args.restart,
            hub=_hub(args),
        )
        stats.save(args.output, args.overwrite)
        shutil.rmtree(calibration_folder(args.output), ignore_errors=True)
    told = {
        "output": args.output,
        "samples": len(samples),
        "tokens_by_domain": stats.domains,
        "kept_tokens": len(stats.token_sample),
        "needs": sorted(map(str, needs)),
        "streamed": stats.provenance["streamed"],
    }
    domains = ", ".join(f"{domain} {tokens}" for domain, tokens in stats.domains.items())
    text = f"{len(samples)} samples, {samples.num_tokens} tokens ({domains})\n"
    text += f"statistics of {len(stats.layers)} layers: {args.output}"
    return text, told


def _plan(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .plan import PruningPlan, build_plan
    from .stats import CalibrationStats

    target = Path(args.output)
    if target.suffix != ".json":
        raise RequestError(f"the plan's file must end in .json, and is {args.output}.")
    if target.exists():
        if not args.overwrite:
            raise RequestError(f"{args.output} exists; name another file, or allow replacing it (--overwrite).")
        PruningPlan.load(target)  # nothing but an earlier plan is replaced
    config = recipe(args)
    weights = domain_weights(args)
    plan = build_plan(CalibrationStats.load(args.stats), config, weights)
    plan.save(target)
    return _told(plan, args.output)


def _apply(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .files import check_target
    from .plan import PruningPlan
    from .pruner import MoEPruner

    check_target(args.output, args.overwrite, [args.model, args.plan])
    pruner = MoEPruner.from_plan(PruningPlan.load(args.plan), args.model, **_hub(args))
    pruner.prune_checkpoint(args.output, **_writing(args))
    return _written(pruner, args)


def _evaluate(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from .calibration import CalibrationSet, sample_length
    from .evaluate import evaluate
    from .pruner import MoEPruner
    from .source import load_model_config

    _check_device(args.device)
    pruner = MoEPruner(
        name_or_path=args.model, model_config=load_model_config(args.model, **_hub(args)), hub=_hub(args)
    )
    max_length = sample_length(args.max_length, pruner.model_config)
    samples = CalibrationSet.build([Path(file) for file in args.data], pruner.tokenizer, max_length=max_length)
    samples.check_vocabulary(pruner.model_config.vocab_size)
    reference = None if args.reference is None else _load_model(args, args.reference)
    result = evaluate(_load_model(args), samples, reference=reference, batch_size=args.batch_size)
    return result.summary(), {"model": args.model, "reference": args.reference, "domains": result.to_dict()}


def _list(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if args.what == "models":
        from .architectures import list_architectures

        models = list_architectures()
        return "\n".join(models), {"models": models}
    import dataclasses

    from .methods import get_method, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    width = max(map(len, methods))
    lines, told = [], {}
    for name, method in methods.items():
        options = {f.name: f.default for f in dataclasses.fields(method.options)}
        told[name] = {
            "summary": method.summary,
            "source": method.source,
            "allocations": list(method.allocations),
            "options": options,
        }
        lines.append(f"{name:<{width}}  {method.summary} [{method.source}]")
        lines.append(f"{'':<{width}}    allocation: {', '.join(method.allocations)}")
        if options:
            lines.append(f"{'':<{width}}    options: " + ", ".join(f"{key}={value}" for key, value in options.items()))
    return "\n".join(lines), {"methods": told}


def _writing(args: argparse.Namespace) -> dict[str, Any]:
    """How a checkpoint is written."""
    return {"overwrite": args.overwrite, "standalone": args.standalone, "max_shard_size": args.max_shard_size}


def _written(pruner: Any, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What is said of a pruned checkpoint."""
    text, told = _told(pruner.pruning_plan, args.output)
    if pruner.pruning_plan.uniform_num_experts is None:
        text += "\nIts layers keep different numbers of experts: import optimum_moe_prune before loading it"
        text += ", or pass trust_remote_code=True." if args.standalone else "."
    elif args.standalone:
        text += "\nAll layers keep the same number of experts: plain transformers loads it, --standalone adds nothing."
    return text, told


def _told(plan: PruningPlan | None, output: str) -> tuple[str, dict[str, Any]]:
    """What is said of a plan that was made or applied."""
    assert plan is not None
    told = {"output": output, "method": plan.method, "sparsity": plan.sparsity, "num_experts": plan.num_experts}
    return f"{plan.summary()}\n{output}", told


# ------------------------------------------------------------------------------------------- the commands


def execute(work: Callable[[argparse.Namespace], tuple[str, dict[str, Any]]], args: argparse.Namespace) -> int:
    """Do the work of a command and print what it tells; the exit code."""
    try:
        if not sys.stderr.isatty() and work is not _list and work is not _plan:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        text, told = work(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        name = "" if isinstance(error, MoEPruneError) else f"{type(error).__name__}: "
        print(f"error: {name}{error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    print(json.dumps(told) if args.json else text)
    return 0


class _Command(BaseOptimumCLICommand):
    """A command that does its work and ends the process with its exit code."""

    work: Callable[[argparse.Namespace], tuple[str, dict[str, Any]]]

    def run(self) -> None:
        sys.exit(execute(type(self).work, self.args))


class RunCommand(_Command):
    COMMAND = CommandInfo("run", "calibrate, choose experts, and write the pruned checkpoint")
    work = staticmethod(_run)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_device(parser)
        add_dtype(parser, "the calibration; what is written keeps the checkpoint's")
        add_streaming(parser)
        add_calibration(parser)
        add_method(parser)
        add_seed(parser)
        add_writing(parser)
        add_common(parser, "OUTPUT", "folder of the pruned checkpoint, absent or empty")


class ScoreCommand(_Command):
    COMMAND = CommandInfo("score", "calibrate once and save the statistics")
    work = staticmethod(_score)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_device(parser)
        add_dtype(parser, "the calibration")
        add_streaming(parser)
        add_calibration(parser)
        add_method(parser, budget=False)
        add_seed(parser)
        add_common(parser, "STATS_DIR", "folder of the statistics, absent or empty")


class PlanCommand(_Command):
    COMMAND = CommandInfo("plan", "choose experts from saved statistics")
    work = staticmethod(_plan)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stats", required=True, metavar="STATS_DIR", help="statistics that score saved")
        add_method(parser)
        add_seed(parser)
        add_common(parser, "PLAN.json", "file of the plan")


class ApplyCommand(_Command):
    COMMAND = CommandInfo("apply", "prune a model by a plan")
    work = staticmethod(_apply)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        parser.add_argument("--plan", required=True, metavar="PLAN.json", help="the plan's file")
        add_writing(parser)
        add_common(parser, "OUTPUT", "folder of the pruned checkpoint, absent or empty")


class EvaluateCommand(_Command):
    COMMAND = CommandInfo("evaluate", "perplexity by domain, of a model or against a reference")
    work = staticmethod(_evaluate)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_device(parser)
        add_dtype(parser, "the models")
        parser.add_argument(
            "--reference", metavar="DIR|ID", help="the model to compare with, usually the unpruned one"
        )
        parser.add_argument(
            "--data", required=True, action="append", metavar="FILE", help=".jsonl or .txt; may be repeated"
        )
        parser.add_argument(
            "--batch-size", type=int, default=8, metavar="B", help="samples in a forward pass (default 8)"
        )
        parser.add_argument(
            "--max-length", type=int, default=2048, metavar="L", help="cut samples to this many tokens (default 2048)"
        )
        add_common(parser)


class ListCommand(_Command):
    COMMAND = CommandInfo("list", "the known methods or models")
    work = staticmethod(_list)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("what", choices=("methods", "models"))
        add_common(parser)


COMMANDS: tuple[type[_Command], ...] = (
    RunCommand,
    ScoreCommand,
    PlanCommand,
    ApplyCommand,
    EvaluateCommand,
    ListCommand,
)


class MoEPruneCommand(BaseOptimumCLICommand):
    """``optimum-cli moe-prune``."""

    COMMAND = CommandInfo("moe-prune", "Remove whole experts from Mixture-of-Experts models.")
    SUBCOMMANDS = tuple(CommandInfo(c.COMMAND.name, c.COMMAND.help, subcommand_class=c) for c in COMMANDS)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """``python -m optimum_moe_prune``."""
    parser = argparse.ArgumentParser(prog="python -m optimum_moe_prune", description=MoEPruneCommand.COMMAND.help)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.COMMAND.name, help=command.COMMAND.help)
        command.parse_args(subparser)
        subparser.set_defaults(work=command.work)
    args = parser.parse_args(argv)
    sys.exit(execute(args.work, args))
