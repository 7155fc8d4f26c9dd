# SPDX-License-Identifier: Apache-2.0
"""Under which names files of a model type hold experts and routers, for tools that know no models."""

from __future__ import annotations

from dataclasses import dataclass

from ..compat import WeightNames, build_on_meta, default_config
from ..errors import RequestError
from .structure import structure_of
from .table import find_architecture


@dataclass(frozen=True)
class Patterns:
    """Names with ``{layer}`` and ``{expert}`` in place of numbers.

    Attributes:
        count_key: The config's key for the number of experts.
        tensors: ``router``, ``expert`` (the beginning of names, where each has tensors of its own) and
            ``fused_experts``.
        modules: How the names of a layer's experts begin in the model in memory, behind what stands before the list
            of layers: ``layers.{layer}.mlp.experts``.
    """

    count_key: str
    tensors: dict[str, list[str]]
    modules: str


def patterns_of_type(model_type: str) -> Patterns | None:
    """The names for a model type of transformers; None where it is not known, or has no model of its own."""
    try:
        config = default_config(model_type)
        spec = find_architecture(config)
        if spec is None:
            return None
        model = build_on_meta(config)
        structure = structure_of(model, spec)
    except (LookupError, ValueError, RequestError):
        return None
    index, layer = max(structure.moe.items())
    names = WeightNames(model)

    def named(path: str) -> list[str]:
        start = f"{structure.layers}.{{layer}}."
        found = names.in_files(f"{structure.layers}.{index}.{path}")
        return [start + name.partition(f".{index}.")[2] for name in found]

    found = [named(path) for path in layer.expert_tensors]
    fused = [names_of[place] for place in range(len(found[0])) for names_of in found if place < len(names_of)]
    blocks = dict.fromkeys(name.rpartition(".")[0] for name in fused)
    return Patterns(
        spec.key_of_count(config),
        {
            "router": [name for path in layer.router_tensors for name in named(path)],
            "expert": [f"{block}.{{expert}}." for block in blocks],
            "fused_experts": fused,
        },
        f"{structure.layers.rpartition('.')[2]}.{{layer}}.{layer.experts}",
    )
