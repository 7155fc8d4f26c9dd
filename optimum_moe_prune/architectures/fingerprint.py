# SPDX-License-Identifier: Apache-2.0
"""What tells models apart: a hash of their routers, and what results remember of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..compat import ModelConfig, commit_of_config, name_of_config
from ..storage.values import Json
from .spec import MoESpec

if TYPE_CHECKING:
    from torch import Tensor


_NAMES = ("fingerprint", "fingerprint_bfloat16", "fingerprint_float16")
SKETCH = "router_sketch"
_PROJECTIONS = 16
_MOST_APART = 0.8
"""Relative distance of sketches: quantised to 2 bits a router is 0.45 away, give or take, and another one 1.4."""


def fingerprints_of(layers: Iterable[tuple[int, int, int, Iterable[Tensor]]]) -> Json:
    """The fingerprints of a model from layer index, number of experts, top_k and router tensors of each MoE layer.

    ``fingerprint`` is of the numbers as they are; the others are of the same rounded, so that a model and its files
    know each other whichever precision the model was loaded in, and whether its routers were or were kept as they are.
    ``router_sketch`` is for those whose routers are quantised (:func:`sketch_of`).
    """
    import torch

    digests = {name: hashlib.sha256() for name in _NAMES}
    sketch: dict[str, list[float]] = {}
    for layer, num_experts, top_k, tensors in layers:
        for digest in digests.values():
            digest.update(f"{layer}:{num_experts}:{top_k};".encode())
        for tensor in tensors:
            exact = tensor.detach().float().cpu().contiguous()
            if exact.dim() == 2 and str(layer) not in sketch:
                sketch[str(layer)] = sketch_of(exact)
            every = (exact, exact.to(torch.bfloat16).float(), exact.to(torch.float16).float())
            for digest, values in zip(digests.values(), every, strict=True):
                digest.update(values.numpy().tobytes())
    return {**{name: digest.hexdigest() for name, digest in digests.items()}, SKETCH: sketch}


def sketch_of(router: Tensor) -> list[float]:
    """What is left of a router's weights when they are quantised: random projections of them.

    Args:
        router: Its weight, ``(E, H)``, as the model has it.

    Returns:
        ``signs_E @ router @ signs_H`` for 16 pairs of random signs, the same for every router of this shape.
    """
    weight = router.detach().double().cpu().numpy()
    rows, columns = (_signs(_PROJECTIONS, size) for size in weight.shape)
    return [float(f"{value:.6g}") for value in ((rows @ weight) * columns).sum(axis=1)]


def same_sketch(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool | None:
    """Whether two models have the same routers as far as sketches tell, one of them quantised; None if they do not.

    Args:
        some: By layer, as a plan remembers them (``router_sketch``).
        others: The same of another model.
    """
    if not some or not others:
        return None
    if some.keys() != others.keys():
        return False
    for layer in some:
        mine, other = (np.asarray(values[layer], dtype=float) for values in (some, others))
        if mine.shape != other.shape or np.linalg.norm(mine - other) > _MOST_APART * np.linalg.norm(mine):
            return False
    return True


def _signs(count: int, size: int) -> np.ndarray:
    """Random signs ``(count, size)``, from the bits of a generator that numpy promises never to change."""
    words = np.random.PCG64(size).random_raw(count * -(-size // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8).reshape(count, -1), axis=1)[:, :size]
    return 1.0 - 2.0 * bits


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
