# SPDX-License-Identifier: Apache-2.0
"""What ``run``, ``apply`` and ``plan`` print: what was kept, its size, what to know, where it is, what comes next."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..names import CARD_NAME, NOTES_LOGGER, PLAN_NAME
from ..storage.values import Json

if TYPE_CHECKING:
    from ..plan import PruningPlan

_PACKAGE = __name__.partition(".")[0]
_MOST_LAYERS = 26  # that are listed one by one


@contextlib.contextmanager
def notes_kept(as_json: bool) -> Iterator[set[str]]:
    """Inside, the notes of a plan are not printed as they arise: they are printed with the result.

    Other messages are printed as ever, and so are notes where the result is JSON.

    Args:
        as_json: Whether the result is JSON.

    Yields:
        The messages that were printed.
    """
    logger = logging.getLogger(_PACKAGE)
    others = list(logger.handlers)  # print already what is not a note
    handler = _Printing(as_json, alone=not others)
    for other in others:
        other.addFilter(handler.is_printed)
    logger.addHandler(handler)
    try:
        yield handler.printed
    finally:
        logger.removeHandler(handler)
        for other in others:
            other.removeFilter(handler.is_printed)


class _Printing(logging.Handler):
    """Prints as Python does where nobody has set up logging, but for the notes of plans."""

    def __init__(self, prints_notes: bool, alone: bool) -> None:
        super().__init__(logging.WARNING)
        self.prints_notes = prints_notes
        self.alone = alone
        self.printed: set[str] = set()

    def is_printed(self, record: logging.LogRecord) -> bool:
        """Whether a message is printed at once."""
        return record.name != NOTES_LOGGER or self.prints_notes

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_printed(record):
            return
        self.printed.add(record.getMessage())
        if self.alone and not logging.getLogger().handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)


def plan_in_words(plan: PruningPlan, where: str) -> list[str]:
    """What is retained: in all, and by layer where these can be looked through.

    Args:
        plan: The plan.
        where: The file that names all experts.
    """
    from ..planning.choice import in_words

    lines = plan.summary().splitlines()[: 1 + len(plan.retained)]  # what was found on the way is for those who ask
    measured = in_words(plan)
    if len(plan.retained) <= _MOST_LAYERS:
        return [*lines, *measured]
    kept, before = (sorted(set(counts.values())) for counts in (plan.num_experts, plan.original_num_experts))
    spread = f"{kept[0]}" if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
    total = f"{before[0]}" if len(before) == 1 else f"{before[0]} to {before[-1]}"
    return [lines[0], f"  each layer keeps {spread} of {total}; which ones stands in {where}", *measured]


def notes_of(plan: PruningPlan) -> list[str]:
    """What a person must know of a plan, each once."""
    return list(dict.fromkeys(" ".join(note.split()) for note in plan.notes if note.strip()))


def to_know(plan: PruningPlan, printed: Collection[str] = ()) -> list[str]:
    """The notes of a plan as lines, but for those that were printed before."""
    notes = [note for note in notes_of(plan) if note not in printed]
    return ["", "What to know:", *(f"- {note}" for note in notes)] if notes else []


def result_of_plan(plan: PruningPlan, output: str, printed: Collection[str] = ()) -> tuple[str, Json]:
    """What is printed of a plan that was made.

    Args:
        plan: The plan.
        output: Its file.
        printed: Messages that were printed before.
    """
    more = ["--substitute", "--stats", "STATS_DIR"] if plan.config.get("substitute") else []
    apply = shlex.join(["optimum-cli", "moe-prune", "apply", "--model", "MODEL", "--plan", output, *more, "OUTPUT"])
    lines = [*plan_in_words(plan, output), *to_know(plan, printed)]
    lines += ["", f"plan: {output}", f"next: {apply}"]
    return "\n".join(lines), values_of(plan, output)


def values_of(plan: PruningPlan, output: str) -> Json:
    """The same as values."""
    return {
        "output": output,
        "method": plan.method,
        "sparsity": plan.sparsity,
        "num_experts": plan.num_experts,
        "original_num_experts": plan.original_num_experts,
        "notes": notes_of(plan),
        "findings": plan.provenance.get("findings") or {},
        **({"choice": choice} if (choice := plan.provenance.get("choice")) else {}),
    }


def checkpoint_in_words(
    folder: str, standalone: bool, lost: str = "", printed: Collection[str] = ()
) -> tuple[list[str], Json]:
    """What is printed of a checkpoint that was written; and the same as values.

    Args:
        folder: The checkpoint.
        standalone: Whether it was to load without this package.
        lost: What was measured of it.
        printed: Messages that were printed before.
    """
    from ..evaluation.tables import aligned
    from ..plan import PruningPlan
    from ..publishing.card import loader_of_card
    from ..publishing.opened import opened_in_words
    from ..publishing.sizes import sizes_of
    from ..recovery.verdict import recovery_of, sentence_of, table_of
    from ..statistics.passages import without_passages

    plan = PruningPlan.load(folder)  # with what became of heads
    lines = plan_in_words(plan, str(Path(folder, PLAN_NAME)))
    values = values_of(plan, folder)
    if sizes := sizes_of(plan, folder):
        lines.append(f"size: {sizes.in_words()}")
        values |= sizes.to_dict()
    if (recovery := recovery_of(plan)) is not None:
        lines += ["", sentence_of(recovery), *aligned(table_of(recovery))]
        values["recovery"] = without_passages(recovery)
    if lost:
        lines += ["", lost]
    lines += to_know(plan, printed)
    substitutes = "substitution" in plan.provenance
    load = f'{loader_of_card(folder)}.from_pretrained({folder!r}, dtype="auto")'
    values["load"] = load = f"vllm serve {shlex.quote(folder)}" if substitutes else load
    lines += ["", f"written: {folder} (what others should know of it: {Path(folder, CARD_NAME)})", f"load it: {load}"]
    if opened := opened_in_words(folder, plan):
        lines.append(f"opened by: {opened}")
        values["opened_by"] = opened
    if substitutes:
        return lines, values
    if plan.uniform_num_experts is None:
        said = "Its layers keep different numbers of experts: import optimum_moe_prune before loading it"
        lines.append(said + (", or pass trust_remote_code=True." if standalone else "."))
    elif standalone:
        lines.append(
            "All layers keep the same number of experts: plain transformers loads it, --standalone adds nothing."
        )
    return lines, values
