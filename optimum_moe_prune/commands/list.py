# SPDX-License-Identifier: Apache-2.0
"""``list``: the known methods, models, calibration presets or programs that open outputs."""

from __future__ import annotations

import argparse
import dataclasses

from optimum.commands.base import CommandInfo

from . import flags
from .base import Command, Result


class ListCommand(Command):
    COMMAND = CommandInfo("list", "the known methods, models, calibration presets or targets")
    examples = (
        "models",
        "methods --json",
    )
    shows_bars = True

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "what",
            type=flags.one_of("methods", "models", "presets", "targets"),
            metavar="methods|models|presets|targets",
            help="which of them",
        )
        parser.add_argument("--markdown", action="store_true", help="models or targets as a table in Markdown")
        flags.add_common(parser)

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        if args.what == "presets":
            return _presets()
        if args.what == "targets":
            return _targets(args.markdown)
        return _models(args.markdown) if args.what == "models" else _methods()


def _models(markdown: bool) -> Result:
    from ..architectures.overview import as_table, refused, supported

    table = as_table("`" if markdown else "")
    values = {
        "models": [support.model_type for support in supported()],
        "support": {support.model_type: dataclasses.asdict(support) for support in supported()},
        "refused": refused(),
    }
    if markdown:
        return _as_markdown(table), values
    shown = [*_aligned(table), "", "Refused:", *(f"{name}: {reason}" for name, reason in refused().items())]
    return "\n".join(shown), values


def _targets(markdown: bool) -> Result:
    from ..targets.table import TARGETS, as_table, facts_of

    table = as_table("`" if markdown else "")
    values = {"targets": {name: facts_of(target) for name, target in TARGETS.items()}}
    return _as_markdown(table) if markdown else "\n".join(_aligned(table)), values


def _as_markdown(table: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (table[0], ["---"] * len(table[0]), *table[1:]))


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]


_FIRST = "auto"
_WHY = (
    "it measures the sets of several methods on the model and keeps those that lose least; which method is best alone "
    "differs from model to model. It needs calibration texts, and runs the model on some of them many times. Where "
    "that is too much, --method mosaic chooses from one calibration. --allocation uniform keeps as many experts in "
    "every layer, which plain transformers loads."
)


def _methods() -> Result:
    from ..methods import get_method, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    methods = {_FIRST: methods.pop(_FIRST), **methods}
    width = max(map(len, methods))
    lines, values = [f"Begin with {_FIRST}, the default: {_WHY}", ""], {}
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
    return "\n".join(lines), {"methods": values, "begin_with": _FIRST, "why": _WHY}


def _presets() -> Result:
    from ..calibration.presets import PREFIX, PRESETS

    lines = []
    for name, preset in PRESETS.items():
        lines.append(f"{PREFIX}{name}: {preset.summary}")
        share = f"1/{len(preset.parts)} " if len(preset.parts) > 1 else ""
        lines += [f"    {share}{part.domain}: {part.spec}, {part.licence}" for part in preset.parts]
    lines += ["", "Licences as the datasets' cards give them; look there before you publish."]
    return "\n".join(lines), {"presets": {name: dataclasses.asdict(preset) for name, preset in PRESETS.items()}}
