# SPDX-License-Identifier: Apache-2.0
"""``run``: calibrate, choose experts, and write the pruned checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import replace

from optimum.commands.base import CommandInfo

from . import flags, publishing, screen
from .base import Command, Result
from .libraries import held_back
from .requests import require_calibration
from .work import add_dry_run, check_run, shown


class RunCommand(Command):
    COMMAND = CommandInfo("run", "calibrate, choose experts, and write the pruned checkpoint")
    shares = True
    examples = (
        "--model ./mixtral --calibration texts.jsonl --num-experts 4 ./mixtral-4",
        "--model mistralai/Mixtral-8x7B-v0.1 --calibration math.jsonl --calibration code.jsonl --sparsity 25%% out",
        "--model ./mixtral --method random --sparsity 0.5 ./mixtral-random",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser)
        flags.add_calibration(parser)
        group = flags.add_recipe(parser)
        group.add_argument(
            "--sensitivity",
            metavar="FILE",
            help="with --method auto or --allocation sensitivity: what the command sensitivity wrote",
        )
        flags.add_settings(group, ["progressive", "seed", "mtp", *flags.TARGET])
        flags.add_settings(parser.add_argument_group("recovery"), flags.RECOVERY)
        flags.add_compute(parser, "the calibration; what is written keeps the checkpoint's")
        flags.add_writing(parser)
        publishing.add_publishing(parser)
        add_dry_run(parser)
        flags.add_common(parser, "OUTPUT", "folder of the pruned checkpoint, absent or empty")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..names import PLAN_NAME
        from ..storage.folders import check_target

        check_target(args.output, args.overwrite, [args.model], PLAN_NAME)
        config = flags.recipe(args)
        config.require_budget()
        weights = flags.domain_weights(args)
        if config.needs_text or config.recover or (config.measures and args.sensitivity is None):
            require_calibration(args)
        flags.check_sensitivity(args, config, args.report)
        publishing.check_publishing(args, config.substitute)

        from ..planning.measured import check_measured
        from ..planning.sensitivity import Sensitivity
        from ..planning.work import WorkPlan, plan_work
        from ..pruner import MoEPruner
        from ..statistics.samples import check_domain_weights
        from .inputs import calibration_samples, recovery_samples

        compute = flags.compute_of(args)
        source = flags.source_of(args)
        pruner = MoEPruner.from_pretrained(source.name_or_path, config, **source.for_transformers)
        layout = pruner.layout()
        made = check_run(args, config, layout)
        recipe = made.recipe
        publishing.check_memory(args, layout)
        texts = publishing.texts_to_judge(args)
        if args.sensitivity is not None:
            pruner.sensitivity = Sensitivity.load(args.sensitivity)
            check_measured(config, pruner.sensitivity, layout.facts(), weights)
        measures = [recipe] if recipe.measures and pruner.sensitivity is None else []
        with screen.notes_kept(args.json) as printed:
            with held_back():
                samples = calibration_samples(args, pruner) if config.measures or config.needs_text else None
                recovery = recovery_samples(args, pruner)
                if weights is not None and samples is not None:
                    check_domain_weights(samples.samples, weights)
            publishing.say_overlap(texts, None, samples, recovery)
            settings = {"output": args.output, "compute": compute, "measures": measures, "recovery": recovery}
            settings |= {"standalone": args.standalone}

            def work() -> WorkPlan:
                planned = plan_work(layout, recipe, samples, **settings)
                return replace(planned, fit=made.fit, notes=made.notes)

            if (result := shown(args, work)) is not None:
                return result
            pruner.prune_checkpoint(
                args.output,
                calibration=samples,
                domain_weights=weights,
                recovery=recovery,
                restart=args.restart,
                max_shard_size=args.max_shard_size,
                overwrite=args.overwrite,
                standalone=args.standalone,
                **publishing.for_card(args),
                **vars(compute),
            )
        if not compute.together.is_main:
            publishing.share_judging(args, texts)
            return "", {}
        return publishing.result_of_checkpoint(args, pruner, texts, printed)
