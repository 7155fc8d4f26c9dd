# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps its experts: found by building it once more, on no device, with twice as many of them.

What then has another shape holds experts, along the axis that grew; what is another number counts them. Nothing is
guessed from names or from sizes that happen to be equal, so no row has to say it, and code that came with a checkpoint
is read in the same way.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from ..compat import ModelConfig, built_like, quantization_of, text_config, unquantised
from ..errors import RequestError
from .spec import MoESpec

_INDEX = re.compile(r"(?:^|\.)(\d+)\.")

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by path."""


@dataclass(frozen=True)
class ExpertAxis:
    """How a tensor holds experts.

    Attributes:
        axis: The dimension.
        each: Its length for one expert.
        extra: Its length beyond all of them: rows that stay.
    """

    axis: int
    each: int = 1
    extra: int = 0

    def count(self, shape: Sequence[int]) -> int:
        """The experts in a tensor of a shape."""
        return (shape[self.axis] - self.extra) // self.each

    def length(self, count: int) -> int:
        """How long the axis of a tensor of ``count`` experts is."""
        return count * self.each + self.extra

    def rows(self, retained: Sequence[int], count: int) -> list[int]:
        """What is left along the axis of a tensor of ``count`` experts."""
        own = [expert * self.each + row for expert in retained for row in range(self.each)]
        return [*own, *range(count * self.each, count * self.each + self.extra)]


@dataclass(frozen=True)
class LayerStructure:
    """One MoE layer. Paths begin at the decoder layer.

    Attributes:
        experts: The module with the experts' tensors.
        router: The module that is called to route.
        logits_from: The tensor whose product with the hidden states are the router's logits.
        tensors: Every tensor that holds experts, those of the experts' module first.
        counts: Attributes in which modules remember a number of experts, with what they count beyond it.
        numbered: Where each expert is a module of its own, in a list: the paths of its tensors below it.
    """

    experts: str
    router: str
    logits_from: str
    tensors: Mapping[str, ExpertAxis]
    counts: Mapping[str, int]
    numbered: tuple[str, ...] = ()

    @property
    def block(self) -> str:
        """The module with both; empty where that is the decoder layer itself."""
        return self.experts.rpartition(".")[0]

    @property
    def expert_tensors(self) -> tuple[str, ...]:
        """The tensors of the experts' module."""
        return tuple(path for path in self.tensors if path.startswith(f"{self.experts}."))

    @property
    def router_tensors(self) -> tuple[str, ...]:
        """All others, the one that makes the logits first."""
        others = [path for path in self.tensors if not path.startswith(f"{self.experts}.")]
        return tuple(sorted(others, key=lambda path: path != self.logits_from))


@dataclass(frozen=True)
class Structure:
    """The MoE layers of a model.

    Attributes:
        layers: Path from the model to its decoder layers.
        moe: The MoE layers by index.
        counts: Attributes outside the layers that remember a number of experts, by path.
    """

    layers: str
    moe: Mapping[int, LayerStructure]
    counts: tuple[str, ...]

    @property
    def decoder(self) -> str:
        """Path from the model to the module that runs the layers."""
        return self.layers.rpartition(".")[0]

    @property
    def where(self) -> tuple[str, str, tuple[str, ...]]:
        """Name of the list of layers, path of the block, and paths below it of the tensors with experts."""
        first = next(iter(self.moe.values()))
        start = len(f"{first.block}." if first.block else "")
        paths = dict.fromkeys(path[start:] for layer in self.moe.values() for path in layer.tensors)
        return self.layers.rpartition(".")[2], first.block, tuple(paths)


def structure_of(model: Any, spec: MoESpec) -> Structure:
    """Where a model, on any device or none, keeps its experts.

    Raises:
        RequestError: If it cannot be told, and why.
    """
    config = model.config
    if quantization_of(config):  # what is built has plain weights
        config = unquantised(config)
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = (type(model), spec, text, getattr(text_config(config), "_attn_implementation", None))
    if key not in _found:
        if len(_found) > 64:
            _found.clear()
        _found[key] = _structure(model, config, spec)
    return _found[key]


_found: dict[Any, Structure] = {}


def _structure(model: Any, config: ModelConfig, spec: MoESpec) -> Structure:
    count_key = spec.key_of_count(config)
    twin = built_like(model, with_more_experts(config, count_key))
    before, after = shapes_of(model), shapes_of(twin)
    grown = _grown(before, after, spec)
    numbered = _numbered(after.keys() - before.keys(), spec, count_key)
    lists = sorted({*grown, *numbered})
    if not lists:
        raise RequestError(
            f"no tensor of this {spec.model_type!r} model grows with {count_key}: no layer has experts, so there is "
            "nothing to prune."
        )
    if len(lists) > 1:
        raise RequestError(
            f"this {spec.model_type!r} model has experts in {' and in '.join(lists)}; one stack of decoder "
            "layers is what can be pruned."
        )
    layers = lists[0]
    tensors, modules = grown.get(layers, {}), numbered.get(layers, {})
    numbers, more = counts_of(model), counts_of(twin)
    counted = {path: value for path, value in numbers.items() if more.get(path, value) != value}
    found = {}
    for index in sorted({*tensors, *modules}):
        start = f"{layers}.{index}."
        counts = {path[len(start) :]: value for path, value in counted.items() if path.startswith(start)}
        each = tuple(sorted(modules.get(index, ())))
        found[index] = _layer(index, tensors.get(index, {}), counts, spec.num_experts(config, index), spec, each)
    outside = tuple(path for path in counted if not path.startswith(f"{layers}."))
    return Structure(layers, found, outside)


def _grown(before: Shapes, after: Shapes, spec: MoESpec) -> dict[str, dict[int, dict[str, Any]]]:
    """List of layers -> layer -> path -> both shapes of a tensor that grows with the number of experts."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, shape in before.items():
        if (more := after.get(name, shape)) == shape:
            continue
        match = _INDEX.search(name)
        if match is None:
            raise RequestError(
                f"{name} of this {spec.model_type!r} model, outside its layers, grows with the number of experts; "
                "such a model cannot be pruned."
            )
        layer = found.setdefault(name[: match.start()], {}).setdefault(int(match[1]), {})
        layer[name[match.end() :]] = shape, more
    return found


def _numbered(more: Iterable[str], spec: MoESpec, count_key: str) -> dict[str, dict[int, set[str]]]:
    """List of layers -> layer -> paths of tensors that further experts have of their own, with * for an expert."""
    found: dict[str, dict[int, set[str]]] = {}
    for name in more:
        places = list(_INDEX.finditer(name))
        if len(places) < 2:
            raise RequestError(
                f"{name} would be there with twice as many of {count_key} in this {spec.model_type!r} model, and is "
                "no part of an expert of a layer; such a model cannot be pruned."
            )
        of_layer, of_expert = places[0], places[1]
        path = f"{name[of_layer.end() : of_expert.start()]}.*.{name[of_expert.end() :]}"
        found.setdefault(name[: of_layer.start()], {}).setdefault(int(of_layer[1]), set()).add(path)
    return found


def _layer(
    index: int,
    tensors: Mapping[str, tuple[tuple[int, ...], ...]],
    counts: Mapping[str, int],
    num: int,
    spec: MoESpec,
    numbered: tuple[str, ...],
) -> LayerStructure:
    axes = {}
    for path, (shape, more) in tensors.items():
        differ = [axis for axis, (a, b) in enumerate(zip(shape, more, strict=True)) if a != b]
        grew = more[differ[0]] - shape[differ[0]]
        if len(differ) != 1 or grew % num or grew <= 0:
            raise RequestError(
                f"layer {index}: {path} of this {spec.model_type!r} model holds experts in no way known."
            )
        axes[path] = ExpertAxis(differ[0], grew // num, shape[differ[0]] - grew)
    owners = {path.rpartition(".")[0] for path, (shape, _) in tensors.items() if len(shape) >= 3}
    owners |= {path.partition(".*.")[0] for path in numbered}
    if len(owners) != 1:
        what = (
            f"experts in {len(owners)} places ({', '.join(sorted(owners))})" if owners else "no experts in one tensor"
        )
        raise RequestError(f"layer {index} of this {spec.model_type!r} model has {what}; that is not supported.")
    experts = owners.pop()
    block = experts.rpartition(".")[0]
    matrices = [path for path, (shape, _) in tensors.items() if len(shape) == 2 and not axes[path].axis]
    logits = [path for path in matrices if not path.startswith(f"{experts}.")]
    if len(logits) != 1:
        raise RequestError(
            f"layer {index} of this {spec.model_type!r} model has {len(logits)} tensors that could make its router's "
            f"logits{': ' if logits else ''}{', '.join(logits)}; one is expected."
        )
    below = logits[0].removeprefix(f"{block}." if block else "")
    router = f"{block}.{below.split('.')[0]}" if block else below.split(".")[0]
    ordered = sorted(axes, key=lambda path: not path.startswith(f"{experts}."))
    offsets = {path: value - num for path, value in counts.items()}
    each = tuple(path.partition(".*.")[2] for path in numbered)
    return LayerStructure(experts, router, logits[0], {path: axes[path] for path in ordered}, offsets, each)


def with_more_experts(config: ModelConfig, count_key: str) -> ModelConfig:
    """A copy of a config with twice as many experts in every layer."""
    config = copy.deepcopy(config)
    text = text_config(config)
    layers = text.to_dict().get("per_layer_config") or {}
    aliases = getattr(type(text), "attribute_map", {})
    if layers:
        text.per_layer_config = None
    count = getattr(text, count_key)
    setattr(text, count_key, [2 * n for n in count] if isinstance(count, list) else 2 * count)
    if layers:
        text.per_layer_config = {
            int(layer): {
                key: 2 * value if aliases.get(key, key) == count_key else value for key, value in values.items()
            }
            for layer, values in layers.items()
        }
    return config


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of parameters and buffers, by path."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def counts_of(model: nn.Module) -> dict[str, int]:
    """Whole numbers that modules remember, by path."""
    return {
        f"{name}.{attribute}" if name else attribute: value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if type(value) is int
    }


@functools.cache
def _getter(path: str) -> Any:
    return attrgetter(path)


def part(module: Any, path: str) -> Any:
    """A part of a module by its path; the module itself where that is empty."""
    return _getter(path)(module) if path else module


def owner(module: Any, path: str) -> tuple[Any, str]:
    """The module that has a tensor or an attribute, and its name there."""
    parent, _, name = path.rpartition(".")
    return part(module, parent), name
