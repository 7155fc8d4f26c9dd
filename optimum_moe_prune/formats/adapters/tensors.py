# SPDX-License-Identifier: Apache-2.0
"""Which part of each tensor of an adapter belongs to the experts that are left.

PEFT stacks the adapters of a parameter of three dimensions, of E experts and rank R, in two matrices: ``lora_A``
``(E * R, in)``, expert after expert, and ``lora_B`` ``(out, R * E)``, in which the experts of one rank lie side by
side. A matrix with a row for each expert, as a router's, has one adapter, of whose ``lora_B`` ``(E, R)`` rows go, and
with them magnitudes (DoRA) and biases. Experts that are modules of their own are numbered anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...architectures.spec import MoESpec
from ...architectures.structure import ExpertAxis, Structure
from ...architectures.tables import remapped
from ...compat import WeightNames
from ...errors import RequestError
from ...plan import PruningPlan
from ...storage.tensor_files import TensorEntry
from .injected import PREFIX, Wrapped

_LORA = re.compile(r"(?P<module>.+?)(?P<inside>(?:\.base_layer)*)\.(?P<part>lora_\w+?)(?P<end>\.weight|\.bias)?")
_NUMBER = re.compile(r"(.*\.)([0-9]{1,6})\.(.+)")
_BY_ROW = {"lora_B.weight": 0, "lora_B.bias": 0, "lora_magnitude_vector": 0, "lora_magnitude_vector.weight": 0}
"""What has a row for each of a matrix's rows."""


def module_of(name: str) -> str:
    """The module of the model that a tensor of an adapter is for, as the files name it."""
    name = name.removeprefix(PREFIX)
    match = _LORA.fullmatch(name)
    if match is not None:
        return match["module"]
    return _plain(name).rpartition(".")[0]


def _plain(name: str) -> str:
    """The model's own name of a tensor that was trained whole."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")


@dataclass(frozen=True)
class Kept:
    """What is kept of a tensor.

    Attributes:
        name: Its new name.
        dim: The dimension of which only a part is kept.
        index: That part; None for all.
        table: Of a table of experts' ids: the tensor with the router's rows, and the experts that are left.
    """

    name: str
    dim: int = 0
    index: tuple[int, ...] | None = field(default=None, repr=False)
    table: tuple[str, tuple[int, ...]] | None = field(default=None, repr=False)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is kept of a tensor of a shape."""
        if self.index is None:
            return tuple(shape)
        return (*shape[: self.dim], len(self.index), *shape[self.dim + 1 :])

    def of(self, value: Tensor, router: Tensor | None = None) -> Tensor:
        """The part of a tensor that is kept."""
        if self.table is not None and router is not None:
            return remapped(value, router, self.table[1]).contiguous()
        return value if self.index is None else value.index_select(self.dim, torch.tensor(self.index)).contiguous()


@dataclass(frozen=True)
class Places:
    """Where a model has its experts, and an adapter its tensors.

    Attributes:
        spec: The architecture.
        structure: The model's.
        names: Which parameter a name in files is for.
        layers: Modules and parameters with an adapter, by the path at which PEFT wraps them.
        plan: The plan.
    """

    spec: MoESpec
    structure: Structure
    names: WeightNames
    layers: Mapping[str, Wrapped]
    plan: PruningPlan

    def kept(self, name: str, tensors: Mapping[str, TensorEntry]) -> Kept | None:
        """What is kept of a tensor of an adapter; None of one of an expert that goes.

        Raises:
            RequestError: If it is about experts in a way that cannot be cut.
        """
        match = _LORA.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            return self._of_plain(name, tensors)
        module, inside, part = match["module"], match["inside"], match["part"] + (match["end"] or "")
        if (expert := self._expert(f"{module}.weight")) is not None:
            return self._numbered(name, *expert)
        wrapped = self.layers.get(module + inside)
        parameter = f"{module}.weight" if wrapped is None else f"{wrapped.module}.{wrapped.parameter}"
        layer, axis = self._axis(self.names.parameter_of(parameter)[0])
        rows = self._rows(layer, axis)
        if axis is None or rows is None:
            return Kept(name)
        if wrapped is not None and wrapped.stacked:
            return self._stacked(name, part, wrapped, axis.length(self._count(layer)), rows, tensors[name])
        dims: Mapping[str, int | None] = (
            {**_BY_ROW, "lora_A.weight": None} if axis.axis == 0 else {"lora_A.weight": 1, "lora_B.weight": None}
        )
        if part not in dims:
            raise RequestError(f"{name} of the adapter is about experts, in a way that is not known here.")
        dim = dims[part]
        return Kept(name) if dim is None else self._along(name, dim, rows, axis, layer, tensors[name])

    def _of_plain(self, name: str, tensors: Mapping[str, TensorEntry]) -> Kept | None:
        """As :meth:`kept`, of a tensor that was trained whole: of modules_to_save, or a bias."""
        plain = _plain(name)
        if (expert := self._expert(plain)) is not None:
            return self._numbered(name, *expert)
        target = self.names.parameter_of(plain)[0]
        layer, axis = self._axis(target)
        if (
            axis is None
            and layer in self.plan.retained
            and target.endswith(f".{getattr(self.spec.form, 'table', '')}")
        ):
            logits = f"{self.structure.layers}.{layer}.{self.structure.moe[layer].logits_from}"
            router = next((other for other in tensors if other.removeprefix(PREFIX) == logits), None)
            if router is None:
                raise RequestError(f"{name} of the adapter names experts by number, and {logits} is not beside it.")
            return Kept(name, table=(router, self.plan.retained[layer]))
        rows = self._rows(layer, axis)
        return (
            Kept(name)
            if axis is None or rows is None
            else self._along(name, axis.axis, rows, axis, layer, tensors[name])
        )

    def is_numbered(self, name: str) -> bool:
        """Whether a tensor is of one expert alone."""
        match = _LORA.fullmatch(name.removeprefix(PREFIX))
        return self._expert(_plain(name) if match is None else f"{match['module']}.weight") is not None

    def is_routed(self, module: str) -> bool:
        """Whether a module holds experts, or is a router or part of one."""
        index, path = self._inside(module)
        found = self.structure.moe.get(index)
        return found is not None and any(
            f"{path}.".startswith(f"{start}.") for start in (found.experts, found.router) if start
        )

    def rows_are_experts(self, wrapped: Wrapped) -> bool:
        """Whether a matrix with an adapter has a row, or a column, for each expert."""
        layer, axis = self._axis(f"{wrapped.module}.{wrapped.parameter}")
        return not wrapped.stacked and self._rows(layer, axis) is not None

    # -- where a tensor belongs

    def _inside(self, parameter: str) -> tuple[int, str]:
        """The MoE layer of a parameter, and its path below that; -1 for others."""
        match = re.fullmatch(rf"{re.escape(self.structure.layers)}\.([0-9]{{1,6}})\.(.+)", parameter)
        index = -1 if match is None else int(match[1])
        return (index, match[2]) if match is not None and index in self.structure.moe else (-1, "")

    def _axis(self, parameter: str) -> tuple[int, ExpertAxis | None]:
        """The layer of a parameter, and how it holds experts, if it does."""
        index, path = self._inside(parameter)
        return index, None if index < 0 else self.structure.moe[index].tensors.get(path)

    def _count(self, layer: int) -> int:
        return self.plan.original_num_experts[layer]

    def _rows(self, layer: int, axis: ExpertAxis | None) -> list[int] | None:
        """What is left along an axis; None where nothing goes."""
        retained = self.plan.retained.get(layer)
        if axis is None or retained is None or len(retained) == self._count(layer):
            return None
        return axis.rows(retained, self._count(layer))

    def _expert(self, name: str) -> tuple[int, int, int, int] | None:
        """Layer and number of the expert that a tensor is of alone, and where in the name the number stands."""
        target, _, converter = self.names.parameter_of(name)
        index, path = self._inside(target)
        if index < 0 or not path.startswith(f"{self.structure.moe[index].experts}."):
            return None
        found = self.structure.moe[index]
        if found.numbered:
            last = found.experts.rpartition(".")[2]
            match = re.fullmatch(rf"(.*?\.{re.escape(last)}\.)([0-9]{{1,6}})\.(.+)", name)
        elif converter is not None and any("*" in pattern for pattern in converter.source_patterns):
            match = _NUMBER.fullmatch(name)
        else:
            return None
        return None if match is None else (index, int(match[2]), match.start(2), match.end(2))

    # -- what is kept of it

    def _numbered(self, name: str, layer: int, number: int, begin: int, end: int) -> Kept | None:
        retained = self.plan.retained.get(layer)
        if retained is None:
            return Kept(name)
        count = self._count(layer)
        if number >= count + self._fixed(layer):
            raise RequestError(
                f"{name} of the adapter is of expert {number}, and layer {layer} of the original has {count}: the "
                "adapter is of another model."
            )
        if number >= count:  # one that is never pruned, after the others
            new = number - count + len(retained)
        elif number not in retained:
            return None
        else:
            new = retained.index(number)
        start = len(name) - len(name.removeprefix(PREFIX))
        return Kept(f"{name[: start + begin]}{new}{name[start + end :]}")

    def _fixed(self, layer: int) -> int:
        found = self.structure.moe[layer]
        return max((axis.extra for path, axis in found.tensors.items() if path in found.expert_tensors), default=0)

    def _along(self, name: str, dim: int, rows: list[int], axis: ExpertAxis, layer: int, entry: TensorEntry) -> Kept:
        length = axis.length(self._count(layer))
        if len(entry.shape) <= dim or entry.shape[dim] != length:
            raise RequestError(
                f"{name} of the adapter has shape {list(entry.shape)}, and one for the original has {length} in "
                f"dimension {dim}: it is of another model, or of another rank than its adapter_config.json says."
            )
        return Kept(name, dim, tuple(rows))

    def _stacked(
        self, name: str, part: str, wrapped: Wrapped, experts: int, rows: list[int], entry: TensorEntry
    ) -> Kept:
        """Of the matrices in which the adapters of experts lie: see the top of this file."""
        rank = wrapped.rank
        if part not in ("lora_A.weight", "lora_B.weight"):
            raise RequestError(f"{name} of the adapter is about experts, in a way that is not known here.")
        dim = 0 if part == "lora_A.weight" else 1
        if len(entry.shape) != 2 or entry.shape[dim] != experts * rank:
            raise RequestError(
                f"{name} of the adapter has shape {list(entry.shape)}, and one of {experts} experts and rank {rank} "
                f"has {experts * rank} in dimension {dim}: it is of another model, or of another rank than its "
                "adapter_config.json says."
            )
        if len(rows) == 1 and wrapped.transposed:
            raise RequestError(
                f"{wrapped.module}.{wrapped.parameter} would be left with one expert, whose adapter PEFT multiplies "
                "the other way round; retain two in each layer, or merge the adapter before pruning."
            )
        if dim == 0:
            return Kept(name, 0, tuple(row * rank + r for row in rows for r in range(rank)))
        return Kept(name, 1, tuple(r * experts + row for r in range(rank) for row in rows))
