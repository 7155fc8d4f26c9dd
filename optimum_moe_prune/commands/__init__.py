# SPDX-License-Identifier: Apache-2.0
"""The command line: ``optimum-cli moe-prune ...`` and ``python -m optimum_moe_prune ...``; one file for each command.

Exit codes: 0 on success, 2 for a wrong request (nothing was written), 1 for a failure while running. Nothing heavy is
imported before a command runs, so that help is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .apply import ApplyCommand
from .base import Command, execute
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .list import ListCommand
from .plan import PlanCommand
from .report import ReportCommand
from .run import RunCommand
from .score import ScoreCommand
from .sensitivity import SensitivityCommand

COMMANDS: tuple[type[Command], ...] = (
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
        subparser.set_defaults(command=command)
    args = parser.parse_args(argv)
    sys.exit(execute(args.command, args))
