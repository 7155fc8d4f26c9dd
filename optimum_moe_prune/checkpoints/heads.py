# SPDX-License-Identifier: Apache-2.0
"""Heads that predict further tokens (MTP): MoE layers in files that no layer of the model is.

Each is a decoder layer with a few tensors around it, under a number after the last (``model.layers.61.``) or in a
place of its own (``mtp.layers.0.``). Its tensors are named as those of the model's MoE layers, which is how it is
known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .moe_layer import MoELayer

_EXPERT = re.compile(r"(.*\.)?([0-9]{1,6})\.(.+?)")


@dataclass
class Head:
    """The tensors of one head, by name in the checkpoint.

    Attributes:
        index: The layer it counts as: after the model's last one.
        prefix: What the names of its MoE block's tensors begin with, where those of a layer have its number.
        experts: By expert, where each has tensors of its own: path below the expert -> name.
        fused: Tensors with all experts in the first dimension -> name.
        router: Tensors with something of each expert: path as in :class:`MoELayer` -> name.
        others: All else of it.
    """

    index: int
    prefix: str
    experts: dict[int, dict[str, str]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    router: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """All its tensors."""
        numbered = [name for tensors in self.experts.values() for name in tensors.values()]
        return [*numbered, *self.fused.values(), *self.router.values(), *self.others]


def find_heads(names: Iterable[str], layers: Mapping[int, MoELayer], num_layers: int) -> list[Head]:
    """The heads among the tensors that belong to no MoE layer, in the order of their numbers.

    Args:
        names: Those tensors.
        layers: The model's MoE layers.
        num_layers: Its decoder layers.
    """
    index, layer = max(layers.items())
    of_layer = re.compile(rf"(?:^|.*?\.){index}\.(.+)")

    def tail(name: str) -> str:
        match = of_layer.fullmatch(name)
        return name if match is None else match[1]

    tails: dict[str, tuple[str, str]] = {}  # the end of a name, below its layer -> what it is, and its path
    for path, name in layer.router.items():
        tails[tail(name)] = ("router", path)
    for path, name in layer.fused.items():
        tails[tail(name)] = ("fused", path)
    numbered = ""
    for tensors in layer.experts.values():
        for name in tensors.values():
            match = _EXPERT.fullmatch(tail(name))
            assert match is not None
            numbered = match[1] or ""
            break
        break
    heads: dict[str, Head] = {}
    rest = []
    for name in names:
        found = _place(name, tails, numbered, num_layers)
        if found is None:
            rest.append(name)
            continue
        prefix, kind, path, number = found
        head = heads.setdefault(prefix, Head(0, prefix))
        if kind == "expert":
            head.experts.setdefault(number, {})[path] = name
        else:
            getattr(head, kind)[path] = name
    complete = [head for head in heads.values() if head.experts or head.fused]
    for number, head in enumerate(
        sorted(complete, key=lambda head: [int(n) for n in re.findall("[0-9]{1,6}", head.prefix)])
    ):
        head.index = num_layers + number
        head.others = [name for name in rest if name.startswith(head.prefix)]
    return complete


def _place(
    name: str, tails: Mapping[str, tuple[str, str]], numbered: str, num_layers: int
) -> tuple[str, str, str, int] | None:
    """What a head's tensor is: the head's prefix, its kind, its path, and its expert's number."""
    match = _EXPERT.fullmatch(name)
    if numbered and match is not None and f".{match[1] or ''}".endswith(f".{numbered}"):
        return (match[1] or "")[: -len(numbered)], "expert", match[3], int(match[2])
    for end, (kind, path) in tails.items():
        if f".{name}".endswith(f".{end}"):
            return name[: -len(end)], kind, path, 0
    if match is not None and re.search(r"(^|\.)experts\.$", match[1] or ""):
        block = (match[1] or "")[: -len("experts.")]
        return block[: block.rstrip(".").rfind(".") + 1], "expert", match[3], int(match[2])
    fused = re.fullmatch(r"(.*\.)?([^.]+\.experts\.)(.+)", name)
    if fused is not None:
        return fused[1] or "", "fused", fused[3], 0
    return None
