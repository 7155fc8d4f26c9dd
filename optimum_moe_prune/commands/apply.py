# SPDX-License-Identifier: Apache-2.0
"""``apply``: prune a model by a plan."""

from __future__ import annotations

import argparse
from functools import partial

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from . import flags, publishing, screen
from .base import Command, Result
from .work import add_dry_run, check_apply, shown


class ApplyCommand(Command):
    COMMAND = CommandInfo("apply", "prune a model by a plan")
    examples = ("--model ./mixtral --plan plan.json ./mixtral-4",)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser)
        parser.add_argument("--plan", required=True, metavar="PLAN.json", help="the plan's file")
        flags.add_compute(parser, "the evaluation", stream=False)
        flags.add_writing(parser)
        flags.add_settings(parser, ["mtp"])
        publishing.add_publishing(parser)
        flags.add_settings(parser.add_argument_group("how --evaluate is read"), flags.READING)
        add_dry_run(parser)
        flags.add_common(parser, "OUTPUT", "folder of the pruned checkpoint, absent or empty")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..names import PLAN_NAME
        from ..plan import PruningPlan
        from ..storage.folders import check_target

        check_target(args.output, args.overwrite, [args.model, args.plan], PLAN_NAME)
        plan = PruningPlan.load(args.plan)

        from ..planning.work import plan_work
        from ..pruner import MoEPruner

        _check_reading(args)
        publishing.check_publishing(args)
        flags.compute_of(args, says=bool(args.evaluate or args.speed))
        source = flags.source_of(args)
        pruner = MoEPruner.from_plan(plan, source.name_or_path, **source.for_transformers)
        layout = pruner.layout()
        check_apply(args, plan, layout)
        publishing.check_memory(args, layout)
        texts = publishing.texts_to_judge(args)
        publishing.say_overlap(texts, pruner.pruning_plan)
        work = partial(plan_work, layout, plan=plan, mtp=args.mtp, output=args.output)
        if (result := shown(args, work)) is not None:
            return result
        with screen.notes_kept(args.json) as printed:
            pruner.prune_checkpoint(
                args.output,
                max_shard_size=args.max_shard_size,
                overwrite=args.overwrite,
                standalone=args.standalone,
                mtp=args.mtp,
                processes=getattr(args, "processes", None),
                **publishing.for_card(args),
            )
        return publishing.result_of_checkpoint(args, pruner, texts, printed)


def _check_reading(args: argparse.Namespace) -> None:
    """Refuse flags that say how texts are read, where none are.

    Raises:
        RequestError: Naming one.
    """
    if not args.evaluate and (idle := flags.given_reading(args)):
        raise RequestError(f"{idle[0]} is for --evaluate, and none is named.")
