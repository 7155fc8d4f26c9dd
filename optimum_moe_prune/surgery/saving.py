# SPDX-License-Identifier: Apache-2.0
"""Save a model that was pruned in memory, with everything that belongs to it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..models.blocks import moe_blocks
from ..names import CONFIG_NAME, PLAN_NAME
from ..plan import PruningPlan
from ..storage.folders import written_folder
from .config_json import _restore_config
from .files import carry_files
from .standalone import standalone_class, write_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def saved_model(
    model: PreTrainedModel,
    plan: PruningPlan,
    folder: str | os.PathLike,
    *,
    recipe: Mapping[str, Any],
    source: str | None = None,
    source_config: Any = None,
    hub: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    standalone: bool = False,
) -> Iterator[Path]:
    """Write a pruned model as a checkpoint, beside the target and renamed.

    Args:
        model: The pruned model.
        plan: The plan it was pruned by.
        folder: The target, absent or empty.
        recipe: To store beside the plan.
        source: The folder or Hub id of the original, whose ``config.json``, tokenizer and other files come along.
        source_config: The original's config.
        hub: How the original is reached.
        tokenizer: In place of the original's.
        overwrite: Replace an earlier output of this package.
        standalone: Where layers keep different numbers of experts, add a modelling file.

    Yields:
        The folder with everything in it, beside the target: what is to be added is added inside the ``with``, and then
        it is renamed.

    Raises:
        RequestError: If the model does not match the plan, or the target is in the way.
        RunError: If something cannot be written.
    """
    if {block.layer: block.num_experts for block in moe_blocks(model)} != plan.num_experts:
        raise RequestError(
            "this model does not have the numbers of experts of the plan; pass the model that was pruned."
        )
    standalone = standalone and plan.uniform_num_experts is None  # elsewhere nothing is needed
    if standalone:
        standalone_class(model.config)
    with written_folder(folder, overwrite, sources=[source]) as partial:
        model.save_pretrained(partial)
        plan.save(partial / PLAN_NAME)
        (partial / CONFIG_NAME).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        if source is not None:
            carry_files(source, hub or {}, partial)
            _restore_config(partial, model, source, source_config, hub or {})
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if standalone:
            write_standalone(partial, model.config)
        yield partial
