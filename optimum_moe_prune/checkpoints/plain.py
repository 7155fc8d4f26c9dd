# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors as a checkpoint that is not quantised would hold them, made when they are read.

Which tensors belong together is told by their names and dtypes, so a checkpoint of which only a part is quantised, or
in several formats, needs nothing more. Nothing but headers is read until a tensor is asked for; one expert at a time
is dequantised, so that no second copy of a layer is ever held.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..compat import ModelConfig, quantization_of
from ..errors import RequestError
from .checkpoint import Checkpoint, SourceTensor
from .dequantise import Block, block_of, four_bits, in_blocks, scaled, whole_numbers

_FP8 = ("F8_E4M3", "F8_E5M2")
_BYTES = ("U8", "I8")
_EXPONENTS = ("U8", "F8_E8M0")
_BESIDE = {
    "_scale_inv": "scale",
    "_scales": "scale",
    "_weight_scale": "scale",
    "_scale": "scale",
    ".scale": "scale",
    ".qscale_weight": "scale",
    "_weight_scale_2": "whole",
    "_scale_2": "whole",
    "_global_scale": "divisor",
    "_shape": "shape",
    "_zero_point": "zero point",
    "_g_idx": "order",
    ".pre_quant_scale": "second scale",
    "_pre_quant_scale": "second scale",
    **dict.fromkeys((".input_scale", "_input_scale", ".input_scale_inv", ".input_global_scale"), "inputs"),
    **dict.fromkeys((".input_zero_point", ".activation_scale", "_activation_scale", ".qscale_act"), "inputs"),
}
"""What the names of tensors beside weights end with -> what they are. After a dot it stands in place of ``weight``."""
_ENDS = sorted(_BESIDE, key=len, reverse=True)
_WITH_SCALES_OF_THEIR_OWN = ("bitsandbytes", "torchao")
"""Methods whose scales have other names (SCB, absmax and quant_state; scale after the name of a subclass's part)."""
_UNREAD = ("zero point", "order", "second scale")


@dataclass
class PlainTensor:
    """A tensor as an unquantised checkpoint would hold it.

    Attributes:
        shape: Its shape.
        parts: What it is made of: ``weight``, ``scale`` ... -> name in the files.
        format: The number format it is stored in; "" where it is as it is.
        fault: Why it cannot be read; "" where it can.
    """

    shape: tuple[int, ...]
    parts: dict[str, str]
    format: str = ""
    fault: str = ""

    @property
    def names(self) -> list[str]:
        """The tensors that are read for it."""
        return [name for role, name in self.parts.items() if role != "inputs"]


@dataclass
class Plain:
    """The tensors of a checkpoint, dequantised as they are read.

    Args:
        checkpoint: The files.
        config: The model's config.

    Attributes:
        tensors: By name.
        owners: Of each tensor in files that is of a quantised one, the name of that.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    tensors: dict[str, PlainTensor] = field(init=False, default_factory=dict)
    owners: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        held = self.checkpoint.tensors
        weights = {_weight_name(name): name for name, tensor in held.items() if _may_be_packed(name, tensor)}
        parts: dict[str, dict[str, str]] = {}
        for name in held:
            owner, role = _beside(name, weights)
            if owner:
                self.owners[name] = owner
                parts.setdefault(owner, {}).setdefault(role, name)
        for name, tensor in held.items():
            if name in self.owners:
                continue
            found = _weight_name(name)
            if weights.get(found) == name:
                made = self._quantised(found, {"weight": name, **parts.get(found, {})})
                if made is not None:
                    self.tensors[found], self.owners[name] = made, found
                    continue
            self.tensors[name] = PlainTensor(tensor.shape, {"weight": name})

    @property
    def formats(self) -> list[str]:
        """The number formats that it is quantised in, as far as they can be read; none where it is not."""
        return sorted({tensor.format for tensor in self.tensors.values() if tensor.format and not tensor.fault})

    @property
    def method(self) -> str:
        """How the config says that it is quantised, or "" where it does not."""
        settings = quantization_of(self.config)
        return str(settings.get("quant_method", "an unnamed method")) if settings else ""

    @property
    def not_read(self) -> str:
        """That it is quantised in a way that is not read here, for a message."""
        return (
            f"{self.checkpoint.name_or_path} is quantised with {self.method!r}, which is not read here. Calibrate "
            "with an unquantised checkpoint; its plan can be applied to this one."
        )

    def check_method(self) -> None:
        """Raise where it is known from the config alone that the weights cannot be read.

        Raises:
            RequestError: Naming what it is quantised with.
        """
        if self.method in _WITH_SCALES_OF_THEIR_OWN:
            raise RequestError(self.not_read)

    def check(self) -> None:
        """Raise if a tensor cannot be read.

        Raises:
            RequestError: Naming it and its file.
        """
        for tensor in self.tensors.values():
            if tensor.fault:
                raise RequestError(tensor.fault)

    def read(self, read: Callable[[str], Tensor], name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in a dtype, in memory of its own.

        Args:
            read: Gives tensors in files (``Checkpoint.reader``).
            name: The tensor.
            dtype: By default float32, of one that is not quantised its own.

        Raises:
            RequestError: If it cannot be read.
            RunError: If it holds NaN or infinity.
        """
        tensor = self.tensors[name]
        if tensor.fault:
            raise RequestError(tensor.fault)
        stored = tensor.parts["weight"]
        if not tensor.format:
            value = self.checkpoint.finite(stored, read(stored))
            return value if dtype is None else value.to(dtype)
        parts = {role: read(part) for role, part in tensor.parts.items() if role != "inputs"}
        shape, dtype = self._shape(tensor, parts), dtype or torch.float32
        if len(shape) == 2:
            return self.checkpoint.finite(stored, self._matrix(tensor.format, parts)).to(dtype)
        made = torch.empty(shape, dtype=dtype, device=parts["weight"].device)
        for expert in range(len(made)):
            own = {role: _of_expert(part, expert, len(made)) for role, part in parts.items()}
            made[expert] = self.checkpoint.finite(stored, self._matrix(tensor.format, own))
        return made

    # -- formats

    def _matrix(self, kind: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers of one matrix, in float32."""
        weight, scale = parts["weight"], parts["scale"]
        if kind == "mxfp4":
            return in_blocks(weight, scale)
        if kind in ("nvfp4", "fp4"):
            whole = parts.get("whole")
            if "divisor" in parts:  # (e4m3 / divisor), rounded, is what compressed-tensors calculates with
                scale = scale.float() / parts["divisor"].float().reshape(())
            return four_bits(weight, scale, None if whole is None else whole.reshape(()))
        if kind.endswith("packed"):
            columns = int(parts["shape"][-1]) if "shape" in parts else weight.shape[-1] * 32 // self._bits
            return whole_numbers(weight, scale, self._bits, columns, self._blocks)
        return scaled(weight, scale, self._blocks)

    def _shape(self, tensor: PlainTensor, parts: Mapping[str, Tensor]) -> tuple[int, ...]:
        """The shape of a tensor; of packed numbers the last ones may only fill it up, which ``weight_shape`` says."""
        if "shape" not in parts:
            return tensor.shape
        rows, columns = parts["shape"].reshape(-1, 2)[0].tolist()
        if rows != tensor.shape[-2] or not 0 <= tensor.shape[-1] - columns < 32 // self._bits:
            why = f"{tensor.parts['shape']} says {(rows, columns)}, which does not fit it"
            raise RequestError(self._fault(tensor.parts, why))
        return (*tensor.shape[:-2], rows, columns)

    def _quantised(self, name: str, parts: dict[str, str]) -> PlainTensor | None:
        """A quantised tensor of a name; None where it is one of eight bits and nothing says that it is quantised."""
        weight, scale = self._of(parts, "weight"), self._of(parts, "scale")
        assert weight is not None
        for role in _UNREAD:
            if role in parts:
                why = f"{parts[role]} is a {role}, which is not read here"
                return PlainTensor(weight.shape, parts, "quantised", self._fault(parts, why))
        if scale is None:
            is_plain = not self.method if weight.dtype in _FP8 else not name.endswith(".weight")
            if is_plain and weight.dtype != "I32":
                return None
            why = "the scale beside it is missing (weight_scale_inv, weight_scale, _scales or scale)"
            fault = self.not_read if self.method in _WITH_SCALES_OF_THEIR_OWN else self._fault(parts, why)
            return PlainTensor(weight.shape, parts, "quantised", fault)
        kind, shape = self._kind(parts, weight, scale)
        fault = ""
        if not kind and weight.dtype == "I32":
            fault = self._fault(parts, "config.json does not say that all whole numbers have 4 bits, or all 8")
        elif not kind:
            fault = self._fault(parts, f"no number format with a scale {scale.dtype} is known here")
        elif not shape:
            fault = self._fault(parts, f"its scale {parts['scale']} has shape {scale.shape}, which does not fit it")
        return PlainTensor(shape or weight.shape, parts, kind or "quantised", fault)

    def _kind(
        self, parts: Mapping[str, str], weight: SourceTensor, scale: SourceTensor
    ) -> tuple[str, tuple[int, ...] | None]:
        """The number format, and the shape of what is stored in it; None where the scale does not fit."""
        shape, grid = weight.shape, scale.shape
        if parts["weight"].endswith("_blocks"):
            fits = shape[:-1] == grid and shape[-1] == 16 and weight.dtype == scale.dtype == "U8"
            return "mxfp4", (*shape[:-3], shape[-2] * 32, shape[-3]) if fits else None
        if weight.dtype == "I32":
            if self._bits not in (4, 8):
                return "", None
            shape = (*shape[:-1], shape[-1] * 32 // self._bits)
            return f"int{self._bits} packed", shape if self._fits(shape, grid) else None
        if weight.dtype in _BYTES and scale.dtype in (*_EXPONENTS, "F8_E4M3"):
            if (scale.dtype == "F8_E4M3") != ("whole" in parts or "divisor" in parts):
                return "", None
            return "nvfp4" if scale.dtype == "F8_E4M3" else "fp4", _unpacked(shape, grid)
        if weight.dtype == "U8" or len(shape) < 2:
            return "", None
        kind = "int8" if weight.dtype == "I8" else "fp8"
        return kind, shape if self._fits(shape, grid) else None

    def _fits(self, shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
        """Whether scales of a shape fit a matrix, or every one of a stack."""
        if math.prod(grid) == 1:
            return True
        if len(shape) == 3:
            if len(grid) == 3 and grid[0] == 1:
                grid = (shape[0], *grid[1:])
            if grid[0] != shape[0]:
                return False
            if len(grid) == 1:
                return True
            shape, grid = shape[1:], grid[1:]
        return len(shape) == 2 and (math.prod(grid) == 1 or block_of(shape, grid, self._blocks) is not None)

    @functools.cached_property
    def _groups(self) -> list[Mapping[str, object]]:
        """What the config of compressed-tensors says about weights, of each kind of modules."""
        groups = quantization_of(self.config).get("config_groups") or {}
        return [group["weights"] for group in groups.values() if isinstance(group, dict) and group.get("weights")]

    @functools.cached_property
    def _blocks(self) -> list[Block]:
        """The blocks of weights that share a scale, which the config names."""
        named = [quantization_of(self.config).get("weight_block_size")]
        named += [group.get("block_structure") for group in self._groups]
        blocks = [(int(block[0]), int(block[1])) for block in named if isinstance(block, (list, tuple))]
        return blocks + [(1, int(str(group["group_size"]))) for group in self._groups if group.get("group_size")]

    @functools.cached_property
    def _bits(self) -> int:
        """Bits of the whole numbers that are packed; 0 where the config says several, or none."""
        bits = {int(str(group["num_bits"])) for group in self._groups if group.get("type") == "int"}
        return bits.pop() if len(bits) == 1 else 0

    # -- helpers

    def _of(self, parts: Mapping[str, str], role: str) -> SourceTensor | None:
        return self.checkpoint.tensors[parts[role]] if role in parts else None

    def _fault(self, parts: Mapping[str, str], why: str) -> str:
        name = parts["weight"]
        tensor = self.checkpoint.tensors[name]
        return (
            f"{tensor.file}: {name} is quantised ({tensor.dtype} {tensor.shape}), and {why}. Calibrate with an "
            "unquantised checkpoint; its plan can be applied to this one."
        )


def _weight_name(name: str) -> str:
    """The name without the end that says how it is stored."""
    return name.removesuffix("_blocks").removesuffix("_packed")


def _may_be_packed(name: str, tensor: SourceTensor) -> bool:
    if tensor.dtype == "I32":
        return name.endswith("_packed")
    return tensor.dtype in (*_FP8, *_BYTES) and len(tensor.shape) >= 2


def _beside(name: str, weights: Mapping[str, str]) -> tuple[str, str]:
    """The weight that a tensor only says how to read, and what it is of it; "" where it does not."""
    for end in _ENDS:
        if name.endswith(end):
            owner = name[: -len(end)] + (".weight" if end[0] == "." else "")
            if owner in weights:
                return owner, _BESIDE[end]
    return "", ""


def _unpacked(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of numbers of which two are in a byte; the dimension they are packed in is the one with groups."""
    if len(shape) != len(grid) or len(shape) < 2:
        return None
    packed = [dim for dim in range(len(shape)) if shape[dim] != grid[dim]]
    if len(packed) != 1 or packed[0] < len(shape) - 2 or not grid[packed[0]]:
        return None
    dim = packed[0]
    if 2 * shape[dim] // grid[dim] not in (16, 32) or 2 * shape[dim] % grid[dim]:
        return None
    return (*shape[:dim], 2 * shape[dim], *shape[dim + 1 :])


def _of_expert(part: Tensor, expert: int, count: int) -> Tensor:
    """What is of one expert in a tensor with something of each; others are of all of them."""
    if part.dim() > 2 and part.shape[0] == 1:
        return part[0]
    return part[expert] if part.dim() and part.shape[0] == count and part.numel() > 1 else part
