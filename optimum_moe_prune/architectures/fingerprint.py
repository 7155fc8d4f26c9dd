# SPDX-License-Identifier: Apache-2.0
"""What tells models apart: a hash of their routers, and what results remember of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor

from ..compat import ModelConfig, commit_of_config, name_of_config
from ..storage.values import Json
from .spec import MoESpec


def fingerprint_of(layers: Iterable[tuple[int, int, int, Iterable[Tensor]]]) -> str:
    """The fingerprint of a model from layer index, number of experts, top_k and router tensors of each MoE layer."""
    digest = hashlib.sha256()
    for layer, num_experts, top_k, tensors in layers:
        digest.update(f"{layer}:{num_experts}:{top_k};".encode())
        for tensor in tensors:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def facts_of(spec: MoESpec, config: ModelConfig, fingerprint: str, dense_layers: list[int]) -> Json:
    """What statistics and plans remember of the model they were made for (``storage/FORMATS.md``)."""
    return {
        "model_type": spec.model_type,
        "top_k": spec.routing(config).top_k,
        "fingerprint": fingerprint,
        "dense_layers": dense_layers,
        "name_or_path": name_of_config(config),
        "revision": commit_of_config(config),
    }
