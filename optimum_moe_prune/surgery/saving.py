# SPDX-License-Identifier: Apache-2.0
"""Save a model that was pruned in memory, with everything that belongs to it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures.structure import structure_of
from ..architectures.table import architecture_of
from ..checkpoints.source import Source
from ..compat import ModelConfig
from ..errors import RequestError
from ..models.blocks import moe_blocks
from ..models.wrappers import plain_model
from ..names import PLAN_NAME
from ..plan import PruningPlan
from ..planning.for_target import remembered, served_by
from ..storage.files import write_json
from ..storage.folders import written_folder
from ..storage.values import Values, read_json
from .checks import check_found
from .config_json import config_of_model
from .cuts import changed_files, cut_of_model
from .files import add_records, carry_files
from .standalone import standalone_class, write_standalone

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def saved_model(
    model: PreTrainedModel,
    plan: PruningPlan,
    folder: str | os.PathLike,
    *,
    recipe: Values | None = None,
    source: Source | None = None,
    source_config: ModelConfig = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    standalone: bool = False,
) -> Iterator[Path]:
    """Write a pruned model as a checkpoint, beside the target and renamed.

    Args:
        model: The pruned model.
        plan: The plan it was pruned by.
        folder: The target, absent or empty.
        recipe: To store beside the plan; by default the plan's own.
        source: The original, whose ``config.json``, tokenizer and other files come along.
        source_config: The original's config.
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
    model = plain_model(model)
    if {block.layer: block.num_experts for block in moe_blocks(model)} != plan.without_heads.num_experts:
        raise RequestError(
            "this model does not have the numbers of experts of the plan; pass the model that was pruned."
        )
    check_found(architecture_of(model.config), plan.uniform_num_experts is not None)
    served = served_by(plan, architecture_of(model.config), model.config)
    plan = remembered(plan, served)
    standalone = standalone and plan.uniform_num_experts is None  # elsewhere nothing is needed
    if standalone:
        standalone_class(model.config)
    structure = structure_of(model, architecture_of(model.config))
    read = [None if source is None else source.name_or_path]
    with written_folder(folder, overwrite, read, PLAN_NAME) as partial:
        model.save_pretrained(partial)
        add_records(partial, plan, recipe)
        if source is not None:
            left_out = carry_files(source, partial, changed_files(source, cut_of_model(plan, structure)))
            for name in filter(source.leads_out, left_out):  # the model may have been loaded with it
                (partial / name).unlink(missing_ok=True)
            write_json(partial / "config.json", config_of_model(model, source, source_config), indent=2)
        if served is not None:
            values = served.target.config(read_json(partial / "config.json"), plan.without_heads.num_experts)
            write_json(partial / "config.json", values, indent=2)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if standalone:
            write_standalone(partial, model.config)
        yield partial
