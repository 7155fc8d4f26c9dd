# SPDX-License-Identifier: Apache-2.0
"""The plan of the work: shown before it begins, and all that ``--dry-run`` shows."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .base import Result

if TYPE_CHECKING:
    from ..planning.work import WorkPlan


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """The flag that stops before the work."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be kept, read, written and held in memory, and for how long, and stop",
    )


def shown(args: argparse.Namespace, work: WorkPlan) -> Result | None:
    """Show the plan of the work on standard error; or, where nothing more is wanted, give it as the result."""
    if args.dry_run:
        return f"{work.summary()}\nNothing was written (--dry-run).", {"dry_run": True, **work.to_dict()}
    print(work.summary(), file=sys.stderr, flush=True)
    return None
