# SPDX-License-Identifier: Apache-2.0
"""What ``run`` and ``apply`` add to a pruned checkpoint, where they publish it, and what they print."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MoEPruneError, RequestError, RunError
from ..storage.values import Json
from . import flags
from .base import Result

if TYPE_CHECKING:
    from ..plan import PruningPlan
    from ..pruner import MoEPruner


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """What is added to a pruned checkpoint, and where it is published."""
    group = parser.add_argument_group("results and publishing")
    group.add_argument(
        "--evaluate",
        action="append",
        metavar="FILE",
        help="held-out text (.jsonl or .txt): compare with the original afterwards, and put the results into the "
        "model card; may be repeated",
    )
    group.add_argument("--report", action="store_true", help="add report.html and its pictures")
    group.add_argument("--push-to-hub", metavar="REPO", help="publish the finished folder, in one commit")
    group.add_argument("--private", action="store_true", default=None, help="make a new repository private")


def check_publishing(args: argparse.Namespace) -> None:
    """Refuse what cannot be added to a pruned checkpoint, before any work.

    Raises:
        RequestError: If a file is missing, or a package.
    """
    if args.evaluate:
        from ..evaluation.compare import held_out

        held_out(flags.source_of(args), _held_out(args))  # whatever is wrong with them, or with the model
    if args.report:
        from ..publishing.report import require_matplotlib

        require_matplotlib()
    if args.push_to_hub is not None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise RequestError(f"--push-to-hub: {str(error).splitlines()[0]}") from error
    elif args.private:
        raise RequestError("--private is for --push-to-hub REPO.")


def check_memory(args: argparse.Namespace, pruner: MoEPruner) -> None:
    """Refuse ``--evaluate`` where original and pruned model will not fit beside each other, before any work.

    Raises:
        RequestError: With what is needed and what is free.
    """
    from ..models.memory import available_memory, model_bytes

    if not args.evaluate:
        return
    device = "cpu" if args.device == "auto" else args.device
    needed, free = 2 * model_bytes(pruner.layout(), args.dtype), available_memory(device)
    if needed > free:
        raise RequestError(
            f"--evaluate holds the original and the pruned model in memory, up to {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Leave it out, and evaluate on a larger machine (evaluate --update-card)."
        )


def result_of_plan(plan: PruningPlan, output: str) -> Result:
    """What is printed of a plan that was made or applied."""
    values = {"output": output, "method": plan.method, "sparsity": plan.sparsity, "num_experts": plan.num_experts}
    return f"{plan.summary()}\n{output}", values


def result_of_checkpoint(args: argparse.Namespace, pruner: MoEPruner) -> Result:
    """Add results and report to the checkpoint a pruner wrote, publish it, and say what was done.

    Raises:
        RunError: If what should follow fails. The checkpoint is whole.
    """
    plan = pruner.pruning_plan
    assert plan is not None
    text, values = result_of_plan(plan, args.output)
    if plan.uniform_num_experts is None:
        text += "\nIts layers keep different numbers of experts: import optimum_moe_prune before loading it"
        text += ", or pass trust_remote_code=True." if args.standalone else "."
    elif args.standalone:
        text += "\nAll layers keep the same number of experts: plain transformers loads it, --standalone adds nothing."
    folder = Path(args.output)
    try:
        more, results = _finish(args, pruner, plan, folder)
    except MoEPruneError as error:
        raise RunError(
            f"the pruned checkpoint is written in {folder}, and what should follow failed: {error} Add results with "
            "evaluate --update-card, pictures with report; MoEPruner.push_to_hub(repository, folder) publishes it."
        ) from error
    return text + more, {**values, **results}


def _held_out(args: argparse.Namespace) -> list[Path]:
    return [Path(file) for file in args.evaluate]


def _finish(args: argparse.Namespace, pruner: MoEPruner, plan: PruningPlan, folder: Path) -> Result:
    from ..names import EVALUATION_NAME, REPORT_NAME, REPORT_PICTURES
    from ..publishing.card import write_card

    text, comparison = "", None
    values: Json = {}
    if args.evaluate:
        from ..evaluation.compare import compare

        source = flags.source_of(args)
        comparison = compare(
            replace(source, name_or_path=str(folder), revision=None),
            _held_out(args),
            reference=source,
            speed=True,
            compute=flags.compute_of(args),
        )
        comparison.save(folder / EVALUATION_NAME)
        text += f"\n\n{comparison.summary()}"
        values["evaluation"] = comparison.to_dict()
    if args.report:
        from ..publishing.report import write_report

        write_report(
            folder / REPORT_NAME,
            stats=pruner.stats if pruner.stats is not None and pruner.stats.samples else None,
            plans={folder.name: plan},
            sensitivity=pruner.sensitivity,
            evaluation=comparison,
            pictures=folder / REPORT_PICTURES,
        )
        text += f"\n{folder / REPORT_NAME}"
        values["report"] = str(folder / REPORT_NAME)
    if args.evaluate or args.report:
        write_card(folder, folder.resolve().name)
    if args.push_to_hub is not None:
        commit = pruner.push_to_hub(args.push_to_hub, private=args.private)
        text += f"\npublished: {commit.commit_url}"
        values["commit"] = commit.commit_url
    return text, values
