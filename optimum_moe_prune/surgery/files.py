# SPDX-License-Identifier: Apache-2.0
"""Apply a plan to a checkpoint's files: tensor by tensor, as bytes, without a model.

What is retained of a tensor is one or more ranges of bytes: all of it, or rows of its first dimension. They are copied
by the system from file to file, whatever the dtype means; no tensor is held in memory. Retained experts are looked at
for NaN and infinity beside the copying; what is pruned is not read.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory

from ..checkpoints.checkpoint import INDEX_FILE, Checkpoint
from ..checkpoints.cutting import Piece, select
from ..checkpoints.layout import Layout
from ..checkpoints.source import Source
from ..errors import RequestError, RunError, faults_of
from ..names import (
    BASE_CARD_NAME,
    CARD_NAME,
    CONFIG_NAME,
    PLAN_NAME,
    REPORT_PICTURES,
)
from ..plan import PruningPlan
from ..progress import working
from ..storage.files import write_json
from ..storage.folders import check_space, check_target, written_folder
from ..storage.values import Json, Values
from .carried import carried_from
from .checks import check_plan_for_config, check_request, check_routers
from .config_json import config_after, config_of_files
from .copying import _write_file
from .cuts import OWN_FILES, changed_files, cut_of_files, with_settings
from .heads import check_heads_load, head_counts, way_of_plan, with_heads_settled
from .standalone import write_standalone

logger = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"


@contextlib.contextmanager
def pruned_checkpoint(
    plan: PruningPlan,
    layout: Layout,
    target: str | os.PathLike,
    *,
    recipe: Values | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    standalone: bool = False,
    mtp: str | None = None,
) -> Iterator[Path]:
    """Write a pruned copy of a checkpoint. Memory does not grow with the size of its tensors.

    Tensors keep the names, dtypes and layout (one per expert, or fused) of the source. All is written beside the
    target and renamed. Weights that no layer of the model holds are copied as they are.

    Args:
        plan: The plan.
        layout: The checkpoint of the model it was made for.
        target: The folder to write, absent or empty.
        recipe: To store beside the plan; by default the plan's own.
        max_shard_size: The most bytes in a file, as a number or ``"5GB"``.
        overwrite: Replace an earlier output of this package.
        standalone: Where layers keep different numbers of experts, add a modelling file, with which
            ``trust_remote_code=True`` loads the checkpoint without this package.
        mtp: What becomes of heads for further tokens; by default what the plan says, or what loads.

    Yields:
        The folder with everything in it, beside the target: what is to be added is added inside the ``with``, and then
        it is renamed.

    Raises:
        RequestError: If the plan is for another model, the source is damaged, or the target is in the way.
        RunError: If a retained weight is NaN or infinite, or something cannot be written.
    """
    checkpoint = layout.checkpoint
    source = checkpoint.name_or_path
    check_target(target, overwrite, [source], PLAN_NAME)
    check_plan_for_config(plan, layout.config)
    uniform = plan.uniform_num_experts is not None
    check_request(layout, uniform, standalone, way_of_plan(plan, mtp))
    plan = with_heads_settled(plan, layout, mtp)
    heads = head_counts(plan, layout)
    with faults_of(f"config.json of {source}"):
        pruned = config_after(layout, plan.without_heads.num_experts, heads)
        check_heads_load(layout, pruned, heads or {})
    pieces = select(plan, layout, layout.head_names if heads is None else ())
    check_routers(plan, layout.fingerprints())
    cut = cut_of_files(plan, layout)
    with faults_of(f"config.json of {source}"):
        config = with_settings(config_of_files(layout, pruned), cut)
    beside = changed_files(checkpoint.source, cut)
    with written_pieces(
        pieces, checkpoint, target, config, beside, max_shard_size=max_shard_size, overwrite=overwrite
    ) as output:
        add_records(output, plan, recipe)
        if standalone and not uniform:  # elsewhere nothing is needed
            write_standalone(output, layout.config)
        yield output


@contextlib.contextmanager
def written_pieces(
    pieces: dict[str, Piece],
    checkpoint: Checkpoint,
    target: str | os.PathLike,
    config: Json,
    beside: Mapping[str, bytes],
    *,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> Iterator[Path]:
    """Write what is left of a checkpoint's tensors, its config, and what lies beside them.

    Args:
        pieces: By name.
        checkpoint: What they are of.
        target: The folder to write.
        config: Its ``config.json``.
        beside: As for :func:`carry_files`.
        max_shard_size: As for :func:`pruned_checkpoint`.
        overwrite: Likewise.

    Yields:
        The folder beside the target, to which records are added.

    Raises:
        RunError: If a weight is NaN or infinite, or something cannot be written.
    """
    files = split_state_dict_into_shards_factory(
        pieces,
        get_storage_size=lambda piece: piece.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes(max_shard_size),
    )
    total = sum(piece.nbytes for piece in pieces.values())
    check_space(target, total)
    with written_folder(target, overwrite, [checkpoint.name_or_path], PLAN_NAME) as output:
        with working("writing the checkpoint", total, "B", "wrote") as work:
            for file, names in files.filename_to_tensors.items():
                _write_file(output / file, {name: pieces[name] for name in names}, checkpoint, work)
        checkpoint.check_unchanged()
        if len(files.filename_to_tensors) > 1:
            metadata: Json = {**checkpoint.index_metadata, **files.metadata}
            if "total_parameters" in metadata:
                metadata["total_parameters"] = sum(math.prod(piece.shape) for piece in pieces.values())
            write_json(output / INDEX_FILE, {"metadata": metadata, "weight_map": files.tensor_to_filename}, indent=2)
        carry_files(checkpoint.source, output, beside)
        write_json(output / "config.json", config, indent=2)
        yield output


def shard_bytes(size: str | int) -> int:
    """The most bytes in a file, of a number or ``"500MB"``, ``"5GB"``.

    Raises:
        RequestError: If it is neither.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = str(size).strip().upper()
    number, factor = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    if not number.strip().isdigit() or int(number) == 0:
        raise RequestError(f"max_shard_size is {size!r}; it must be a number of bytes, or one with KB, MB, GB or TB.")
    return int(number) * factor


def add_records(folder: Path, plan: PruningPlan, recipe: Values | None) -> None:
    """Write the plan, and the recipe (by default the plan's own), into a checkpoint."""
    plan.save(folder / PLAN_NAME)
    write_json(folder / CONFIG_NAME, plan.config if recipe is None else recipe, indent=2)


def carry_files(source: Source, folder: Path, changed: Mapping[str, bytes]) -> dict[str, str]:
    """Copy what lies beside a model's weights and is not there yet: tokenizer, generation config, code, ...

    The model card is kept under another name, since the pruned model has its own. Of a model that was pruned before
    it is the card of the model before that which is kept.

    Args:
        source: The model.
        folder: Where they go.
        changed: What stands in those that name or count experts (``cuts.changed_files``).

    Returns:
        What stays out though it lies there, and why.
    """
    names, left_out = carried_from(source)
    for name, reason in left_out.items():
        logger.warning("%s of %s stays out of the pruned copy: %s.", name, source.name_or_path, reason)
    if CARD_NAME in names and BASE_CARD_NAME not in names:
        card = source.find(CARD_NAME)
        if card is not None:
            shutil.copyfile(card, folder / BASE_CARD_NAME)
    for name in names:
        if name in OWN_FILES or name.startswith(f"{REPORT_PICTURES}/") or (folder / name).exists():
            continue
        found = source.find(name)
        if found is None:
            raise RunError(f"{name} of {source.name_or_path} is listed there and cannot be fetched.")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in changed:
            (folder / name).write_bytes(changed[name])
        else:
            shutil.copyfile(found, folder / name)
    return left_out
