# SPDX-License-Identifier: Apache-2.0
"""The command line: ``optimum-cli moe-prune ...`` and ``python -m optimum_moe_prune ...``; one file for each command.

Exit codes: 0 on success, 2 for a wrong request (nothing was written), 1 for a failure while running. Nothing heavy is
imported before a command runs, so that help is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .apply import ApplyCommand
from .base import Command
from .compare import CompareCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .list import ListCommand
from .parsing import CommandsParser, add_general, describe, in_our_way
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
    CompareCommand,
    SensitivityCommand,
    ReportCommand,
    ExportCommand,
    ListCommand,
)
INFOS = tuple(CommandInfo(c.COMMAND.name, c.COMMAND.help, subcommand_class=c) for c in COMMANDS)
EXAMPLES = (
    "list models",
    "run --model ./mixtral --calibration texts.jsonl --num-experts 4 ./mixtral-4",
    "run --help",
)
"""To begin with: is a model known, prune one, see what else there is."""


class MoEPruneCommand(BaseOptimumCLICommand):
    """``optimum-cli moe-prune``."""

    COMMAND = CommandInfo("moe-prune", "Remove whole experts from Mixture-of-Experts models.")
    SUBCOMMANDS = INFOS

    def __init__(self, *settings: Any, **named: Any) -> None:
        super().__init__(*settings, **named)
        describe(self.parser, self.COMMAND.help, EXAMPLES)

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        # optimum makes this parser, before it asks what belongs into it; it takes no other class.
        parser.__class__ = CommandsParser
        in_our_way(parser)
        add_general(parser, parser.add_argument_group("general"))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """``python -m optimum_moe_prune``."""
    parser = CommandsParser(prog="python -m optimum_moe_prune")
    add_general(parser, parser.add_argument_group("general"))
    subparsers = parser.add_subparsers()
    for info in INFOS:
        assert info.subcommand_class is not None
        info.subcommand_class(subparsers, command=info)
    describe(parser, MoEPruneCommand.COMMAND.help, EXAMPLES)
    args = parser.parse_args(argv)
    args.func(args).run()
    sys.exit(0)
