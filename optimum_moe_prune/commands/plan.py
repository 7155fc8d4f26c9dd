# SPDX-License-Identifier: Apache-2.0
"""``plan``: choose experts from saved statistics."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from ..statistics.folder import header_of
from . import flags, screen
from .base import Command, Result

if TYPE_CHECKING:
    from ..checkpoints.layout import Layout
    from ..config import MoEPrunerConfig
    from ..statistics.stats import CalibrationStats


class PlanCommand(Command):
    COMMAND = CommandInfo("plan", "choose experts from saved statistics")
    examples = (
        "--stats ./stats --method reap --sparsity 40%% plan.json",
        "--stats ./stats --method mosaic --num-experts 4 --protect 0:1,5 --skip-layers 0,1 plan.json",
        "--stats ./stats --sensitivity sensitivity.json --sparsity 50%% plan.json",
    )
    shows_bars = True

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--stats", required=True, metavar="STATS_DIR", help="statistics that score saved")
        parser.add_argument(
            "--model",
            metavar="DIR|ID",
            help="with --fit and --for: the model that they are of (default: where it was when they were made)",
        )
        group = flags.add_recipe(parser)
        group.add_argument(
            "--sensitivity",
            metavar="FILE",
            help="with --method auto or --allocation sensitivity: what the command sensitivity wrote",
        )
        flags.add_settings(group, ["seed", "mtp", *flags.TARGET])
        flags.add_common(parser, "PLAN.json", "file of the plan")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..methods import get_method
        from ..methods.registry import statistics_alone
        from ..plan import PruningPlan
        from ..storage.files import check_file

        target = check_file(args.output, ".json", args.overwrite, PruningPlan.load)
        config = flags.recipe(args)
        config.require_budget()
        flags.check_sensitivity(args, config)
        asks_model = config.fit is not None or config.target is not None
        if args.model is not None and not asks_model:
            raise RequestError(
                "--model is for --fit SIZE and --for NAME, and none is given; a plan is made from statistics alone."
            )
        weights = flags.domain_weights(args)
        header_of(args.stats)
        if args.sensitivity is None and get_method(config.method).measures:
            raise RequestError(statistics_alone(config.method))

        from ..planning.build import build_plan
        from ..planning.sensitivity import Sensitivity
        from ..statistics.stats import CalibrationStats
        from ..surgery.settled import settled

        sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
        stats = CalibrationStats.load(args.stats)
        made = settled(config, _model_of(stats, args.model, config) if asks_model else None)
        with screen.notes_kept(args.json) as printed:
            plan = made.remembered(build_plan(stats, made.recipe, weights, sensitivity))
            plan.save(target)
        return screen.result_of_plan(plan, args.output, printed)


def _model_of(stats: CalibrationStats, name: str | None, config: MoEPrunerConfig) -> Layout:
    """The model that statistics are of, for its sizes or its config."""
    from ..architectures.fingerprint import same_routers
    from ..checkpoints.layout import open_layout

    name = name or stats.model.get("name_or_path")
    advice = "name the model that the statistics are of (--model DIR)"
    needs = "--for needs the model's config" if config.fit is None else "--fit needs the model's sizes"
    if not name:
        raise RequestError(f"{needs}; {advice}.")
    try:
        layout = open_layout(name)
    except RequestError as error:
        raise RequestError(f"{needs}, and {str(error).rstrip('.')}; {advice}.") from error
    if not same_routers(stats.model, layout.fingerprints()):
        raise RequestError(f"{name} is not the model that the statistics are of; {advice}.")
    return layout
