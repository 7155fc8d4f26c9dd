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
from typing import TYPE_CHECKING, Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..errors import MoEPruneError, RequestError
from .arguments import (
    add_calibration,
    add_common,
    add_device,
    add_dtype,
    add_evaluation,
    add_grid,
    add_method,
    add_model,
    add_publishing,
    add_report,
    add_seed,
    add_sensitivity,
    add_streaming,
    add_writing,
    domain_weights,
    recipe,
)
from .inputs import calibration_samples, check_device, hub_settings
from .results import (
    check_finish,
    check_memory,
    evaluate_command,
    export_command,
    finish,
    report_command,
    sensitivity_command,
)

if TYPE_CHECKING:
    from ..plan import PruningPlan

# ------------------------------------------------------------------------------------------- the work


def _run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..methods import BY_SENSITIVITY
    from ..planning.build import plan_needs
    from ..planning.sensitivity import Sensitivity
    from ..pruner import MoEPruner
    from ..storage.folders import check_target

    check_target(args.output, args.overwrite, [args.model])
    check_finish(args)
    config = recipe(args)
    weights = domain_weights(args)
    check_device(args.device)
    pruner = MoEPruner.from_pretrained(args.model, config, **hub_settings(args))
    check_memory(args, pruner)
    if args.sensitivity is not None:
        pruner.sensitivity = Sensitivity.load(args.sensitivity)
        if config.allocates == BY_SENSITIVITY:
            pruner.sensitivity.of(config, pruner.layout().facts(), weights)
    measures = config.allocates == BY_SENSITIVITY and pruner.sensitivity is None
    pruner.prune_checkpoint(
        args.output,
        calibration=calibration_samples(args, pruner) if measures or plan_needs(config) else None,
        domain_weights=weights,
        stream=args.stream,
        dtype=args.dtype,
        device=args.device,
        restart=args.restart,
        **_writing(args),
    )
    return _written(pruner, args)


def _score(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..calibration.calibrate import calibrate_checkpoint
    from ..checkpoints.source import load_model_config
    from ..planning.build import plan_needs
    from ..pruner import MoEPruner
    from ..statistics.stats import Need
    from ..storage.folders import check_target, working_on
    from ..storage.growing import calibration_folder

    check_target(args.output, args.overwrite, [args.model])
    every = args.method == "all" or (args.method is None and not args.config)
    # A recipe checks the calibration's settings and knows their defaults; its budget is not used.
    args.method, args.sparsity = None if every else args.method, None if args.config else 0.5
    settings = recipe(args)
    needs = frozenset(Need) if every else plan_needs(settings)
    if not needs:
        raise RequestError(f"method {settings.method!r} needs no calibration, so there is nothing to score.")
    check_device(args.device)
    hub = hub_settings(args)
    pruner = MoEPruner(settings, name_or_path=args.model, model_config=load_model_config(args.model, **hub), hub=hub)
    samples = calibration_samples(args, pruner)
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
            hub=hub_settings(args),
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
    from ..plan import PruningPlan
    from ..planning.build import build_plan
    from ..planning.sensitivity import Sensitivity
    from ..statistics.stats import CalibrationStats
    from ..storage.files import check_file

    target = check_file(args.output, ".json", args.overwrite, PruningPlan.load)
    config = recipe(args)
    weights = domain_weights(args)
    sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
    plan = build_plan(CalibrationStats.load(args.stats), config, weights, sensitivity)
    plan.save(target)
    return _told(plan, args.output)


def _apply(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from ..plan import PruningPlan
    from ..pruner import MoEPruner
    from ..storage.folders import check_target

    check_target(args.output, args.overwrite, [args.model, args.plan])
    check_finish(args)
    check_device(args.device)
    pruner = MoEPruner.from_plan(PruningPlan.load(args.plan), args.model, **hub_settings(args))
    check_memory(args, pruner)
    pruner.prune_checkpoint(args.output, **_writing(args))
    return _written(pruner, args)


def _list(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if args.what == "models":
        from ..architectures.table import list_architectures

        models = list_architectures()
        return "\n".join(models), {"models": models}
    import dataclasses

    from ..methods import get_method, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    width = max(map(len, methods))
    lines, told = [], {}
    for name, method in methods.items():
        options = {f.name: f.default for f in dataclasses.fields(method.options)}
        told[name] = {
            "summary": method.summary,
            "source": method.source,
            "allocations": list(method.takes),
            "options": options,
        }
        lines.append(f"{name:<{width}}  {method.summary} [{method.source}]")
        lines.append(f"{'':<{width}}    allocation: {', '.join(method.takes)}")
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
    more, results = finish(args, pruner)
    return text + more, {**told, **results}


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
        add_sensitivity(parser)
        add_seed(parser)
        add_writing(parser)
        add_publishing(parser)
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
        add_sensitivity(parser)
        add_seed(parser)
        add_common(parser, "PLAN.json", "file of the plan")


class ApplyCommand(_Command):
    COMMAND = CommandInfo("apply", "prune a model by a plan")
    work = staticmethod(_apply)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        parser.add_argument("--plan", required=True, metavar="PLAN.json", help="the plan's file")
        add_device(parser)
        add_dtype(parser, "the evaluation")
        add_writing(parser)
        add_publishing(parser)
        add_common(parser, "OUTPUT", "folder of the pruned checkpoint, absent or empty")


class EvaluateCommand(_Command):
    COMMAND = CommandInfo("evaluate", "perplexity by domain, tasks and speed, of models or against a reference")
    work = staticmethod(evaluate_command)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser, several=True)
        add_device(parser)
        add_dtype(parser, "the models")
        add_evaluation(parser)
        add_common(parser)


class SensitivityCommand(_Command):
    COMMAND = CommandInfo("sensitivity", "how far a model can be pruned, and where: measured divergences")
    work = staticmethod(sensitivity_command)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_model(parser)
        add_device(parser)
        add_dtype(parser, "the calculation")
        add_streaming(parser)
        add_calibration(parser)
        add_method(parser, budget=False, several=True)
        add_grid(parser)
        add_seed(parser)
        add_common(parser, "OUTPUT.json", "file of the result")


class ReportCommand(_Command):
    COMMAND = CommandInfo("report", "one HTML page, and pictures, of what was chosen, why, and what it costs")
    work = staticmethod(report_command)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        add_report(parser)
        add_common(parser, "OUTPUT.html", "file of the report")


class ExportCommand(_Command):
    COMMAND = CommandInfo("export", "a plan for programs that leave experts out when they load the original")
    work = staticmethod(export_command)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--plan", required=True, metavar="PLAN.json", help="the plan's file, or a pruned checkpoint's folder"
        )
        parser.add_argument(
            "--format", default="json", metavar="F", help="json, which says everything, or riy (see export.py)"
        )
        add_common(parser, "OUTPUT.json", "the file to write")


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
    SensitivityCommand,
    ReportCommand,
    ExportCommand,
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
