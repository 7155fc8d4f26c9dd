# SPDX-License-Identifier: Apache-2.0
"""The plan of the work: shown before it begins, and all that ``--dry-run`` shows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import printable
from ..processes import ALONE
from .base import Result

if TYPE_CHECKING:
    from ..checkpoints.layout import Layout
    from ..config import MoEPrunerConfig
    from ..plan import PruningPlan
    from ..planning.work import WorkPlan
    from ..surgery.settled import Settled


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The flag that stops before the work."""
    parser.add_argument_group("before it begins").add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be kept, read, written and held in memory, and for how long, and stop",
    )


def shown(args: argparse.Namespace, plan: Callable[[], WorkPlan]) -> Result | None:
    """Show the plan of the work on standard error, for people; or, where nothing more is wanted, as the result.

    Of several processes the main one does; it plans what one process does alone, of which each takes a share.
    """
    processes = getattr(args, "processes", ALONE)
    work = plan() if processes.is_main else None
    if work is None:
        return ("", {}) if args.dry_run else None
    lines = work.summary()
    if not processes.is_alone:
        lines += f"\nshared  by {processes.count} processes: each takes its part of the batches, and this memory"
    if args.dry_run:
        return f"{lines}\nNothing was written (--dry-run).", {"dry_run": True, **work.to_dict()}
    if not args.json:
        print(printable(lines), file=sys.stderr, flush=True)
    return None


def check_run(args: argparse.Namespace, config: MoEPrunerConfig, layout: Layout) -> Settled:
    """Refuse a run that can be known to fail, before any text is read.

    Returns:
        The recipe, with what follows from the model.

    Raises:
        RequestError: If budget, output or heads are wrong.
    """
    from ..planning.build import budget_for
    from ..surgery.checks import check_output
    from ..surgery.settled import settled

    made = settled(config, layout, args.standalone)
    recipe = made.recipe
    budget = budget_for(recipe, layout.num_experts, layout.spec.routing(layout.config))
    check_output(layout, budget, args.output, args.standalone, recipe.mtp, recipe.substitute)
    return made


def check_apply(args: argparse.Namespace, plan: PruningPlan, layout: Layout, substitute: bool = False) -> None:
    """Refuse a plan that is not for a model, before what it does is shown.

    Raises:
        RequestError: If it is for another model, or what it asks for cannot be written.
    """
    from ..planning.for_target import remembered, served_by
    from ..surgery.checks import check_plan_for_config, check_request, check_routers
    from ..surgery.heads import way_of_plan
    from ..surgery.substitutable import check_substitution

    check_plan_for_config(plan, layout.config)
    if substitute:
        check_substitution(layout, args.standalone, args.mtp)
        check_routers(plan, layout.fingerprints())
        return
    uniform = plan.uniform_num_experts is not None
    check_request(layout, uniform, args.standalone, way_of_plan(plan, args.mtp))
    remembered(plan, served_by(plan, layout.spec, layout.config))
    if layout.checkpoint.is_local:  # else it would be downloaded for it
        check_routers(plan, layout.fingerprints())
