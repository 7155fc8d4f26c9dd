# SPDX-License-Identifier: Apache-2.0
"""``apply``: prune a model by a plan."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from ..config import MoEPrunerConfig
from ..errors import RequestError
from . import flags, forms, publishing, screen
from .base import Command, Result
from .work import add_dry_run, check_apply, shown

if TYPE_CHECKING:
    from ..plan import PruningPlan
    from ..statistics.stats import CalibrationStats


class ApplyCommand(Command):
    COMMAND = CommandInfo("apply", "prune a model by a plan")
    examples = (
        "--model ./mixtral --plan plan.json ./mixtral-4",
        "--model mixtral.Q4_K_M.gguf --plan plan.json mixtral-4.Q4_K_M.gguf",
        "--model ./mixtral --plan plan.json --substitute --stats ./stats ./mixtral-constant",
    )
    any_form = True

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser, any_form=ApplyCommand.any_form)
        parser.add_argument("--plan", required=True, metavar="PLAN.json", help="the plan's file")
        flags.add_compute(parser, "the recovery and the evaluation")
        flags.add_writing(parser)
        parser.add_argument("--stats", metavar="STATS_DIR", help="with --substitute: statistics with mean outputs")
        flags.add_settings(parser, ["mtp", *flags.TARGET])
        group = parser.add_argument_group("recovery")
        flags.add_settings(group, flags.RECOVERY)
        group.add_argument(
            "--calibration",
            action="append",
            metavar="FILE",
            help="texts to recover with; may be repeated",
        )
        flags.add_settings(group, ["max_length", "batch_size", "seed"])
        publishing.add_publishing(parser)
        flags.add_settings(parser.add_argument_group("how texts are read"), flags.READING)
        add_dry_run(parser)
        flags.add_common(parser, "OUTPUT", "folder of the pruned checkpoint, absent or empty; of a GGUF file a file")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..formats import form_of
        from ..names import PLAN_NAME
        from ..plan import PruningPlan
        from ..storage.folders import check_target

        if (form := form_of(args.model)) is not None:
            return forms.cut(args, form, ApplyCommand)
        check_target(args.output, args.overwrite, [args.model, args.plan], PLAN_NAME)
        plan = PruningPlan.load(args.plan)

        from ..planning.for_target import with_target
        from ..planning.work import plan_work
        from ..pruner import MoEPruner
        from .inputs import recovery_samples

        plan = with_target(plan, args.target, args.parallel_size)
        recipe, stats = _recipe(args, plan), _statistics(args)
        _check_reading(args)
        publishing.check_publishing(args, bool(args.substitute))
        compute = flags.compute_of(args, says=bool(args.evaluate or args.speed or args.recover))
        source = flags.source_of(args)
        pruner = MoEPruner.from_plan(plan, source.name_or_path, recipe, **source.for_transformers)
        layout, pruner.stats = pruner.layout(), stats
        check_apply(args, plan, layout, bool(args.substitute))
        publishing.check_memory(args, layout)
        texts = publishing.texts_to_judge(args)
        recovery = recovery_samples(args, pruner)
        publishing.say_overlap(texts, pruner.pruning_plan, recovery)
        settings = {"mtp": args.mtp, "output": args.output, "compute": compute, "recovery": recovery}
        settings |= {"standalone": args.standalone}
        work = partial(plan_work, layout, recipe, plan=plan, **settings)
        if (result := shown(args, work)) is not None:
            return result
        with screen.notes_kept(args.json) as printed:
            pruner.prune_checkpoint(
                args.output,
                recovery=recovery,
                restart=args.restart,
                max_shard_size=args.max_shard_size,
                overwrite=args.overwrite,
                standalone=args.standalone,
                mtp=args.mtp,
                **publishing.for_card(args),
                **vars(compute),
            )
        return publishing.result_of_checkpoint(args, pruner, texts, printed)


def _recipe(args: argparse.Namespace, plan: PruningPlan) -> MoEPrunerConfig | None:
    """The plan's recipe with the recovery that is asked for, or with constants for experts; None where neither is.

    Raises:
        RequestError: If flags of a recovery stand without it, or it has no texts; or it is to be done beside experts
            that answer with constants.
    """
    names = (*flags.RECOVERY, "max_length", "batch_size", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.recover is None:
        idle = [f"--{name.replace('_', '-')}" for name in given] + ["--calibration"] * bool(args.calibration)
        if idle:
            raise RequestError(f"{idle[0]} is for --recover, and nothing is to be recovered.")
        if not args.substitute:
            return None
        target = {name: value for name in flags.TARGET if (value := getattr(args, name)) is not None}
        return MoEPrunerConfig.from_dict(plan.config, substitute=True, recover=(), **target)
    if not args.calibration:
        raise RequestError("--recover needs texts; name a file (--calibration FILE).")
    given |= {"text_column": args.text_column, "template_args": flags.template_args(args.template_args)}
    given["substitute"] = bool(args.substitute)
    return MoEPrunerConfig.from_dict(plan.config, **given, skip_bad=bool(args.skip_bad))


def _statistics(args: argparse.Namespace) -> CalibrationStats | None:
    """Those that ``--substitute`` takes; None where it is not given.

    Raises:
        RequestError: If one of ``--substitute`` and ``--stats`` stands without the other, or they lack what it takes.
    """
    if not args.substitute:
        if args.stats is not None:
            raise RequestError("--stats is for --substitute: a plan is applied without statistics.")
        return None
    if args.stats is None:
        raise RequestError("--substitute needs statistics with mean outputs; name them (--stats STATS_DIR).")
    from ..statistics.mean_outputs import check_mean_outputs
    from ..statistics.stats import CalibrationStats

    stats = CalibrationStats.load(args.stats)
    check_mean_outputs(stats)
    return stats


def _check_reading(args: argparse.Namespace) -> None:
    """Refuse flags that say how texts are read, where none are.

    Raises:
        RequestError: Naming one.
    """
    if not args.evaluate and not args.recover and (idle := flags.given_reading(args)):
        raise RequestError(f"{idle[0]} is for --evaluate and --recover, and neither is named.")
