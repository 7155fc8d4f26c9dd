# SPDX-License-Identifier: Apache-2.0
"""What tells models apart: a hash of their routers, and what results remember of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..compat import ModelConfig, commit_of_config, name_of_config
from ..storage.values import Json
from .spec import MoESpec

if TYPE_CHECKING:
    from torch import Tensor


_NAMES = ("fingerprint", "fingerprint_bfloat16", "fingerprint_float16")


def fingerprints_of(layers: Iterable[tuple[int, int, int, Iterable[Tensor]]]) -> Json:
    """The fingerprints of a model from layer index, number of experts, top_k and router tensors of each MoE layer.

    ``fingerprint`` is of the numbers as they are; the others are of the same rounded, so that a model and its files
    know each other whichever precision the model was loaded in, and whether its routers were or were kept as they are.
    """
    import torch

    digests = {name: hashlib.sha256() for name in _NAMES}
    for layer, num_experts, top_k, tensors in layers:
        for digest in digests.values():
            digest.update(f"{layer}:{num_experts}:{top_k};".encode())
        for tensor in tensors:
            exact = tensor.detach().float().cpu().contiguous()
            every = (exact, exact.to(torch.bfloat16).float(), exact.to(torch.float16).float())
            for digest, values in zip(digests.values(), every, strict=True):
                digest.update(values.numpy().tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def same_routers(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether two models, by what is remembered of them, have the same routers, perhaps in another precision.

    Of what an earlier version remembers there is one fingerprint, of numbers in the precision it was loaded in. What
    remembers none is not compared. In float16 one of the two has to be as it is: nobody has both only rounded.
    """
    ours, theirs = ({name: facts[name] for name in _NAMES if name in facts} for facts in (some, others))
    if not ours or not theirs:
        return True
    half = _NAMES[-1]
    return any(
        mine == other and not name == another == half
        for name, mine in ours.items()
        for another, other in theirs.items()
    )


def facts_of(spec: MoESpec, config: ModelConfig, fingerprints: Json, dense_layers: list[int]) -> Json:
    """What statistics and plans remember of the model they were made for (``storage/FORMATS.md``)."""
    return {
        "model_type": spec.model_type,
        "top_k": spec.routing(config).top_k,
        **fingerprints,
        "dense_layers": dense_layers,
        **({} if spec.found is None else {"routing": spec.found[0]}),
        "name_or_path": name_of_config(config),
        "revision": commit_of_config(config),
    }
