# SPDX-License-Identifier: Apache-2.0
"""How large models are before and after pruning, from the headers of their files.

Any file of the family is enough: those of the original, or those of a model that one of the plans left. What a plan
removes is so many experts, and all experts of a layer are of one size.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...architectures.fingerprint import same_routers
from ...compat import quantization_of
from ...errors import MoEPruneError, RequestError
from ...names import DROP, PLAN_NAME, PRUNE
from ...plan import PruningPlan
from ...surgery.heads import way_of_plan
from .text import model_name

if TYPE_CHECKING:
    from ...checkpoints.layout import Layout
    from ...checkpoints.moe_layer import MoELayer
    from ...checkpoints.source import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """Parameters and bytes of weights; the parameters are None in quantised files, which hold other numbers."""

    parameters: int | None
    nbytes: int

    def minus(self, other: Size, times: int = 1) -> Size:
        """Without so many of the other."""
        known = self.parameters is not None and other.parameters is not None
        parameters = (self.parameters or 0) - times * (other.parameters or 0) if known else None
        return Size(parameters, self.nbytes - times * other.nbytes)


@dataclass(frozen=True)
class Family:
    """A model and what can be made of it.

    Attributes:
        made_for: What plans remember of it.
        original_num_experts: Its experts, by layer.
        whole: Its size.
        expert: That of one expert, by layer and head.
        heads: Experts of its heads for further tokens, by the number of their layer.
        all_heads: The size of these heads.
    """

    made_for: Mapping[str, Any]
    original_num_experts: Mapping[int, int]
    whole: Size
    expert: Mapping[int, Size]
    heads: Mapping[int, int]
    all_heads: Size

    def pruned(self, plan: PruningPlan) -> Size | None:
        """What a plan leaves; None if it is for another model."""
        layers = plan.without_heads.original_num_experts
        if layers != self.original_num_experts or not same_routers(self.made_for, plan.made_for):
            return None
        return self.whole.minus(_removed(plan, self))


def find_family(
    plans: Mapping[str, PruningPlan], model: str | os.PathLike | Source | None, folder: Path
) -> Family | None:
    """The model of some plans, if its files can be found.

    Args:
        plans: The plans, with their heads.
        model: The original's folder or Hub id, or those of a model that one of the plans left; None: where the plans
            say that the original is, if that is a folder.
        folder: Of the report, which may stand beside a model's files.

    Raises:
        RequestError: If a given model cannot be read, or is none of the plans'.
    """
    if model is not None:
        found = next((family for plan in plans.values() if (family := _family(plan, _layout(model)))), None)
        if found is None and plans:
            raise RequestError(f"{model} is neither the model that a plan was made for nor one that a plan left.")
        return found
    for plan in plans.values():
        for place in dict.fromkeys([str(plan.made_for.get("name_or_path") or ""), str(folder)]):
            if place and (Path(place) / "config.json").is_file():
                try:
                    if family := _family(plan, _layout(place)):
                        return family
                except (MoEPruneError, OSError, ValueError) as error:
                    logger.info("the size of %s is not known: %s", place, error)
    return None


def where(plans: Iterable[PruningPlan]) -> str:
    """Where the plans say that their model is, by name."""
    names = dict.fromkeys(name for plan in plans if (name := model_name(plan.made_for)))
    return ", ".join(names) or "the model"


def _layout(model: str | os.PathLike | Source) -> Layout:
    from ...checkpoints.layout import open_layout

    return open_layout(model)


def _family(plan: PruningPlan, layout: Layout) -> Family | None:
    """The family, if these are the files of a plan's original or of what it left."""
    layers = plan.without_heads
    if layout.spec.model_type != plan.model_type:
        return None
    found = Family(
        plan.made_for,
        layers.original_num_experts,
        _size_of(layout, layout.checkpoint.tensors),
        {index: _expert(layout, layer) for index, layer in layout.with_heads.items()},
        {head.index: head.layer.num_experts for head in layout.heads if not head.problem},
        _size_of(layout, layout.head_names),
    )
    if layout.num_experts == layers.original_num_experts:
        return found if same_routers(plan.made_for, layout.fingerprints()) else None
    made = _plan_beside(layout)
    if made is None or made.without_heads.retained != layers.retained:
        return None
    heads = made.provenance.get("heads")
    if isinstance(heads, dict) and heads.get("bytes"):
        found = replace(found, all_heads=Size(heads.get("parameters"), heads["bytes"]))
    found = replace(found, heads={**found.heads, **{n: made.original_num_experts[n] for n in made.heads}})
    return replace(found, whole=found.whole.minus(_removed(made, found), -1))


def _size_of(layout: Layout, names: Iterable[str]) -> Size:
    """Of some tensors."""
    tensors = [layout.checkpoint.tensors[name] for name in names]
    quantised = bool(quantization_of(layout.config))
    parameters = None if quantised else sum(math.prod(tensor.shape) for tensor in tensors)
    return Size(parameters, sum(tensor.nbytes for tensor in tensors))


def _plan_beside(layout: Layout) -> PruningPlan | None:
    """The plan that left some files, if it lies beside them: it knows what became of heads."""
    path = Path(layout.checkpoint.name_or_path) / PLAN_NAME
    return PruningPlan.load(path) if path.is_file() else None


def _removed(plan: PruningPlan, family: Family) -> Size:
    """What a plan removes of a model: experts, and heads where it leaves them out."""
    way, counts = way_of_plan(plan), dict(plan.without_heads.num_experts)
    originals = {**family.original_num_experts, **family.heads}
    if way == PRUNE and plan.uniform_num_experts is not None:  # heads that it does not name as well
        counts |= dict.fromkeys(family.heads, plan.uniform_num_experts)
    if way == PRUNE:
        counts |= {head: plan.num_experts[head] for head in plan.heads}
    removed = family.all_heads if way == DROP else Size(0, 0)
    for index, count in counts.items():
        if index in family.expert and index in originals:
            removed = removed.minus(family.expert[index], count - originals[index])
    return removed


def _expert(layout: Layout, layer: MoELayer) -> Size:
    """The size of one expert, with its rows of the router."""
    tensors = layout.checkpoint.tensors
    shares = {name: 1 / max(1, len(layer.experts)) for parts in layer.experts.values() for name in parts.values()}
    for name in (*layer.fused.values(), *layer.router.values()):
        axis = layer.axes.get(name)
        shares[name] = 1 / layer.num_experts if axis is None else axis.each / tensors[name].shape[axis.axis]
    parameters = sum(math.prod(tensors[name].shape) * share for name, share in shares.items())
    nbytes = sum(tensors[name].nbytes * share for name, share in shares.items())
    return Size(None if quantization_of(layout.config) else round(parameters), round(nbytes))
