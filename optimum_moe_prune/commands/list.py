# SPDX-License-Identifier: Apache-2.0
"""``list``: the known methods or models."""

from __future__ import annotations

import argparse
import dataclasses

from optimum.commands.base import CommandInfo

from . import flags
from .base import Command, Result


class ListCommand(Command):
    COMMAND = CommandInfo("list", "the known methods or models")
    shows_bars = True

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("what", choices=("methods", "models"))
        flags.add_common(parser)

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        return _models() if args.what == "models" else _methods()


def _models() -> Result:
    from ..architectures import list_architectures

    models = list_architectures()
    others = "Others are found out by trying the model, where a rule that is known fits its routers."
    return "\n".join([*models, "", others]), {"models": models}


def _methods() -> Result:
    from ..methods import get_method, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    width = max(map(len, methods))
    lines, values = [], {}
    for name, method in methods.items():
        options = {setting.name: setting.default for setting in dataclasses.fields(method.options)}
        values[name] = {
            "summary": method.summary,
            "source": method.source,
            "allocations": list(method.takes),
            "options": options,
        }
        lines.append(f"{name:<{width}}  {method.summary} [{method.source}]")
        lines.append(f"{'':<{width}}    allocation: {', '.join(method.takes)}")
        if options:
            lines.append(f"{'':<{width}}    options: " + ", ".join(f"{key}={value}" for key, value in options.items()))
    return "\n".join(lines), {"methods": values}
