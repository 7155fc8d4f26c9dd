# SPDX-License-Identifier: Apache-2.0
"""``plan``: choose experts from saved statistics."""

from __future__ import annotations

import argparse

from optimum.commands.base import CommandInfo

from . import flags
from .base import Command, Result


class PlanCommand(Command):
    COMMAND = CommandInfo("plan", "choose experts from saved statistics")
    shows_bars = True

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stats", required=True, metavar="STATS_DIR", help="statistics that score saved")
        flags.add_recipe(parser)
        parser.add_argument(
            "--sensitivity", metavar="FILE", help="with --allocation sensitivity: what the command sensitivity wrote"
        )
        flags.add_settings(parser, ["seed", "mtp"])
        flags.add_common(parser, "PLAN.json", "file of the plan")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..plan import PruningPlan
        from ..planning.build import build_plan
        from ..planning.sensitivity import Sensitivity
        from ..statistics.stats import CalibrationStats
        from ..storage.files import check_file
        from .publishing import result_of_plan

        target = check_file(args.output, ".json", args.overwrite, PruningPlan.load)
        config = flags.recipe(args)
        config.require_budget()
        weights = flags.domain_weights(args)
        sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
        plan = build_plan(CalibrationStats.load(args.stats), config, weights, sensitivity)
        plan.save(target)
        return result_of_plan(plan, args.output)
