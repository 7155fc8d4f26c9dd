# SPDX-License-Identifier: Apache-2.0
"""How many parameters and bytes a checkpoint has, those of each routed expert apart; before and after a cut."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import add

from ..compat import build_on_meta
from .layout import Layout
from .moe_layer import MoELayer

SCALE_BITS = 0.5
"""What formats of 8 bits and less add to each weight: a 16-bit scale for 32 weights, or scale and offset for 64."""
OTHER_BITS = 16
"""What those formats keep embeddings, heads, routers and norms in."""


@dataclass(frozen=True)
class Size:
    """Parameters and bytes.

    Attributes:
        parameters: Numbers.
        quantisable: Those of them in matrices that quantisation compresses: of experts, attention and dense layers,
            not of embeddings, heads and routers.
        nbytes: Bytes in the files.
    """

    parameters: int = 0
    quantisable: int = 0
    nbytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.parameters + other.parameters,
            self.quantisable + other.quantisable,
            self.nbytes + other.nbytes,
        )

    def times(self, count: int) -> Size:
        """So many of it; a negative number takes away."""
        return Size(count * self.parameters, count * self.quantisable, count * self.nbytes)

    def at(self, bits: int | None) -> int:
        """Bytes once quantised.

        Args:
            bits: Of a weight; None is as the files are. Below 16 a weight takes ``SCALE_BITS`` more, and what is not
                quantisable keeps ``OTHER_BITS``.
        """
        if bits is None:
            return self.nbytes
        each = bits if bits >= OTHER_BITS else bits + SCALE_BITS
        others = self.parameters - self.quantisable
        return math.ceil((self.quantisable * each + others * max(bits, OTHER_BITS)) / 8)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        whole: All of it.
        experts: One routed expert of each MoE layer, with its part of the router.
        num_experts: Experts of each MoE layer.
        head_experts: One routed expert of each head for further tokens, by its index as a layer.
        heads: All of the heads.
    """

    whole: Size
    experts: dict[int, Size]
    num_experts: dict[int, int]
    head_experts: dict[int, Size] = field(default_factory=dict)
    heads: Size = Size()

    def after(self, retained: Mapping[int, int], drop_heads: bool = False) -> Size:
        """What is left when layers keep so many experts.

        Args:
            retained: Experts by layer; layers that are absent keep all. Heads are named by their index as a layer.
            drop_heads: Whether the heads are left out.
        """
        left = self.whole + (self.heads.times(-1) if drop_heads else Size())
        each = self.experts if drop_heads else {**self.experts, **self.head_experts}
        for layer, count in retained.items():
            if layer in each:
                left += each[layer].times(count - self.num_experts[layer])
        return left


def parameters_in_words(count: int) -> str:
    """A number of parameters: ``4.97 M``, ``46.7 B``."""
    return _scaled(count, "B", "M")


def bytes_in_words(count: int) -> str:
    """A number of bytes: ``9.93 MB``, ``93.4 GB``."""
    return _scaled(count, "GB", "MB")


def _scaled(count: int, large: str, small: str) -> str:
    return f"{count / 1e9:.3g} {large}" if count >= 1e9 else f"{count / 1e6:.3g} {small}"


def sizes_of(layout: Layout) -> Sizes:
    """The sizes of a checkpoint; of quantised ones parameters are those of the plain numbers."""
    every, plain = layout.checkpoint.tensors, layout.plain
    quantisable = _quantisable(layout)
    parts = {
        name: Size(
            count := math.prod(tensor.shape),
            count if name in quantisable else 0,
            sum(every[part].nbytes for part in tensor.parts.values()),
        )
        for name, tensor in plain.tensors.items()
    }
    heads = set(layout.head_names)
    layers = layout.with_heads
    experts = {index: _expert(layout, layer, parts) for index, layer in layers.items()}
    return Sizes(
        total(parts.values()),
        {index: experts[index] for index in layout.layers},
        {index: layer.num_experts for index, layer in layers.items()},
        {index: size for index, size in experts.items() if index not in layout.layers},
        total(size for name, size in parts.items() if heads.intersection(plain.tensors[name].names)),
    )


def total(sizes: Iterable[Size]) -> Size:
    """The sum of sizes."""
    return functools.reduce(add, sizes, Size())


def _expert(layout: Layout, layer: MoELayer, parts: Mapping[str, Size]) -> Size:
    """One expert of a layer: its own tensors, or its rows of those of all."""
    owners = layout.plain.owners

    def of(names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(owners.get(name, name) for name in names))

    size = Size()
    if layer.experts:
        size += total(parts.get(name, Size()) for name in of(next(iter(layer.experts.values())).values()))
    rows = [*layer.fused.values(), *layer.router.values()]
    for name in of(rows):
        named = next(n for n in rows if owners.get(n, n) == name)
        axis = layer.axes[named]
        length = layout.checkpoint.tensors[named].shape[axis.axis]
        whole = parts.get(name, Size())
        size += Size(*(number * axis.each // length for number in (whole.parameters, whole.quantisable, whole.nbytes)))
    return size


def _quantisable(layout: Layout) -> set[str]:
    """The plain tensors that quantisation compresses: matrices, but for embeddings, heads and routers."""
    model = build_on_meta(layout.config, trust_remote_code=layout.checkpoint.source.trust_remote_code)
    ends = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    words = {name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in ends}
    routers = {name for layer in layout.with_heads.values() for name in layer.router.values()}
    return {
        name
        for name, tensor in layout.plain.tensors.items()
        if len(tensor.shape) >= 2
        and min(tensor.shape[-2:]) > 1
        and not routers.intersection(tensor.names)
        and not words.intersection(name.split("."))
    }
