# SPDX-License-Identifier: Apache-2.0
"""How experts are cut out of a checkpoint, whatever its layout: what is retained of each tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import RequestError
from ..plan import PruningPlan
from .layout import Layout


@dataclass(frozen=True)
class Piece:
    """What is retained of a source tensor.

    Attributes:
        source: Its name there.
        dtype: As the format names it.
        shape: The shape of what is retained.
        nbytes: Its bytes.
        rows: The retained rows of the first dimension, or None for all.
        checked: Whether NaN and infinity in it are an error.
    """

    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    rows: tuple[int, ...] | None = None
    checked: bool = False


def select(plan: PruningPlan, layout: Layout) -> dict[str, Piece]:
    """What a plan retains of each tensor, under its new name, in the order of the source.

    Raises:
        RequestError: If the plan is for another model, or a tensor cannot be pruned.
        RunError: If a router holds NaN or infinity.
    """
    checkpoint, spec = layout.checkpoint, layout.spec
    for index in sorted(set(layout.num_experts) ^ set(plan.original_num_experts)):
        if index in layout.num_experts:
            raise RequestError(f"this plan is for another model: it does not name layer {index}, which has experts.")
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no experts of layer {index}, which the plan names; the "
            "checkpoint is damaged."
        )
    changed: dict[str, tuple[str, tuple[int, ...] | None] | None] = {}  # name -> new name and rows, or None: pruned
    for index, layer in layout.layers.items():
        retained = plan.retained[index]
        number_of = {old: new for new, old in enumerate(retained)}
        for number, tensors in layer.experts.items():
            for path, name in tensors.items():
                if number not in number_of:
                    changed[name] = None
                    continue
                start = name[: -len(f"{number}.{path}")]
                changed[name] = (f"{start}{number_of[number]}.{path}", None)
        rows = None if len(retained) == layer.num_experts else retained
        for name in layer.fused.values():
            changed[name] = (name, rows)
        for path, name in layer.router.items():
            whole = path not in spec.router_tensors and math.prod(checkpoint.tensors[name].shape) == 1
            changed[name] = (name, None if whole else rows)
    pieces = {}
    for name, tensor in checkpoint.tensors.items():
        new = changed.get(name, (name, None))
        if new is None:
            continue
        new_name, kept = new
        shape, nbytes = tensor.shape, tensor.nbytes
        if kept is not None:
            if nbytes % shape[0]:
                raise RequestError(f"{name} ({tensor.dtype}) cannot be cut between rows: they share bytes.")
            shape, nbytes = (len(kept), *shape[1:]), nbytes // shape[0] * len(kept)
        assert new_name not in pieces  # the layout holds each tensor once
        pieces[new_name] = Piece(name, tensor.dtype, shape, nbytes, kept, checked=name in changed)
    return pieces
