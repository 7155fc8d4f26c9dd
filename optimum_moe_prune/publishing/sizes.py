# SPDX-License-Identifier: Apache-2.0
"""How large a pruned checkpoint is, and how large its original was: by its files and its plan alone."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import AutoConfig

from ..architectures.substitution import constants_in
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.layout import find_layout
from ..checkpoints.sizes import bytes_in_words, parameters_in_words
from ..errors import MoEPruneError
from ..plan import PruningPlan
from ..storage.values import Json
from .plain import mapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes of the weights on disk.

    Attributes:
        parameters: Of the original, and of the pruned model.
        nbytes: The same.
    """

    parameters: tuple[int, int]
    nbytes: tuple[int, int]

    def in_words(self) -> str:
        """One line."""
        parameters = " -> ".join(map(parameters_in_words, self.parameters))
        on_disk = " -> ".join(map(bytes_in_words, self.nbytes))
        before, after = self.nbytes
        return f"{parameters} parameters, {on_disk} on disk ({1 - after / before:.0%} smaller)"

    def to_dict(self) -> Json:
        """As plain JSON values."""
        names = ("original", "pruned")
        values = (("parameters", self.parameters), ("bytes", self.nbytes))
        return {what: dict(zip(names, counts, strict=True)) for what, counts in values}


def sizes_of(plan: PruningPlan, folder: str | os.PathLike) -> Sizes | None:
    """The sizes of a pruned checkpoint; the original's follow from what is left of its layers.

    None where they cannot be known: the weights are no safetensors files, or do not fit the plan.

    Args:
        plan: By which it was pruned.
        folder: The checkpoint.
    """
    try:
        checkpoint = Checkpoint.open(folder)
        if constants := constants_in(checkpoint.tensors):
            return _beside_constants(checkpoint, constants)
        # Code in the folder does not run for a card, and nobody is asked about it.
        layout = find_layout(checkpoint, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (MoEPruneError, OSError, ValueError) as error:
        logger.warning("the card says nothing of sizes: %s", error)
        return None
    parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    dropped = mapping(plan.provenance.get("heads"))
    removed_parameters, removed_bytes = (_count(dropped.get(key)) for key in ("parameters", "bytes"))
    for index, layer in layout.with_heads.items():
        experts = [name for tensors in layer.experts.values() for name in tensors.values()]
        tensors = [checkpoint.tensors[name] for name in (*experts, *layer.fused.values(), *layer.router.values())]
        removed = plan.original_num_experts.get(index, layer.num_experts) - layer.num_experts  # a kept head is unnamed
        removed_parameters += removed * sum(math.prod(tensor.shape) for tensor in tensors) // layer.num_experts
        removed_bytes += removed * sum(tensor.nbytes for tensor in tensors) // layer.num_experts
    return Sizes((parameters + removed_parameters, parameters), (checkpoint.nbytes + removed_bytes, checkpoint.nbytes))


def _beside_constants(checkpoint: Checkpoint, constants: Mapping[str, tuple[str, int]]) -> Sizes:
    """The sizes of a checkpoint whose experts answer with constants in part: each had as much as those beside it."""
    now = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    parameters, nbytes = now, checkpoint.nbytes
    for experts in {experts for experts, _ in constants.values()}:
        here = {name: t for name, t in checkpoint.tensors.items() if name.startswith(f"{experts}.")}
        vectors = [here.pop(name) for name in constants if name in here]
        retained = len({name.removeprefix(f"{experts}.").partition(".")[0] for name in here})
        parameters -= sum(math.prod(t.shape) for t in vectors)
        parameters += len(vectors) * sum(math.prod(t.shape) for t in here.values()) // retained
        nbytes += len(vectors) * sum(t.nbytes for t in here.values()) // retained - sum(t.nbytes for t in vectors)
    return Sizes((parameters, now), (nbytes, checkpoint.nbytes))


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
