# SPDX-License-Identifier: Apache-2.0
"""``score``: calibrate once and save the statistics."""

from __future__ import annotations

import argparse
from functools import partial

from optimum.commands.base import CommandInfo

from . import flags
from .base import Command, Result
from .requests import require_calibration
from .work import add_dry_run, shown


class ScoreCommand(Command):
    COMMAND = CommandInfo("score", "calibrate once and save the statistics")
    shares = True
    examples = (
        "--model ./mixtral --calibration texts.jsonl ./stats",
        "--model ./mixtral --calibration texts.jsonl --method reap --stream ./stats",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser)
        flags.add_calibration(parser)
        group = parser.add_argument_group("method")
        group.add_argument(
            "--method", metavar="NAME", help="gather what it needs, or all that a forward pass gives (default all)"
        )
        flags.add_settings(group, flags.METHOD[1:])
        group.add_argument(
            "--fisher",
            action="store_true",
            help="gather gradients as well, for --method fisher and --allocation estimated: another pass forward and "
            "one back",
        )
        group.add_argument(
            "--mean-outputs",
            action="store_true",
            help="gather the mean output of each expert as well, for apply --substitute: a vector for each sample and "
            "expert",
        )
        flags.add_config(group)
        flags.add_settings(group, ["seed"])
        flags.add_compute(parser, "the calibration")
        add_dry_run(parser)
        flags.add_common(parser, "STATS_DIR", "folder of the statistics, absent or empty")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..names import STATS_NAME
        from ..storage.folders import check_target

        require_calibration(args)
        check_target(args.output, args.overwrite, [args.model], STATS_NAME)
        every = args.method == "all" or (args.method is None and not args.config)
        args.method = None if every else args.method
        config = flags.recipe(args)

        from ..calibration.calibrate import Needs, calibrate, needs_of
        from ..planning.work import plan_work
        from ..processes.folders import held
        from ..pruner import MoEPruner
        from ..statistics.needs import Need
        from ..storage.workspace import Workspace
        from .inputs import calibration_samples

        also = {Need.FISHER: args.fisher, Need.MEAN_OUTPUTS: args.mean_outputs}
        more = [need for need, is_asked in also.items() if is_asked]
        asked: Needs = ["all" if every else config, *([Need.ROUTING] if more else []), *more]
        needs = needs_of(asked)
        compute = flags.compute_of(args)
        pruner = MoEPruner(config, source=flags.source_of(args))
        samples = calibration_samples(args, pruner)
        layout = pruner.layout()
        work = partial(
            plan_work, layout, config, samples, needs=needs, output=args.output, compute=compute, saves_statistics=True
        )
        if (result := shown(args, work)) is not None:
            return result
        workspace = Workspace.beside(args.output, args.restart).part("calibration")
        with held(compute.together, args.output):
            stats = calibrate(
                layout,
                samples,
                asked,
                batch_size=config.batch_size,
                max_tokens=config.max_tokens,
                seed=config.seed,
                compute=compute,
                workspace=workspace,
            )

            def write() -> None:
                stats.save(args.output, args.overwrite)
                workspace.clear()

            compute.together.once(write)
        values = {
            "output": args.output,
            "samples": len(samples),
            "tokens_by_domain": stats.domains,
            "kept_tokens": len(stats.token_sample),
            "needs": sorted(map(str, needs)),
            "streamed": stats.provenance["streamed"],
        }
        domains = ", ".join(f"{domain} {tokens}" for domain, tokens in stats.domains.items())
        kept = len(stats.token_sample)
        some = f"; {kept} of them kept for what is gathered token by token" if kept < samples.num_tokens else ""
        text = f"{len(samples)} samples, {samples.num_tokens} tokens ({domains}){some}\n"
        return f"{text}statistics of {len(stats.layers)} layers: {args.output}", values
