# SPDX-License-Identifier: Apache-2.0
"""Whether a plan was made for the model in a GGUF file: by the numbers in its routers.

Converters keep routers in float32, so they are those of the checkpoint to the last bit, and plans remember a hash of
them. Older files, and those of other tools, have them quantised: they are known by a sketch, which plans remember too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from ...architectures.fingerprint import SKETCH, fingerprints_of, same_routers, same_sketch
from ...errors import RequestError, RunError
from ...plan import PruningPlan
from ...storage.tensor_files import all_finite
from ...storage.values import Json
from .architectures import CENTRED_BIASES
from .model import GgufModel
from .tensors import Block

EXACT, SKETCHED, UNKNOWN = "by their numbers", "by a sketch of their numbers", "not at all"
_EXACT_TYPES = ("F32", "F64")


def proof(plan: PruningPlan, model: GgufModel, blocks: Mapping[int, Block], top_k: int) -> str:
    """How it is known that a plan was made for these routers.

    Args:
        plan: The plan.
        model: The model.
        blocks: Its layers, without heads.
        top_k: Experts of a token.

    Returns:
        ``EXACT``, ``SKETCHED``, or ``UNKNOWN`` where the plan does not say for which routers it was made.

    Raises:
        RequestError: If it was made for others.
        RunError: If a router holds NaN or infinity.
    """
    made_for = plan.made_for
    if "fingerprint" not in made_for and not made_for.get(SKETCH):
        return UNKNOWN
    found: Json = {}
    for others in _choices(blocks):
        found = _facts(model, blocks, others, top_k)
        if "fingerprint" in made_for and same_routers(made_for, found):
            return EXACT
    rounded = {model.tensors[block.router].type_name for block in blocks.values()} - set(_EXACT_TYPES)
    if rounded or model.architecture in CENTRED_BIASES or "fingerprint" not in made_for:
        known = made_for.get(SKETCH)
        same = same_sketch(known, found[SKETCH]) if isinstance(known, dict) else None
        if same is not False:
            return UNKNOWN if same is None else SKETCHED
    raise RequestError(
        f"this plan was made for a model with other router weights ({made_for.get('name_or_path') or 'unnamed'}); "
        f"those of {model.path} are not the same. A plan is applied to the model it was made for, before pruning."
    )


def _choices(blocks: Mapping[int, Block]) -> Iterator[tuple[str, ...]]:
    """What models may count among a router's tensors after its weight, in any order; most have one, or none.

    They are told by the ends of their names, since a layer may lack one that others have.
    """
    ends = dict.fromkeys(_end(name) for block in blocks.values() for name in block.beside)
    for size in range(len(ends), -1, -1):
        yield from itertools.permutations(ends, size)


def _end(name: str) -> str:
    return name.split(".", 2)[2]


def _facts(model: GgufModel, blocks: Mapping[int, Block], others: Sequence[str], top_k: int) -> Json:
    def tensors(block: Block) -> Iterator[torch.Tensor]:
        ends = {_end(name): name for name in block.beside}
        for name in (block.router, *(ends[end] for end in others if end in ends)):
            values = model.values(name)
            if not all_finite(values):
                raise RunError(f"{model.path}: {name} holds NaN or infinite weights; the file is damaged.")
            yield values

    return fingerprints_of(
        (index, model.tensors[block.router].rows, top_k, tensors(block)) for index, block in sorted(blocks.items())
    )
