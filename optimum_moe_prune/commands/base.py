# SPDX-License-Identifier: Apache-2.0
"""What every command does: its work, its result on standard output, its errors in one line, its exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterable
from typing import Any, ClassVar

from optimum.commands.base import BaseOptimumCLICommand

from ..environment import check_packages
from ..errors import MoEPruneError, RequestError
from ..processes import ALONE, Processes, cause, launch_note, launched, says
from ..progress import printed_lines, shows_bars, unseen
from ..storage.kept import kept_sentence
from ..storage.values import Json
from .interrupts import GOES_ON, exit_code, kept_of, raised_signals, said_of
from .libraries import Voice, quiet_libraries
from .parsing import Parser, describe, flags_of
from .requests import check_request, named_files
from .shown import show, show_error
from .wording import with_flags

Result = tuple[str, Json]
"""What is printed for people, and with ``--json``."""


class Command(BaseOptimumCLICommand):
    """A command that does its work and ends the process with its exit code.

    Attributes:
        examples: What may follow the command, for help; the first also where something is missing.
        shows_bars: Whether libraries may show progress bars off a terminal as well.
        shares: Whether several processes share its work; else the main one does it.
        any_form: Whether its model may be in another form than a transformers checkpoint.
    """

    shares: ClassVar[bool] = False
    any_form: ClassVar[bool] = False
    examples: ClassVar[tuple[str, ...]] = ()
    shows_bars: ClassVar[bool] = False

    def __init__(self, subparsers: Any, *settings: Any, from_defaults_factory: bool = False, **named: Any) -> None:
        super().__init__(subparsers, *settings, from_defaults_factory=from_defaults_factory, **named)
        if not from_defaults_factory:
            self.parser.siblings = subparsers.choices
            describe(self.parser, self.COMMAND.help, self.examples)

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Refuse flags that exclude one another or lack one another, before anything that they name is looked at."""

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        """Do what was asked for."""
        raise NotImplementedError

    def run(self) -> None:
        sys.exit(execute(type(self), self.args))


def execute(command: type[Command], args: argparse.Namespace) -> int:
    """Do the work of a command and print its result; the exit code.

    Of several processes that were launched all do their share of it, or the main one does it and the others end.
    """
    try:
        processes = launched()
    except RequestError as error:
        show_error(str(error))
        return 2
    if not processes.is_alone and not command.shares:
        if not processes.is_main:
            return 0
        others = "the other process ends" if processes.count == 2 else f"the other {processes.count - 1} processes end"
        print(f"{command.COMMAND.name} works in one process; {others} at once.", file=sys.stderr)
        processes = ALONE
    elif processes.is_alone and command.shares and (note := launch_note()):
        print(f"warning: {note}", file=sys.stderr)
    args.processes = processes
    shown = printed_lines(sys.stderr) if processes.is_main else unseen()
    with raised_signals(ends_at_once=processes.is_alone), shown:
        if processes.is_alone:
            return _executed(command, args, processes)
        from ..processes.meeting import leave

        code = _executed(command, args, processes)
        leave(processes, wait=code == 0)
        return code


def _executed(command: type[Command], args: argparse.Namespace, processes: Processes) -> int:
    before = kept_of(args)
    voice = None if processes.is_alone else Voice(processes)
    try:
        bars = processes.is_main and (command.shows_bars or shows_bars())
        with quiet_libraries(args.debug, bars, voice), processes.together():
            check_packages()
            command.check(args)
            check_request(args, command.any_form)
            text, values = command.work(args)
            processes.meet(None)
        _show_lines(voice)
        show(json.dumps(values) if args.json else text)
    except KeyboardInterrupt as error:
        if args.debug:
            traceback.print_exc()
        if says(processes):
            with contextlib.suppress(OSError):  # the terminal may be gone
                _show_lines(voice)
                print(_of_process(processes, said_of(error, args, cause(processes))), file=sys.stderr)
        return exit_code(error)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        kept = kept_of(args)
        more = f" {_capital(kept_sentence(kept, args.output))}; {GOES_ON}." if kept and kept != before else ""
        if isinstance(error, MoEPruneError):
            message = as_flags(str(error), command, named_files(args))
        else:
            message = f"{type(error).__name__}: {error}"
        if says(processes):
            _show_lines(voice)
            show_error(_of_process(processes, message) + more)
        return 2 if isinstance(error, RequestError) else 1
    return 0


def _show_lines(voice: Voice | None) -> None:
    """Print what other processes said."""
    for line in [] if voice is None else voice.of_others():
        print(line, file=sys.stderr)


def _of_process(processes: Processes, message: str) -> str:
    """A message with the number of the process, where that is not the main one and it is not named yet."""
    named = processes.is_main or message.startswith("process ")
    return message if named else f"process {processes.rank} of {processes.count}: {message}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def as_flags(message: str, command: type[Command] | None = None, given: Iterable[str] = ()) -> str:
    """A message of the library, which speaks of arguments, in the words of the command line.

    Args:
        message: The message.
        command: The one that was given; by default any.
        given: Names of files and folders in the command, which stay as they are.
    """
    commands = Command.__subclasses__() if command is None else [command]
    return with_flags(message, {name: flag for each in commands for name, flag in flags_by_name(each).items()}, given)


def flags_by_name(command: type[Command]) -> dict[str, tuple[str, ...]]:
    """The names of each flag of a command, by the argument it stands for."""
    parser = Parser(prog=command.COMMAND.name)
    command.parse_args(parser)
    return {action.dest: tuple(action.option_strings) for action in flags_of(parser).values()}


def terminal() -> tuple[bool, int | None]:
    """Whether standard output shows bold print, and how many characters fit in its lines; None where any do."""
    if not sys.stdout.isatty():
        return False, None
    return "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb", shutil.get_terminal_size().columns
