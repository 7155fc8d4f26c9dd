# SPDX-License-Identifier: Apache-2.0
"""``export``: a plan for programs that leave experts out when they load the original."""

from __future__ import annotations

import argparse

from optimum.commands.base import CommandInfo

from . import flags
from .base import Command, Result


class ExportCommand(Command):
    COMMAND = CommandInfo("export", "a plan for programs that leave experts out when they load the original")
    examples = ("--plan plan.json served.json",)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--plan", required=True, metavar="PLAN.json", help="the plan's file, or a pruned checkpoint's folder"
        )
        parser.add_argument("--format", default="json", metavar="F", help="json, which says everything")
        flags.add_common(parser, "OUTPUT.json", "the file to write")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..plan import PruningPlan
        from ..publishing.export import import_plan
        from ..storage.files import check_file, write_text

        text = PruningPlan.load(args.plan).export(args.format)
        target = check_file(args.output, ".json", args.overwrite, lambda path: import_plan(path.read_text()))
        write_text(target, text)
        return str(target), {"output": str(target), "format": args.format}
