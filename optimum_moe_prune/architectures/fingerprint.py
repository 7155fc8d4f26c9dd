# SPDX-License-Identifier: Apache-2.0
"""What tells models apart: a hash of their routers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor


def fingerprint_of(layers: Iterable[tuple[int, int, int, Iterable[Tensor]]]) -> str:
    """The fingerprint of a model from layer index, number of experts, top_k and router tensors of each MoE layer."""
    digest = hashlib.sha256()
    for layer, num_experts, top_k, tensors in layers:
        digest.update(f"{layer}:{num_experts}:{top_k};".encode())
        for tensor in tensors:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
