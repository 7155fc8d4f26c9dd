# SPDX-License-Identifier: Apache-2.0
"""``report``: one HTML page, and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from . import flags
from .base import Command, Result


class ReportCommand(Command):
    COMMAND = CommandInfo("report", "one HTML page, and pictures, of what was chosen, why, and what it costs")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stats", metavar="STATS_DIR", help="statistics that score saved")
        parser.add_argument(
            "--plan",
            action="append",
            default=[],
            metavar="PLAN.json",
            help="a plan, or a pruned checkpoint's folder; may be repeated",
        )
        parser.add_argument("--sensitivity", metavar="FILE", help="what the command sensitivity wrote")
        parser.add_argument("--evaluation", metavar="FILE", help="what evaluate --output wrote")
        parser.add_argument("--title", help="of the page")
        parser.add_argument("--pictures", metavar="DIR", help="folder of the pictures (default: OUTPUT_pictures)")
        flags.add_common(parser, "OUTPUT.html", "file of the report")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..evaluation.comparison import Comparison
        from ..plan import PruningPlan
        from ..planning.sensitivity import Sensitivity
        from ..publishing.report import write_report
        from ..statistics.stats import CalibrationStats

        target = Path(args.output)
        if target.suffix != ".html":
            raise RequestError(f"the report's file must end in .html, and is {args.output}.")
        plans: dict[str, PruningPlan] = {}
        for path in args.plan:
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
        values = {"output": str(target), "pictures": str(pictures), "plans": list(plans)}
        return f"{target}\npictures: {pictures}", values
