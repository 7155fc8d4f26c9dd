# SPDX-License-Identifier: Apache-2.0
"""What every command does: its work, its result on standard output, its errors in one line, its exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import traceback
from typing import ClassVar

from optimum.commands.base import BaseOptimumCLICommand

from ..errors import MoEPruneError, RequestError
from ..progress import printed_lines, shows_bars
from ..storage.kept import kept_sentence
from ..storage.values import Json
from .interrupts import GOES_ON, exit_code, kept_of, raised_signals, said_of

Result = tuple[str, Json]
"""What is printed for people, and with ``--json``."""


class Command(BaseOptimumCLICommand):
    """A command that does its work and ends the process with its exit code.

    Attributes:
        shows_bars: Whether libraries may show progress bars off a terminal as well.
    """

    shows_bars: ClassVar[bool] = False

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        """Do what was asked for."""
        raise NotImplementedError

    def run(self) -> None:
        sys.exit(execute(type(self), self.args))


def execute(command: type[Command], args: argparse.Namespace) -> int:
    """Do the work of a command and print its result; the exit code."""
    with raised_signals(), printed_lines(sys.stderr):
        return _executed(command, args)


def _executed(command: type[Command], args: argparse.Namespace) -> int:
    before = kept_of(args)
    try:
        if not shows_bars() and not command.shows_bars:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        text, values = command.work(args)
    except KeyboardInterrupt as error:
        if args.debug:
            traceback.print_exc()
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(said_of(error, args), file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        name = "" if isinstance(error, MoEPruneError) else f"{type(error).__name__}: "
        kept = kept_of(args)
        more = f" {kept_sentence(kept, args.output)}; {GOES_ON}." if kept and kept != before else ""
        print(f"error: {name}{as_flags(str(error))}{more}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    print(json.dumps(values) if args.json else text)
    return 0


def as_flags(message: str) -> str:
    """A message of the library, which speaks of arguments, in the words of the command line."""
    switches = r"\b(?:overwrite|restart|standalone|stream|allow_code|skip_bad)=True\b"
    settings = r"^(?:batch_size|new_tokens|num_fewshot|gen_kwargs|base_model|license|language)(?= is )"
    message = re.sub(
        f"{switches}|{settings}", lambda found: f"--{found[0].removesuffix('=True').replace('_', '-')}", message
    )
    message = message.replace("text_column", "--text-column").replace("template_args", "--template-arg")
    return re.sub(r"\b(device|dtype)='([^']*)'", r"--\1 \2", message)
