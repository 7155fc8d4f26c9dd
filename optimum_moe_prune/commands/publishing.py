# SPDX-License-Identifier: Apache-2.0
"""What ``run`` and ``apply`` add to a pruned checkpoint, where they publish it, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MoEPruneError, RequestError, RunError
from ..storage.values import Json
from . import flags, screen
from .base import Result, terminal
from .shown import show

if TYPE_CHECKING:
    from ..calibration.samples import CalibrationSet
    from ..checkpoints.layout import Layout
    from ..evaluation.comparison import Comparison
    from ..plan import PruningPlan
    from ..pruner import MoEPruner

logger = logging.getLogger(__name__)


def add_publishing(parser: argparse.ArgumentParser) -> None:
    """What is added to a pruned checkpoint, and where it is published."""
    group = parser.add_argument_group("results and publishing")
    group.add_argument(
        "--evaluate",
        action="append",
        metavar="FILE",
        help="held-out text, in any form that --calibration takes: compare with the original afterwards, and put the "
        "results into the model card; may be repeated",
    )
    group.add_argument(
        "--speed",
        action="store_true",
        help="measure generation and peak memory afterwards, in turn with the original, each in a process of its own",
    )
    group.add_argument("--report", action="store_true", help="add report.html and its pictures")
    group.add_argument("--push-to-hub", metavar="REPO", help="publish the finished folder, in one commit")
    group.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    group.add_argument(
        "--base-model",
        metavar="ID",
        help="for the model card: the original's id on the Hub; of an adapter, the model that it was trained on, or "
        "the pruned one",
    )
    group.add_argument("--license", metavar="ID", help="for the model card: the original's licence, as apache-2.0")
    group.add_argument(
        "--language", action="append", metavar="CODE", help="for the model card: a language, as en; may be repeated"
    )


def check_publishing(args: argparse.Namespace, substitutes: bool = False) -> None:
    """Refuse what cannot be added to a pruned checkpoint, before any work.

    Args:
        args: The command's.
        substitutes: Whether experts that go answer with a constant.

    Raises:
        RequestError: If a package is missing, or a name is wrong; or speed is to be measured where transformers has no
            such model.
    """
    if substitutes and args.speed:
        raise RequestError(
            "--speed is that of transformers, and with --substitute experts answer with a constant, which runs in "
            "vLLM; measure it there."
        )
    from ..publishing.facts import CardFacts
    from ..surgery.files import shard_bytes

    CardFacts(**for_card(args))
    shard_bytes(args.max_shard_size)
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


def texts_to_judge(args: argparse.Namespace) -> CalibrationSet | None:
    """What ``--evaluate`` will judge on, read before any work.

    Raises:
        RequestError: If it cannot be read.
    """
    if not args.evaluate:
        return None
    from .inputs import held_out_samples

    return held_out_samples(args, flags.source_of(args), args.evaluate, "--evaluate")


def for_card(args: argparse.Namespace) -> Json:
    """What is said of the original for the model card."""
    return {"base_model": args.base_model, "license": args.license, "language": args.language}


def say_overlap(texts: CalibrationSet | None, plan: PruningPlan | None = None, *others: CalibrationSet | None) -> None:
    """Say before any work that ``--evaluate`` names text that is calibrated on, or recovered with.

    Args:
        texts: To judge on.
        plan: The plan, where there is one.
        others: What one will be made with, and what is recovered with.
    """
    if texts is None:
        return
    from ..evaluation.overlap import overlap_of

    overlap = overlap_of(plan, texts, [other for other in others if other is not None])
    if overlap is not None and (sentence := overlap.sentence()):
        logger.warning("%s", sentence)


def check_memory(args: argparse.Namespace, layout: Layout) -> None:
    """Refuse ``--evaluate`` where original and pruned model will not fit beside each other, before any work.

    Raises:
        RequestError: With what is needed and what is free.
    """
    from ..models.memory import Compute, available_memory, model_bytes

    if not args.evaluate:
        return
    compute = Compute(args.dtype, args.device, processes=getattr(args, "processes", None)).on_own_device()
    needed = 2 * model_bytes(layout, args.dtype)
    free = sum(map(available_memory, compute.places)) // compute.copies
    if needed > free:
        raise RequestError(
            f"--evaluate holds the original and the pruned model in memory, up to {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Leave it out, and evaluate on a larger machine (evaluate --update-card)."
        )


def result_of_checkpoint(
    args: argparse.Namespace, pruner: MoEPruner, texts: CalibrationSet | None, printed: Collection[str] = ()
) -> Result:
    """Add results and report to the checkpoint a pruner wrote, publish it, and say what was done.

    Args:
        args: The command's.
        pruner: That wrote it.
        texts: What :func:`texts_to_judge` returned.
        printed: Messages that were printed before.

    Raises:
        RunError: If what should follow fails. The checkpoint is whole.
    """
    plan = pruner.pruning_plan
    assert plan is not None
    folder = Path(args.output)
    with _written(folder):
        lost, more, results = _finish(args, pruner, plan, folder, texts)
    lines, values = screen.checkpoint_in_words(args.output, args.standalone, lost, printed)
    if args.push_to_hub is not None:
        try:
            with _written(folder):
                commit = pruner.push_to_hub(args.push_to_hub, private=args.private)
        except (KeyboardInterrupt, MoEPruneError):
            if not args.json:  # what was chosen and lost is known, after hours maybe
                show("\n".join([*lines, *more]))
            raise
        more.append(f"published: {commit.commit_url}")
        results["commit"] = commit.commit_url
    if not lost:
        evaluate = ["optimum-cli", "moe-prune", "evaluate", "--model", args.output, "--reference", args.model]
        more.append(f"next, see what it lost: {shlex.join([*evaluate, '--data', 'YOURS.jsonl', '--update-card'])}")
    return "\n".join([*lines, *more]), {**values, **results}


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Say that the checkpoint is whole, where what follows it is interrupted or fails.

    Raises:
        RunError: In place of whatever failed.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (f"the pruned checkpoint is written in {folder}, and what should follow was not done. {_LATER}",)
        raise
    except MoEPruneError as error:
        raise RunError(
            f"the pruned checkpoint is written in {folder}, and what should follow failed: {error} {_LATER}"
        ) from error


_LATER = (
    "Add results with evaluate --update-card, pictures with report; MoEPruner.push_to_hub(repository, folder) "
    "publishes it."
)


def share_judging(args: argparse.Namespace, texts: CalibrationSet | None) -> None:
    """What processes beside the main one do with a checkpoint that was written: their share of judging it."""
    if args.evaluate or args.speed:
        _judged(args, Path(args.output), texts)


def _judged(args: argparse.Namespace, folder: Path, texts: CalibrationSet | None) -> Comparison:
    """The checkpoint beside the original."""
    from ..evaluation.compare import compare

    source = flags.source_of(args)
    return compare(
        replace(source, name_or_path=str(folder), revision=None),
        texts,
        reference=source,
        speed=args.speed,
        compute=flags.compute_of(args, says=False),
    )


def _finish(
    args: argparse.Namespace, pruner: MoEPruner, plan: PruningPlan, folder: Path, texts: CalibrationSet | None
) -> tuple[str, list[str], Json]:
    """What was lost, in words; lines of what else was done; and both as values."""
    from ..names import EVALUATION_NAME, REPORT_NAME, REPORT_PICTURES
    from ..publishing.card import write_card

    lost = ""
    comparison: Comparison | None = None
    more: list[str] = []
    values: Json = {}
    if args.evaluate or args.speed:
        comparison = _judged(args, folder, texts)
        comparison.save(folder / EVALUATION_NAME)
        lost = comparison.summary(*terminal())
        values["evaluation"] = {**comparison.to_dict(), "verdict": comparison.verdict()}
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
        more.append(f"report: {folder / REPORT_NAME}")
        values["report"] = str(folder / REPORT_NAME)
    if comparison is not None or args.report:
        write_card(folder, folder.resolve().name)
    return lost, more, values
