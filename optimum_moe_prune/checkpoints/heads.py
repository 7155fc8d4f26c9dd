# SPDX-License-Identifier: Apache-2.0
"""Heads that predict further tokens (MTP): decoder layers in files that the model itself is not built with.

Each is a decoder layer with a few tensors around it, under a number after the last (``model.layers.61.``) or in a
place of its own (``mtp.layers.0.``). Inside it tensors are named as in a decoder layer, which is how it is known, and
how it is read: as one more layer like one of the model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from .moe_layer import MoELayer

_EXPERT = re.compile(r"(.*\.)?([0-9]{1,6})\.(.+?)")
_NUMBER = re.compile("[0-9]{1,6}")
_ITS_PLACE = re.compile(r"(^|[._])(mtp|nextn)")


@dataclass
class Head:
    """One head.

    Attributes:
        index: The layer it counts as: after the model's last one.
        prefix: What the names of its decoder layer's tensors begin with, where those of a layer have its number.
        like: The MoE layer of the model that has the same tensors.
        layer: Its experts and router.
        problem: Why they are not those of a MoE layer; empty where they are.
    """

    index: int
    prefix: str
    like: int
    layer: MoELayer = field(default_factory=lambda: MoELayer(0))
    problem: str = ""


def find_heads(
    names: Collection[str], outside: Iterable[str], layers: Mapping[int, MoELayer], num_layers: int
) -> tuple[list[Head], list[str]]:
    """The heads of a checkpoint, in the order of their numbers, and experts that are of no layer and no head.

    Args:
        names: All tensors.
        outside: Those that the model has no parameter for.
        layers: The model's MoE layers.
        num_layers: Its decoder layers.
    """
    prefixes = {index: prefix_of(layer, index) for index, layer in layers.items()}
    parents = {prefix[: -len(f"{index}.")] for index, prefix in prefixes.items()}
    layer, prefix = layers[max(layers)], prefixes[max(layers)]
    routers = [name.removeprefix(prefix) for name in layer.router.values()]
    fused = [name.removeprefix(prefix) for name in layer.fused.values()]
    numbered = next((n for tensors in layer.experts.values() for n in tensors.values()), "").removeprefix(prefix)
    match = _EXPERT.fullmatch(numbered)
    block = "" if match is None else match[1] or ""
    found: set[str] = set()
    foreign = []
    for name in outside:
        place = _place_of_expert(name, fused, block)
        if place is not None and not any(f".{name}".endswith(f".{tail}") for tail in routers):
            if _is_head(place, parents, num_layers):
                found.add(place)
            else:
                foreign.append(name)
    ordered = sorted(found, key=lambda prefix: [int(number) for number in _NUMBER.findall(prefix)])
    like = _likenesses(names, prefixes, ordered)
    return [Head(num_layers + k, place, like[place]) for k, place in enumerate(ordered)], foreign


def prefix_of(layer: MoELayer, index: int) -> str:
    """What the names of a decoder layer's tensors begin with."""
    name = next(iter(layer.router.values()), "") or layer.names[0]
    match = re.match(rf"(.*?\.)??{index}\.", name)
    return "" if match is None else match[0]


def names_of_heads(heads: Iterable[Head], outside: Collection[str], inside: Iterable[str]) -> list[str]:
    """All tensors of heads: those of their decoder layers, and what stands beside these in a place of the heads' own.

    Args:
        heads: The heads.
        outside: The tensors that the model has no parameter for.
        inside: All others.
    """
    taken = {name[: end.end()] for name in inside for end in re.finditer(r"\.", name)}
    roots = []
    for head in heads:
        starts = [head.prefix[: end.end()] for end in re.finditer(r"\.", head.prefix)]
        roots.append(next(start for start in [*starts, head.prefix] if start not in taken))
    return [
        name
        for name in outside
        if roots and (name.startswith(tuple(roots)) or any(_ITS_PLACE.match(part) for part in name.split(".")))
    ]


def _is_head(prefix: str, parents: Collection[str], num_layers: int) -> bool:
    """Whether a decoder layer is a head: numbered after the model's last, or in a place that is called so."""
    parent, _, number = prefix.rstrip(".").rpartition(".")
    if f"{parent}." in parents and _NUMBER.fullmatch(number):
        return int(number) >= num_layers
    return any(_ITS_PLACE.match(part) for part in prefix.split("."))


def _place_of_expert(name: str, fused: Iterable[str], block: str) -> str | None:
    """The prefix of the decoder layer that a tensor of experts is in; None for any other tensor.

    Args:
        name: The tensor.
        fused: How tensors with all experts are called below a decoder layer of the model.
        block: What stands there before an expert's number.
    """
    match = _EXPERT.fullmatch(name)
    if block and match is not None and f".{match[1] or ''}".endswith(f".{block}"):
        return (match[1] or "")[: -len(block)]
    for tail in fused:
        if f".{name}".endswith(f".{tail}"):
            return name[: -len(tail)]
    otherwise = re.fullmatch(r"(.*\.)?[^.]+\.experts\.(\d+\..+|[^.]+)", name)  # laid out otherwise than the model
    return None if otherwise is None else otherwise[1] or ""


def _likenesses(names: Iterable[str], layers: Mapping[int, str], heads: Collection[str]) -> dict[str, int]:
    """For each head the layer with the most tensors of the same names, experts aside; of equals the last."""
    if not heads:
        return {}
    by_prefix: dict[str, set[str]] = {prefix: set() for prefix in (*layers.values(), *heads)}
    for name in names:
        if ".experts." in name:
            continue
        for end in re.finditer(r"\.", name):
            if (start := name[: end.end()]) in by_prefix:
                by_prefix[start].add(name[end.end() :])
    return {
        head: max(layers, key=lambda index: (len(by_prefix[layers[index]] & by_prefix[head]), index)) for head in heads
    }
