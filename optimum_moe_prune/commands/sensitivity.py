# SPDX-License-Identifier: Apache-2.0
"""``sensitivity``: how far a model can be pruned, and where."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from ..storage.values import fraction
from . import flags
from .base import Command, Result
from .libraries import held_back
from .requests import require_calibration
from .work import add_dry_run, shown

if TYPE_CHECKING:
    from ..checkpoints.layout import Layout


DEFAULT = "auto"
"""The method of a recipe that names none: what is measured for it is enough for each of its candidates as well."""


class SensitivityCommand(Command):
    COMMAND = CommandInfo("sensitivity", "how far a model can be pruned, and where: measured divergences")
    shares = True
    examples = (
        "--model ./mixtral --calibration texts.jsonl sensitivity.json",
        "--model ./mixtral --calibration texts.jsonl --method reap --sparsities 25%%,50%% sensitivity.json",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser)
        flags.add_calibration(parser)
        flags.add_recipe(parser, several=DEFAULT, budget=False)
        group = parser.add_argument_group("what to measure")
        group.add_argument(
            "--stats",
            metavar="STATS_DIR",
            help="saved by score, to choose with; measured is on --calibration",
        )
        group.add_argument(
            "--counts",
            metavar="N,N",
            help="experts to measure each layer with (default: all numbers, or twelve of them)",
        )
        group.add_argument(
            "--sparsities", metavar="F,F", help="of whole models (default 0.125,0.25,0.375,0.5,0.625,0.75)"
        )
        flags.add_settings(group, ["seed"])
        flags.add_compute(parser, "the calculation")
        add_dry_run(parser)
        flags.add_common(parser, "OUTPUT.json", "file of the result")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..storage.files import check_file

        require_calibration(args)
        configs = flags.recipes(args, args.method, DEFAULT, "give a recipe for each run instead")
        counts = flags.numbers(args.counts, "--counts", int)
        sparsities = flags.numbers(args.sparsities, "--sparsities", fraction)
        if sparsities is not None and not all(0 < s < 1 for s in sparsities):
            raise RequestError(
                f"--sparsities is {args.sparsities}; fractions of experts to remove lie between 0 and 1."
            )

        from ..evaluation.measure_sensitivity import SPARSITIES, check_model_of, measure_sensitivity
        from ..evaluation.sensitivity_sets import check_grid
        from ..planning.sensitivity import Sensitivity
        from ..planning.work import plan_work
        from ..processes.folders import held
        from ..pruner import MoEPruner
        from ..statistics.samples import check_domain_weights
        from ..statistics.stats import CalibrationStats
        from ..storage.workspace import Workspace
        from .inputs import calibration_samples

        check_file(args.output, ".json", args.overwrite, Sensitivity.load)
        compute = flags.compute_of(args)
        pruner = MoEPruner(configs[0], source=flags.source_of(args))
        layout = pruner.layout()
        stats = None if args.stats is None else CalibrationStats.load(args.stats)
        _check_counts(counts, layout)
        if stats is not None:
            check_model_of(stats, layout.fingerprints())
        weights = flags.domain_weights(args)
        for config in configs:
            check_grid(config, layout.num_experts, layout.spec.routing(layout.config), counts)
        with held_back():
            samples = calibration_samples(args, pruner)
            if weights is not None:
                check_domain_weights((samples if stats is None else stats).samples, weights)
        needs = frozenset() if args.stats else frozenset(need for config in configs for need in config.needs)
        work = partial(
            plan_work, layout, configs[0], samples, needs=needs, output=args.output, compute=compute, measures=configs
        )
        if (result := shown(args, work)) is not None:
            return result
        workspace = Workspace.beside(args.output, args.restart).part("sensitivity")
        with held(compute.together, args.output):
            measured = measure_sensitivity(
                layout,
                samples,
                configs,
                stats,
                domain_weights=weights,
                counts=counts,
                sparsities=SPARSITIES if sparsities is None else sparsities,
                batch_size=configs[0].batch_size,
                compute=compute,
                workspace=workspace,
            )

            def write() -> None:
                measured.save(args.output)
                workspace.clear()

            compute.together.once(write)
        return f"{measured.summary()}\n{args.output}", {"output": args.output, **measured.to_dict()}


def _check_counts(counts: list[int] | None, layout: Layout) -> None:
    """Refuse numbers of experts of which no layer can keep any, before texts are read.

    Raises:
        RequestError: With those that can be asked for.
    """
    least, most = layout.spec.routing(layout.config).top_k, max(layout.num_experts.values()) - 1
    if counts is not None and not any(least <= count <= most for count in counts):
        raise RequestError(f"--counts is {','.join(map(str, counts))}; ask for numbers of {least} to {most} experts.")
