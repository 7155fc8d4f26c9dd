# SPDX-License-Identifier: Apache-2.0
"""How experts are cut out of a checkpoint, whatever its layout: what is retained of each tensor.

Bytes are copied, nothing is quantised anew: an expert's scales and shapes travel with it. The few small tensors whose
experts do not lie one after the other, and tables of ids, are made here and held until they are written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..architectures.tables import remapped
from ..errors import RequestError
from ..plan import PruningPlan
from .layout import Layout
from .moe_layer import MoELayer


@dataclass(frozen=True)
class Piece:
    """What is retained of a source tensor.

    Attributes:
        source: Its name there.
        dtype: As the format names it.
        shape: The shape of what is retained.
        nbytes: Its bytes.
        rows: The retained rows of the first dimension, or None for all.
        data: The bytes themselves, where they are not the source's.
        checked: Whether NaN and infinity in it are an error.
    """

    source: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    rows: tuple[int, ...] | None = None
    data: bytes | None = field(default=None, repr=False)
    checked: bool = False


def select(plan: PruningPlan, layout: Layout, left_out: Collection[str] = ()) -> dict[str, Piece]:
    """What a plan retains of each tensor, under its new name, in the order of the source.

    Args:
        plan: The plan.
        layout: The checkpoint.
        left_out: Tensors that are left out whole.

    Raises:
        RequestError: If the plan is for another model, or a tensor cannot be pruned.
        RunError: If a router holds NaN or infinity.
    """
    checkpoint = layout.checkpoint
    for index in sorted(set(layout.num_experts) - set(plan.original_num_experts)):
        raise RequestError(f"this plan is for another model: it does not name layer {index}, which has experts.")
    for index in sorted(set(plan.original_num_experts) - set(layout.with_heads)):
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no experts of layer {index}, which the plan names; the "
            "checkpoint is damaged."
        )
    changed: dict[str, Piece | None] = dict.fromkeys(left_out)  # by name in the source; None: pruned
    names: dict[str, str] = {}  # new names
    layers = {index: layer for index, layer in layout.with_heads.items() if index in plan.retained}
    for index, layer in layers.items():
        retained = plan.retained[index]
        _select_numbered(
            layer.experts, [*retained, *range(layer.num_experts, layer.num_experts + layer.fixed)], changed, names
        )
        if len(retained) == layer.num_experts:
            continue
        for name, axis in layer.axes.items():
            changed[name] = _cut(layout, name, axis.axis, tuple(axis.rows(retained, layer.num_experts)))
        if layer.table:
            changed[layer.table] = _remapped(layout, layer, index, retained)
    pieces = {}
    routed = {name for layer in layers.values() for name in layer.axes}
    for name, tensor in checkpoint.tensors.items():
        checked = name in routed or name in names
        piece = changed.get(name, Piece(name, tensor.dtype, tensor.shape, tensor.nbytes, checked=checked))
        if piece is None:
            continue
        new_name = names.get(name, name)
        assert new_name not in pieces  # the layout holds each tensor once
        pieces[new_name] = piece
    return pieces


def _select_numbered(
    experts: Mapping[int, Mapping[str, str]],
    retained: Sequence[int],
    changed: dict[str, Piece | None],
    names: dict[str, str],
) -> None:
    """Drop the tensors of experts that go, and number those that stay."""
    number_of = {old: new for new, old in enumerate(retained)}
    for number, tensors in experts.items():
        for path, name in tensors.items():
            if number not in number_of:
                changed[name] = None
            else:
                names[name] = f"{name[: -len(f'{number}.{path}')]}{number_of[number]}.{path}"


def _cut(layout: Layout, name: str, axis: int, rows: tuple[int, ...]) -> Piece:
    """A tensor without the rows of experts that go."""
    tensor = layout.checkpoint.tensors[name]
    shape = (*tensor.shape[:axis], len(rows), *tensor.shape[axis + 1 :])
    if axis == 0:
        if tensor.nbytes % tensor.shape[0]:
            raise RequestError(f"{name} ({tensor.dtype}) cannot be cut between rows: they share bytes.")
        nbytes = tensor.nbytes // tensor.shape[0] * len(rows)
        return Piece(name, tensor.dtype, shape, nbytes, rows, checked=True)
    return _made(layout, name, _read(layout, name).index_select(axis, torch.tensor(rows)))


def _remapped(layout: Layout, layer: MoELayer, index: int, retained: Sequence[int]) -> Piece:
    """A table of ids that names the retained experts."""
    router = layer.router[layout.structure_of(index).logits_from]
    return _made(layout, layer.table, remapped(_read(layout, layer.table), _read(layout, router), retained))


def _read(layout: Layout, name: str) -> Tensor:
    with layout.checkpoint.reader() as read:
        return layout.checkpoint.finite(name, read(name)).clone()


def _made(layout: Layout, name: str, value: Tensor) -> Piece:
    tensor, value = layout.checkpoint.tensors[name], value.contiguous()
    data = value.flatten().view(torch.uint8).numpy().tobytes()
    return Piece(name, tensor.dtype, tuple(value.shape), len(data), data=data, checked=True)
