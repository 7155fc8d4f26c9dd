# SPDX-License-Identifier: Apache-2.0
"""``export``: a plan, or what statistics say of experts, for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from . import flags
from .base import Command, Result


class ExportCommand(Command):
    COMMAND = CommandInfo("export", "a plan, bits for each expert, or an order of experts, for other programs")
    examples = (
        "--plan plan.json served.json",
        "--stats ./stats --format auto-round --bits 3 --bit-widths 2,4 layer_config.json",
        "--stats ./stats --format order order.json",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--plan",
            metavar="PLAN.json",
            help="the plan's file, or a pruned checkpoint's folder; with --stats the file is for the model it makes",
        )
        parser.add_argument("--stats", metavar="STATS_DIR", help="statistics that score saved")
        parser.add_argument(
            "--format",
            default="json",
            metavar="F",
            help="of a plan json, which says everything; of statistics bits, auto-round or gptqmodel (bits for each "
            "expert), order, or sglang (initial places) (default json)",
        )
        group = parser.add_argument_group("bits for each expert")
        group.add_argument(
            "--bits",
            type=float,
            metavar="N",
            help="of an expert's weights: the mean of each layer at most, as 2.5",
        )
        group.add_argument(
            "--bit-widths", metavar="N,N", help="the numbers of bits an expert may have (default 2,3,4,8)"
        )
        parser.add_argument(
            "--domain-weight",
            action="append",
            default=[],
            metavar="DOMAIN=W",
            help="with --stats: share of a domain; may be repeated",
        )
        flags.add_common(parser, "OUTPUT.json", "the file to write")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..publishing.export import EXPORT_FORMATS, import_plan
        from ..publishing.export_statistics import STATISTICS_FORMATS, WITH_BITS, check_exported
        from ..storage.files import check_file, write_text

        of_statistics = args.format in STATISTICS_FORMATS
        given = {
            "--stats": args.stats is not None,
            "--domain-weight": bool(args.domain_weight),
            "--bits": args.bits is not None,
            "--bit-widths": args.bit_widths is not None,
        }
        if not of_statistics and args.format not in EXPORT_FORMATS:
            known = ", ".join((*EXPORT_FORMATS, *STATISTICS_FORMATS))
            raise RequestError(f"export format {args.format!r} is not known: {known}.")
        if of_statistics and args.stats is None:
            raise RequestError(f"format {args.format!r} is made of statistics; name them (--stats STATS_DIR).")
        if not of_statistics and (idle := [flag for flag, is_given in given.items() if is_given]):
            raise RequestError(
                f"{idle[0]} is for formats of statistics ({', '.join(STATISTICS_FORMATS)}), and the format is "
                f"{args.format!r}."
            )
        if not of_statistics and args.plan is None:
            raise RequestError("there is nothing to export; name a plan (--plan PLAN.json), or --stats and --format.")
        if args.format in WITH_BITS and args.bits is None:
            raise RequestError(f"format {args.format!r} needs the mean number of bits; name it (--bits N).")
        if args.format not in WITH_BITS and (idle := [flag for flag in ("--bits", "--bit-widths") if given[flag]]):
            raise RequestError(f"{idle[0]} is for formats with bits ({', '.join(WITH_BITS)}).")

        def read(path: Path) -> None:
            if of_statistics:
                check_exported(path.read_text(), args.format)
            else:
                import_plan(path.read_text())

        if of_statistics:
            target = check_file(args.output, ".json", args.overwrite, read)
            text = _of_statistics(args)
        else:
            from ..plan import PruningPlan

            text = PruningPlan.load(args.plan).export(args.format)
            target = check_file(args.output, ".json", args.overwrite, read)
        write_text(target, text)
        return str(target), {"output": str(target), "format": args.format}


def _of_statistics(args: argparse.Namespace) -> str:
    """The text of a format that is made of statistics."""
    from ..plan import PruningPlan
    from ..publishing.export_statistics import WIDTHS, check_bits, export_statistics
    from ..statistics.stats import CalibrationStats

    widths = flags.numbers(args.bit_widths, "--bit-widths", int) or WIDTHS
    check_bits(args.format, args.bits, widths)
    plan = None if args.plan is None else PruningPlan.load(args.plan)
    stats = CalibrationStats.load(args.stats).with_domain_weights(flags.domain_weights(args))
    return export_statistics(stats, args.format, bits=args.bits, widths=widths, plan=plan)
