# SPDX-License-Identifier: Apache-2.0
"""Save a model that was pruned in memory, with everything that belongs to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architectures import architecture_of
from .architectures.block import moe_blocks
from .card import write_card
from .checkpoint import carry_files
from .config import CONFIG_NAME
from .errors import RequestError
from .files import read_json, written_folder
from .plan import PLAN_NAME, PruningPlan
from .shards import find_file
from .standalone import standalone_class, write_standalone
from .surgery import pruned_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_pruned(
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
) -> Path:
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

    Returns:
        The folder.

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
        write_card(partial, Path(folder).resolve().name)
    return Path(folder)


def _restore_config(
    folder: Path, model: PreTrainedModel, source: str, source_config: Any, hub: Mapping[str, Any]
) -> None:
    """Write the source's own ``config.json``, with the pruning keys and what was changed in memory put in."""
    found = find_file(source, "config.json", hub)
    if found is None:
        return
    values = pruned_config(read_json(found), source_config, model.config, architecture_of(model.config))
    dtype = str(model.dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    if values.get(key) != dtype:
        values[key] = dtype
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
