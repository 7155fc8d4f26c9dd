# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a MoE layer in files are what its config says: all there, and of the right shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..architectures.structure import Structure
from ..errors import RequestError
from ..storage.tensor_files import TORCH_DTYPES
from .checkpoint import Checkpoint
from .moe_layer import MoELayer
from .plain import Plain

Shapes = Mapping[str, tuple[int, ...]]
_PLAIN = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class LayerChecks:
    """Checks the layers of one checkpoint.

    Attributes:
        checkpoint: The files.
        structure: Where the model has its experts.
        plain: Its tensors as plain numbers.
        parameters: The shapes of the model's parameters.
    """

    checkpoint: Checkpoint
    structure: Structure
    plain: Plain
    parameters: Shapes

    def check(self, layer: MoELayer, index: int, like: int) -> None:
        """Raise unless a layer's tensors are all there, in the shapes of the parameters of the layer that it is like.

        Args:
            layer: Its tensors.
            index: What it is called.
            like: The layer of the model that it is like; itself, but for heads.

        Raises:
            RequestError: Naming the tensor and its file, or what is missing.
        """
        checkpoint, count, found = self.checkpoint, layer.num_experts, self.structure.moe[like]
        where = f"layer {index} of {checkpoint.name_or_path}"
        if layer.experts and layer.fused:
            one = next(iter(layer.experts[min(layer.experts)].values()))
            raise RequestError(
                f"{where} holds its experts twice, one by one ({one}) and fused ({next(iter(layer.fused.values()))})."
            )
        if not layer.experts and not layer.fused:
            raise RequestError(f"{where} has a router and no experts; the checkpoint is damaged.")
        if layer.experts:
            self._check_numbered(where, layer)
        else:
            for name in list(layer.fused.values()):
                tensor = checkpoint.tensors[name]
                if math.prod(tensor.shape) == 1 and count > 1:
                    layer.whole.append(name)
                    del layer.axes[name]
                elif not tensor.shape or tensor.shape[0] != layer.axes[name].length(count):
                    raise RequestError(
                        f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {count} experts."
                    )
        expected = self._elements(like)
        elements = self._elements_in_files(layer)
        if elements is not None and elements != expected:
            raise RequestError(
                f"{where}: an expert has {elements} weights, and config.json says {expected}; the checkpoint or its "
                "config is damaged."
            )
        for path in found.router_tensors:
            if path not in layer.router:
                raise RequestError(f"{where}: the router's {path} is missing.")
            name = layer.router[path]
            tensor, axis = checkpoint.tensors[name], found.tensors[path]
            whole = list(self.parameters[f"{self.structure.layers}.{like}.{path}"])
            whole[axis.axis] = axis.length(count)  # a head may have another number of experts
            shape = tuple(whole)
            if tensor.shape != shape and TORCH_DTYPES.get(tensor.dtype) is not None:
                raise RequestError(f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {shape}.")
        for name, axis in layer.axes.items():
            tensor = checkpoint.tensors[name]
            if len(tensor.shape) <= axis.axis or tensor.shape[axis.axis] != axis.length(count):
                raise RequestError(
                    f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {count} experts."
                )

    def _elements(self, index: int) -> int:
        """The weights of one expert, by the parameters of the model."""
        start, found, parameters = f"{self.structure.layers}.{index}", self.structure.moe[index], self.parameters
        if found.numbered:
            return sum(math.prod(parameters[f"{start}.{found.experts}.0.{path}"]) for path in found.numbered)
        shapes = [parameters[f"{start}.{path}"] for path in found.expert_tensors]
        return sum(math.prod(shape[1:]) for shape in shapes)

    def _check_numbered(self, where: str, layer: MoELayer) -> None:
        """Check experts with tensors of their own: all there, and alike."""
        checkpoint, count = self.checkpoint, layer.num_experts
        beyond = [number for number in layer.experts if number >= count + layer.fixed]
        if beyond:
            name = next(iter(layer.experts[min(beyond)].values()))
            raise RequestError(
                f"{checkpoint.tensors[name].file}: {name} is there, and config.json says {count} experts (0 to "
                f"{count - 1})."
            )
        paths = {path for number, tensors in layer.experts.items() if number < count for path in tensors}
        for number in range(count):
            have = layer.experts.get(number, {})
            for path in sorted(paths - set(have)):
                pattern = next(name for t in layer.experts.values() if path in t for name in [t[path]])
                known = next(n for n, t in layer.experts.items() if path in t)
                name = pattern.replace(f".{known}.{path}", f".{number}.{path}")
                raise RequestError(f"{name} is missing in {checkpoint.name_or_path}; the other experts have it.")
        for projection in layer.projections:
            if not any(path == projection or path.startswith(f"{projection}.") for path in paths):
                some = ", ".join(sorted(next(iter(layer.experts.values()))))
                raise RequestError(f"{where}: no expert has {projection!r}; its experts have {some}.")
        for number, tensors in layer.experts.items():
            for path, name in tensors.items():
                expected = layer.projections.get(path.removesuffix("_packed").removesuffix(".weight"), ())
                tensor, first = checkpoint.tensors[name], checkpoint.tensors[layer.experts[0][path]]
                shape = self._plain_shape(name)
                if expected and shape and shape != expected:
                    raise RequestError(f"{tensor.file}: {name} has shape {shape}, and config.json says {expected}.")
                if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                    raise RequestError(
                        f"{tensor.file}: {name} is {tensor.dtype} {tensor.shape}, and that of expert 0 {first.dtype} "
                        f"{first.shape} (expert {number})."
                    )

    def _elements_in_files(self, layer: MoELayer) -> int | None:
        """The weights of one expert, by the files; None where it is not known how they are packed."""
        held = layer.experts[min(layer.experts)].values() if layer.experts else layer.fused.values()
        shapes = [self._plain_shape(name) for name in held if not self._is_beside(name)]
        if None in shapes:
            return None
        return sum(math.prod(shape or ()) for shape in shapes) // (1 if layer.experts else layer.num_experts)

    def _is_beside(self, name: str) -> bool:
        """Whether a tensor only says how to read another."""
        return self.plain.tensors[self.plain.owners.get(name, name)].parts["weight"] != name

    def _plain_shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight as plain numbers; None where it is not known how it is packed, or it is beside one."""
        plain = self.plain.tensors[self.plain.owners.get(name, name)]
        is_known = plain.format or self.checkpoint.tensors[name].dtype in _PLAIN
        return plain.shape if is_known and not plain.fault and not self._is_beside(name) else None
