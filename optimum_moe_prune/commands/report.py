# SPDX-License-Identifier: Apache-2.0
"""``report``: one HTML page, and pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from optimum.commands.base import CommandInfo

from ..errors import MoEPruneError, RequestError
from ..names import PLAN_NAME
from ..statistics.folder import header_of
from . import flags
from .base import Command, Result


class ReportCommand(Command):
    COMMAND = CommandInfo("report", "one HTML page, and pictures, of what was chosen, why, and what it costs")
    examples = (
        "--stats ./stats --plan plan.json report.html",
        "--stats ./stats --plan reap.json --plan mosaic.json report.html",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stats", metavar="STATS_DIR", help="statistics that score saved")
        parser.add_argument(
            "--plan",
            action="append",
            default=[],
            metavar="[NAME=]PLAN.json",
            help="a plan, or a pruned checkpoint's folder; may be repeated, and several are shown side by side in "
            "this order, under their names",
        )
        parser.add_argument("--sensitivity", metavar="FILE", help="what the command sensitivity wrote")
        parser.add_argument("--evaluation", metavar="FILE", help="what evaluate --output wrote")
        parser.add_argument(
            "--model",
            metavar="DIR|ID",
            help="the plans' model, or one that a plan left, to read sizes from (default: where the plans say it is)",
        )
        parser.add_argument("--title", help="of the page")
        parser.add_argument("--pictures", metavar="DIR", help="folder of the pictures (default: OUTPUT_pictures)")
        flags.add_common(parser, "OUTPUT.html", "file of the report")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..plan import PruningPlan

        target = Path(args.output)
        if target.suffix != ".html":
            raise RequestError(f"the report's file must end in .html, and is {args.output}.")
        if args.stats is not None:
            header_of(args.stats)
        paths = named_paths(args.plan)
        plans = {name: PruningPlan.load(path) for name, path in paths.items()}

        from ..evaluation.comparison import Comparison
        from ..planning.sensitivity import Sensitivity
        from ..publishing.report import write_report
        from ..statistics.stats import CalibrationStats

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
            model=args.model or _checkpoint_of(paths.values()),
        )
        values = {"output": str(target), "pictures": str(pictures), "plans": list(plans)}
        return f"{target}\npictures: {pictures}", values


def _checkpoint_of(paths: Iterable[str]) -> Path | None:
    """The first pruned checkpoint that a plan was given by, if its files can be read: sizes are found there."""
    from ..checkpoints.layout import open_layout

    for path in map(Path, paths):
        folder = path.parent if path.name == PLAN_NAME else path
        if (folder / "config.json").is_file():
            try:
                open_layout(folder)
            except (MoEPruneError, OSError, ValueError):
                continue
            return folder
    return None


def named_paths(given: Sequence[str]) -> dict[str, str]:
    """Files and folders of plans by the name they are shown under, in their order: ``NAME=PATH``, or ``PATH`` alone.

    A path without a name is called by its last part, or by as many of its parts as tell it from the others, without
    the end that all have: ``a/plan.json`` and ``b/plan.json`` are ``a`` and ``b``.

    Raises:
        RequestError: If two have the same name, or the same place and no names.
    """
    pairs = [_pair(text) for text in given]
    named = [name for name, _ in pairs if name]
    places = [_parts(path) for name, path in pairs if not name]
    if len(set(places)) > 1:
        places = [place[: len(place) - _common_end(places)] for place in places]
    unnamed = iter(places)
    found: dict[str, str] = {}
    for name, path in pairs:
        if not name:
            own = next(unnamed)
            ends = [own[-length:] for length in range(1, len(own) + 1)]
            unique = ("/".join(end) for end in ends if sum(place[-len(end) :] == end for place in places) == 1)
            name = next((text for text in unique if text not in named), "")
            if not name:
                raise RequestError(f"--plan {path} is given twice; give it once, or names (--plan NAME={path}).")
        if name in found:
            raise RequestError(f"two plans are called {name!r}; give each a name of its own (--plan NAME=PLAN.json).")
        found[name] = path
    return found


def _common_end(places: Sequence[tuple[str, ...]]) -> int:
    """How many last parts all places have in common, each of them keeping one."""
    most = min(map(len, places)) - 1
    return next((n for n in range(most) if len({place[-n - 1] for place in places}) > 1), most)


def _pair(text: str) -> tuple[str, str]:
    """The name, or none, and the path of a plan; what is there as a whole has no name."""
    name, _, path = text.partition("=")
    return (name.strip(), path) if path and name.strip() and not Path(text).exists() else ("", text)


def _parts(path: str) -> tuple[str, ...]:
    """The parts of a plan's place that may name it: a plan in a checkpoint is called by its folder."""
    whole = Path(os.path.abspath(path))
    if whole.name == PLAN_NAME:
        whole = whole.parent
    elif whole.suffix == ".json":
        whole = whole.with_suffix("")
    return whole.parts[1:] or whole.parts
