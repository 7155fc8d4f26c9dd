# SPDX-License-Identifier: Apache-2.0
"""``apply`` to what is no transformers checkpoint: a GGUF file, an MLX folder, an adapter."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..errors import RequestError, printable
from .base import Command, Result
from .parsing import Parser, actions_of

if TYPE_CHECKING:
    from ..formats import Form

_FOR_EVERY_FORM = {"model", "plan", "output", "overwrite", "max_shard_size", "dry_run", "json", "debug"}


def cut(args: argparse.Namespace, form: Form, command: type[Command]) -> Result:
    """Prune it by a plan.

    Raises:
        RequestError: As ``Form.prepare``, or naming a flag that is for checkpoints alone.
    """
    from ..plan import PruningPlan

    parser = Parser(prog=command.COMMAND.name)
    command.parse_args(parser)
    given = [action for action in actions_of(parser) if getattr(args, action.dest, action.default) != action.default]
    if idle := [action for action in given if action.dest not in _FOR_EVERY_FORM | {*form.options}]:
        raise RequestError(
            f"{idle[0].option_strings[-1]} is for transformers checkpoints, and {args.model} is {form.name}."
        )
    size = args.max_shard_size if any(action.dest == "max_shard_size" for action in given) else None
    options = {action.dest: getattr(args, action.dest) for action in given if action.dest in form.options}
    cutting = form.prepare(
        PruningPlan.load(args.plan), args.model, args.output, overwrite=args.overwrite, max_shard_size=size, **options
    )
    if args.dry_run:
        return f"{cutting.summary}\nNothing was written (--dry-run).", {"dry_run": True, **cutting.facts}
    if not args.json:
        print(printable(cutting.summary), file=sys.stderr, flush=True)
    written = cutting.write()
    return str(written), {"output": str(written), **cutting.facts}
