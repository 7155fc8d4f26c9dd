# SPDX-License-Identifier: Apache-2.0
"""The ``README.md`` of a pruned checkpoint, made of the files beside it and of nothing else.

So it can be made anew at any time: when results are added, or under another name on the Hub. Its words are in
``card.md.jinja``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoConfig

from .. import names
from ..compat import auto_class
from ..errors import RequestError
from ..evaluation.comparison import Comparison
from ..methods import get_method, list_methods
from ..plan import PruningPlan
from ..storage.files import write_text
from . import card_parts
from .again import recover_command, run_command
from .facts import origin_of
from .front_matter import front_matter
from .opened import opened_in_words
from .plain import pairs, plain

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_SEAL = "\n<!-- written by optimum-moe-prune "


def write_card(folder: str | os.PathLike, name: str) -> Path:
    """Write the model card of a pruned checkpoint into its folder.

    A card that was edited by hand since it was written is kept; the new one is then written beside it.

    Args:
        folder: The checkpoint, with its plan and recipe.
        name: What it is called: its folder or its repository.

    Raises:
        RequestError: If there is no plan in the folder, or both cards were edited.
        RunError: If the card cannot be written.
    """
    path, text = Path(folder) / names.CARD_NAME, str(model_card(folder, name))
    if _is_edited(path):
        path = path.with_name(names.NEW_CARD_NAME)
        if _is_edited(path):
            raise RequestError(
                f"{names.CARD_NAME} and {names.NEW_CARD_NAME} in {folder} were both edited and are kept; move one."
            )
        logger.warning(
            "%s in %s was edited and is kept; the new card is %s.", names.CARD_NAME, folder, names.NEW_CARD_NAME
        )
    return write_text(path, text + _seal(text))


def _is_edited(path: Path) -> bool:
    """Whether there is a card that is not as this package wrote it."""
    if not path.is_file():
        return False
    there = path.read_text(encoding="utf-8", errors="replace")
    return not there.endswith(_seal(there.rpartition(_SEAL)[0]))


def _seal(text: str) -> str:
    """The last line of a card, by which it is known whether it was edited since."""
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def model_card(folder: str | os.PathLike, name: str) -> ModelCard:
    """The model card of a pruned checkpoint.

    Args:
        folder: The checkpoint, with its plan and recipe; evaluation, report, pictures and the original's card where
            there are such.
        name: What it is called: its folder or its repository.

    Raises:
        RequestError: If there is no plan in the folder, or the evaluation there is damaged.
    """
    folder = Path(folder)
    plan = PruningPlan.load(folder)
    evaluation = folder / names.EVALUATION_NAME
    comparison = Comparison.load(evaluation) if evaluation.is_file() else None
    origin = origin_of(plan)
    original = origin.base_model or "ORIGINAL"
    revision = ["--revision", origin.revision] if origin.revision else []
    again = ["optimum-cli", "moe-prune", "apply", "--model", original, *revision, "--plan", names.PLAN_NAME]
    again += ["--substitute", "--stats", "STATS_DIR"] if "substitution" in plan.provenance else []
    data = front_matter(folder, name, origin, comparison)
    return ModelCard.from_template(
        card_data=data,
        template_path=str(_TEMPLATE),
        # The template escapes nothing: what was read from a file is made plain, but for numbers that were checked.
        plan=plan,
        method=plain(plan.method),
        explained=get_method(plan.method) if plan.method in list_methods() else None,
        options=pairs(plan.config.get("method_options"), "="),
        heads=card_parts.heads(plan),
        model_type=plain(plan.model_type),
        base_model=None if origin.base_model is None else plain(origin.base_model),
        first_model=None if origin.first_model is None else plain(origin.first_model),
        license=plain(data.license) if isinstance(data.license, str) else "",
        title=plain(name.rpartition("/")[2]),
        quoted_name=repr(name),
        loader=loader_of_card(folder),
        opened=opened_in_words(folder, plan),
        sizes=card_parts.sizes_table(plan, folder, comparison),
        notes=card_parts.notes(plan),
        pictures=card_parts.pictures(folder),
        **card_parts.recovery(plan),
        **card_parts.results(comparison),
        **card_parts.choice(plan),
        **card_parts.calibration(plan),
        apply_command=shlex.join([*again, "OUTPUT"]),
        run_command=shlex.join(run_command(plan, original, revision)),
        recover_command=shlex.join(recover_command(plan, original, revision)),
        files={path.name for path in folder.iterdir() if path.is_file()},
        **{key: value for key, value in vars(names).items() if key.isupper()},
    )


def loader_of_card(folder: str | os.PathLike) -> str:
    """The auto class that loads a checkpoint whole, with what sees or hears in it."""
    try:
        return auto_class(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, LookupError):  # a type of the user's own, or code that comes with it
        return "AutoModelForCausalLM"
