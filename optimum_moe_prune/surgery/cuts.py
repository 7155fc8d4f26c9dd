# SPDX-License-Identifier: Apache-2.0
"""What a plan means to files beside the weights: which experts were numbered anew, under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..architectures.structure import Structure
from ..architectures.unequal import FILE_STEM
from ..checkpoints.layout import Layout
from ..checkpoints.source import Source
from ..names import CARD_NAME, CONFIG_NAME, EVALUATION_NAME, NEW_CARD_NAME, PLAN_NAME, REPORT_NAME
from ..plan import PruningPlan
from ..storage.values import Json
from .carried import carried_from
from .expert_names import Cut
from .side_files import rewritten, rewritten_file

OWN_FILES = (
    PLAN_NAME,
    CONFIG_NAME,
    CARD_NAME,
    NEW_CARD_NAME,
    REPORT_NAME,
    EVALUATION_NAME,
    "config.json",
    f"{FILE_STEM}.py",
)
"""What is written anew beside the weights, or not carried over, of a model that was pruned before."""
_SETTINGS = ("quantization_config", "compression_config")


def cut_of_files(plan: PruningPlan, layout: Layout) -> Cut:
    """How experts of a checkpoint are numbered anew."""
    modules = _in_model(plan, layout.structure)
    parts: dict[str, None] = {}
    own: set[str] = set()
    for index, layer in layout.with_heads.items():
        for number, tensors in layer.experts.items():
            own.update(tensors.values())
            if index not in plan.retained or number >= layer.num_experts:
                continue
            path, name = next(iter(tensors.items()))
            modules[index, number] = (name[: -len(f".{path}")], *modules.get((index, number), ()))
            parts.update(dict.fromkeys((*tensors, *(path.rpartition(".")[0] for path in tensors if "." in path))))
    others = {name for name in layout.checkpoint.tensors if name not in own}
    others |= {name.rpartition(".")[0] for name in others}
    return Cut(plan.retained, plan.original_num_experts, modules, list(parts) or None, others)


def cut_of_model(plan: PruningPlan, structure: Structure) -> Cut:
    """How experts of a model in memory were numbered anew."""
    return Cut(plan.retained, plan.original_num_experts, _in_model(plan, structure))


def _in_model(plan: PruningPlan, structure: Structure) -> dict[tuple[int, int], tuple[str, ...]]:
    return {
        (index, number): (f"{structure.layers}.{index}.{structure.moe[index].experts}.{number}",)
        for index, count in plan.original_num_experts.items()
        if index in structure.moe
        for number in range(count)
    }


def changed_files(source: Source, cut: Cut) -> dict[str, bytes]:
    """What must stand in the files beside a model's weights that name or count experts.

    Raises:
        RequestError: If one does in a way that cannot be followed.
    """
    changed = {}
    for name in set(carried_from(source)[0]) - set(OWN_FILES):
        found = source.find(name)
        new = None if found is None else rewritten_file(found, cut)
        if new is not None:
            changed[name] = new
    return changed


def with_settings(config: Json, cut: Cut) -> Json:
    """A ``config.json`` whose settings of other tools are about the experts that are left.

    Raises:
        RequestError: If they name experts in a way that cannot be followed.
    """

    def changed(values: Mapping[str, Any]) -> Json:
        return {
            key: rewritten({key: value}, cut, "config.json")[key]
            if key in _SETTINGS and isinstance(value, dict)
            else changed(value)
            if key.endswith("_config") and isinstance(value, dict)
            else value
            for key, value in values.items()
        }

    return changed(config)
