# SPDX-License-Identifier: Apache-2.0
"""``compare``: methods and sparsities judged side by side, from one calibration."""

from __future__ import annotations

import argparse
from functools import partial

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from ..storage.values import fraction
from . import flags
from .base import Command, Result, terminal
from .libraries import held_back
from .work import add_dry_run, shown


class CompareCommand(Command):
    COMMAND = CommandInfo("compare", "methods and sparsities side by side: what each loses, from one calibration")
    shares = True

    examples = (
        "--model ./mixtral --calibration texts.jsonl --data heldout.jsonl --method all compared",
        "--model ./mixtral --stats stats --data heldout.jsonl --method mosaic --method reap --sparsity 25%% compared",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser)
        flags.add_compute(parser, "the calculation")
        flags.add_calibration(parser)
        flags.add_recipe(parser, several="all", budget=False)
        group = parser.add_argument_group("what to compare")
        group.add_argument("--stats", metavar="STATS_DIR", help="saved by score, in place of a calibration")
        group.add_argument(
            "--data",
            action="append",
            required=True,
            metavar="FILE",
            help=f"held-out text: {flags.DATA}; may be repeated",
        )
        group.add_argument(
            "--sparsity",
            action="append",
            type=flags.value_of(_sparsity),
            metavar="F",
            help="fraction of experts to remove, as 0.25 or 25%%; may be repeated (default 25%% and 50%%)",
        )
        group.add_argument(
            "--allocation",
            action="append",
            metavar="A",
            help="uniform, global, sensitivity or estimated; may be repeated (default: each method's own way)",
        )
        group.add_argument(
            "--sensitivity", metavar="FILE", help="what the command sensitivity wrote (default: measured here)"
        )
        group.add_argument("--markdown", action="store_true", help="print tables in Markdown")
        flags.add_settings(parser, ["seed"])
        add_dry_run(parser)
        flags.add_common(parser, "OUTPUT", "folder of results.json, table.md, picture.png and plans, absent or empty")

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..evaluation.compare_methods import check_comparison, compare_methods
        from ..evaluation.measure_sensitivity import check_model_of
        from ..names import BY_SENSITIVITY
        from ..planning.sensitivity import Sensitivity
        from ..planning.work import plan_work
        from ..processes.folders import held
        from ..pruner import MoEPruner
        from ..publishing.method_comparison import check_method_comparison, write_method_comparison
        from ..statistics.samples import check_domain_weights
        from ..statistics.stats import CalibrationStats
        from ..storage.workspace import Workspace
        from .inputs import calibration_samples, held_out_samples

        if args.json and args.markdown:
            raise RequestError("--json and --markdown exclude each other.")
        check_method_comparison(args.output, args.overwrite)
        sparsities = args.sparsity or [0.25, 0.5]
        asked, args.sparsity, allocations, args.allocation = args.method, None, args.allocation or (), None
        recipes = flags.recipes(args, asked, "all", "name one, or compare recipes from Python")
        compute = flags.compute_of(args)
        pruner = MoEPruner(recipes[0], source=flags.source_of(args))
        layout = pruner.layout()
        stats = None if args.stats is None else CalibrationStats.load(args.stats)
        sensitivity = None if args.sensitivity is None else Sensitivity.load(args.sensitivity)
        check_comparison(recipes, sparsities, allocations, layout.num_experts, layout.spec.routing(layout.config))
        if stats is not None:
            check_model_of(stats, layout.fingerprints())
        weights = flags.domain_weights(args)
        needs_text = stats is None and any(recipe.needs_text for recipe in recipes)
        with held_back():
            samples = calibration_samples(args, pruner) if args.calibration or needs_text else None
            heldout = held_out_samples(args, flags.source_of(args), args.data, "--data")
            chosen_on = samples if stats is None else stats
            if weights is not None and chosen_on is not None:
                check_domain_weights(chosen_on.samples, weights)
        plans = len(recipes) * len(sparsities) * max(1, len(allocations))
        measures = [r for r in recipes if args.sensitivity is None and (r.measures or BY_SENSITIVITY in allocations)]
        work = partial(
            plan_work,
            layout,
            recipes[0],
            heldout if samples is None else samples,
            needs=frozenset(need for recipe in recipes for need in recipe.needs) if needs_text else frozenset(),
            output=args.output,
            compute=compute,
            measures=measures,
            judged_tokens=(1 + plans) * heldout.num_tokens,
        )
        if (result := shown(args, work)) is not None:
            return result
        workspace = Workspace.beside(args.output, args.restart).part("compare")
        with held(compute.together, args.output):
            found = compare_methods(
                layout,
                samples,
                heldout,
                methods=recipes,
                sparsities=sparsities,
                allocations=allocations,
                stats=stats,
                sensitivity=sensitivity,
                domain_weights=weights,
                batch_size=recipes[0].batch_size,
                seed=recipes[0].seed,
                compute=compute,
                workspace=workspace,
            )

            def write() -> list[str]:
                folder = write_method_comparison(args.output, found, args.overwrite)
                workspace.clear()
                return sorted(path.name for path in folder.iterdir())

            files = compute.together.once(write)
        text = found.markdown() if args.markdown else found.summary(*terminal())
        return f"{text}\n\n{args.output}: {', '.join(files)}", {"output": args.output, **found.to_dict()}


def _sparsity(text: str) -> float:
    """A fraction of experts to remove.

    Raises:
        RequestError: If it is none.
    """
    value = fraction(text)
    if not 0 < value < 1:
        raise RequestError(f"{text} experts cannot be removed; the fraction lies between 0 and 1, as 0.25 or 25%.")
    return value
