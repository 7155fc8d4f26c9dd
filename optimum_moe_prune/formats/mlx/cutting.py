# SPDX-License-Identifier: Apache-2.0
"""A plan applied to an MLX folder: experts and router rows cut as bytes, into a folder that mlx-lm opens."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...architectures.fingerprint import SKETCH, same_sketch, sketch_of
from ...architectures.spec import COUNT_KEYS as USUAL_KEYS
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.cutting import select
from ...checkpoints.source import Source
from ...compat import text_config
from ...errors import RequestError
from ...names import CARD_NAME, NOTES_LOGGER, PLAN_NAME
from ...plan import PruningPlan, with_parent
from ...progress.pace import size
from ...storage.files import write_text
from ...storage.folders import check_space, check_target
from ...storage.values import Json, read_json
from ...surgery.checks import check_plan_for_config, check_routers
from ...surgery.config_json import config_after, config_of_files, source_config
from ...surgery.cuts import changed_files, cut_of_files
from ...surgery.files import MAX_SHARD_SIZE, Prepared, shard_bytes
from ...surgery.heads import with_heads_settled
from ...surgery.side_files import COUNT_KEYS
from ...targets.mlx_lm import MLX
from .card import card_of
from .layout import MLXLayout, find_mlx_layout
from .names import INDEX

logger = logging.getLogger(NOTES_LOGGER)

SAME = "those of the model the plan was made for"
ALIKE = "those of the model the plan was made for, as far as these tell"
UNPROVEN = "not compared: the plan remembers none that these can be compared with; only counts and shapes were checked"


@dataclass(frozen=True)
class MLXCut:
    """A cut of an MLX folder that was checked and not begun.

    Attributes:
        prepared: What is written.
        summary: What will be done, in lines for people.
        facts: The same as plain values.
    """

    prepared: Prepared
    summary: str
    facts: Json = field(repr=False)

    def write(self) -> Path:
        """Write beside the target and rename; the target.

        Raises:
            RunError: If something cannot be written, or a retained weight is NaN or infinite.
        """
        target = self.prepared.target
        with self.prepared.written() as folder:
            write_text(folder / CARD_NAME, card_of(self.prepared.plan, folder, target.resolve().name))
        return target


def prepare(
    plan: PruningPlan,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
) -> MLXCut:
    """Check a cut of an MLX folder whole (``formats.Prepare``).

    Raises:
        RequestError: If the plan is for another model or keeps different numbers in the layers, the folder is damaged
            or of an architecture that is not known, or the target is in the way.
    """
    folder = Source.of(source)
    check_target(target, overwrite, [folder.name_or_path], PLAN_NAME)
    shard_size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
    shard_bytes(shard_size)
    values = source_config(folder)
    _check_counted(values, folder.name_or_path)
    check_plan_for_config(plan, folder.config)
    checkpoint = Checkpoint.open(folder)
    layout = find_mlx_layout(checkpoint, folder.config)
    if plan.uniform_num_experts is None:
        raise RequestError(
            f"this plan keeps different numbers of experts in the layers, and {MLX.title} builds all with the one "
            "number that config.json says. Make a plan with a uniform allocation (allocation='uniform')."
        )
    if layout.foreign:
        raise RequestError(
            f"{layout.foreign[0]} of {folder.name_or_path} are experts outside the model's layers, which no plan "
            "names and mlx-lm does not build. Remove them from the folder."
        )
    plan = with_heads_settled(with_parent(plan.without_recovery, folder.stored_plan()), layout)
    pieces = select(plan, layout)
    proof = _proof(plan, layout)
    config = _counted(layout, plan.num_experts)
    _read_index(checkpoint)
    prepared = Prepared(
        plan,
        checkpoint,
        Path(target),
        pieces,
        config,
        changed_files(folder, cut_of_files(plan, layout)),
        shard_size,
        overwrite,
        always_index=folder.find(INDEX) is not None,
    )
    check_space(target, prepared.nbytes)
    if proof == UNPROVEN:
        logger.warning("the router weights were %s.", proof)
    if below := _below_zero(plan, layout):
        logger.warning(
            "layer %s retains experts whose correction bias is below zero. Where a token's groups of experts are "
            "chosen, mlx-lm counts those of the others as 0 and may take them before such ones, as it does with the "
            "whole model; transformers does not.",
            ", ".join(map(str, below)),
        )
    facts = _facts(layout, prepared, proof)
    return MLXCut(prepared, _summary(facts), facts)


def _check_counted(values: Json, name: str) -> None:
    """Refuse a config that leaves the number of experts to whoever reads it: readers differ in what they take."""
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    if not any(key in COUNT_KEYS for part in parts for key in part):
        raise RequestError(
            f"config.json of {name} says no number of experts ({', '.join(USUAL_KEYS)}). Fetch it again, or write "
            "the number into it."
        )


def _counted(layout: MLXLayout, counts: Mapping[int, int]) -> Json:
    """The source's ``config.json`` with the new number under every key that counts routed experts there."""
    values = config_of_files(layout, config_after(layout, counts, {}))
    before, after = next(iter(layout.num_experts.values())), next(iter(counts.values()))
    inner = text_config(layout.config)
    part: Json = values
    if inner is not layout.config:
        part = next(
            (
                own
                for key, own in values.items()
                if isinstance(own, dict) and getattr(layout.config, key, None) is inner
            ),
            values,
        )
    part.update({key: after for key in COUNT_KEYS & part.keys() if type(part[key]) is int and part[key] == before})
    return values


def _read_index(checkpoint: Checkpoint) -> None:
    """Keep what the index says beside the names; but what counts packed words as parameters would be wrong."""
    found = checkpoint.source.find(INDEX)
    metadata = {} if found is None else read_json(found).get("metadata")
    checkpoint.index_metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if any(tensor.dtype == "U32" for tensor in checkpoint.tensors.values()):
        checkpoint.index_metadata.pop("total_parameters", None)


def _proof(plan: PruningPlan, layout: MLXLayout) -> str:
    """How well it is known that the plan was made for this model.

    Raises:
        RequestError: If it was made for one with other routers.
    """
    as_they_were = not any(map(layout.is_quantised, layout.layers)) and not layout.absent
    if as_they_were and "fingerprint" in plan.made_for:
        found = layout.fingerprints()
        half = "fingerprint_float16"
        in_half = plan.made_for.get(half) == found[half]  # converted to it: both are the same, rounded
        if not (in_half and same_sketch(plan.made_for.get(SKETCH) or {}, found[SKETCH])):
            check_routers(plan, found)
        return SAME
    with layout.checkpoint.reader() as read:
        mine = {str(index): sketch_of(layout.router(index, read)) for index in layout.layers}
    alike = same_sketch(plan.made_for.get(SKETCH) or {}, mine)
    if alike is False:
        raise RequestError(
            "this plan was made for a model with other router weights "
            f"({plan.made_for.get('name_or_path') or 'unnamed'}) than those of {layout.checkpoint.name_or_path}."
        )
    return UNPROVEN if alike is None else ALIKE


def _below_zero(plan: PruningPlan, layout: MLXLayout) -> list[int]:
    """Layers in which what mlx-lm does with groups of experts may differ, as it does in the source."""
    if layout.spec.routing(layout.config).groups == 1:
        return []
    found = []
    with layout.checkpoint.reader() as read:
        for index, layer in layout.layers.items():
            logits = layout.structure.moe[index].logits_from
            for bias in (read(name).flatten() for path, name in layer.router.items() if path != logits):
                if bias.is_floating_point() and bool((bias[list(plan.retained[index])] < 0).any()):
                    found.append(index)
    return found


def _facts(layout: MLXLayout, prepared: Prepared, proof: str) -> Json:
    counts = layout.num_experts
    said = source_config(layout.checkpoint.source).get("quantization")
    return {
        "form": "MLX folder",
        "model": layout.checkpoint.name_or_path,
        "model_type": layout.spec.model_type,
        "bits": said.get("bits") if isinstance(said, dict) else None,
        "group_size": said.get("group_size") if isinstance(said, dict) else None,
        "layers": list(counts),
        "original_num_experts": next(iter(counts.values())),
        "num_experts": prepared.plan.uniform_num_experts,
        "original_bytes": layout.checkpoint.nbytes,
        "bytes": prepared.nbytes,
        "known_by": proof,
        "opened_by": MLX.title,
    }


def _summary(facts: Json) -> str:
    bits = f", {facts['bits']} bits in groups of {facts['group_size']}" if facts["bits"] else ""
    before, after = facts["original_num_experts"], facts["num_experts"]
    lines = {
        "model": f"MLX folder {facts['model']} ({facts['model_type']}{bits}): {len(facts['layers'])} layers with "
        f"{before} experts, {size(facts['original_bytes'])}",
        "keeps": f"{after} of {before} experts in each layer ({1 - after / before:.1%} removed)",
        "routers": facts["known_by"],
        "writes": f"{size(facts['bytes'])}, byte for byte; nothing is quantised anew",
        "opened": f"by {facts['opened_by']}",
    }
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())
