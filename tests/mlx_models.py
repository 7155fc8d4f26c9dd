# SPDX-License-Identifier: Apache-2.0
"""Models as mlx-lm opens and answers them, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune.targets.mlx_lm import MLX

pytest.importorskip("mlx_lm", reason="mlx-lm wants Python 3.11, and Linux or macOS")
import mlx.core as mx
from mlx import nn
from mlx_lm.utils import load_model, quantize_model, save_config, save_model


def opened(folder: Path) -> nn.Module:
    """A folder as mlx-lm opens it."""
    return load_model(folder)[0]


def answers(model: nn.Module, ids: Tensor) -> Tensor:
    """Its logits, in float32."""
    return torch.from_numpy(np.array(model(mx.array(ids.numpy())).astype(mx.float32)))


def saved_for_mlx(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint with the keys that mlx-lm reads."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(MLX.config(json.loads(path.read_text()), {})))
    return folder


def converted(checkpoint: Path, folder: Path, bits: int | None = None, group: int = 32, mode: str = "affine") -> Path:
    """An MLX folder, as ``mlx_lm.convert`` makes it, but for the tokenizer."""
    model, config = load_model(checkpoint)
    if bits is not None:
        model, config = quantize_model(model, config, group, bits, mode=mode)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


class _Masked(nn.Module):
    """A router's matrix, the logits of experts that are pruned at minus infinity."""

    def __init__(self, router: nn.Module, retained: tuple[int, ...]) -> None:
        super().__init__()
        self.router = router
        self._retained = list(retained)

    def __call__(self, x: mx.array) -> mx.array:
        logits = self.router(x)
        mask = np.full(logits.shape[-1], -np.inf, dtype=np.float32)
        mask[self._retained] = 0
        return logits + mx.array(mask).astype(logits.dtype)


def mask(model: nn.Module, retained: dict[int, tuple[int, ...]]) -> None:
    """Keep a model from choosing experts that a plan prunes: the oracle of cut folders."""
    for index, kept in retained.items():
        layer = model.layers[index]
        block = layer.mlp if "mlp" in layer else layer.block_sparse_moe
        bias = block.gate.get("e_score_correction_bias")
        if bias is None:
            block.gate = _Masked(block.gate, kept)
        else:
            low = np.full(bias.shape, -1e4, dtype=np.float32)
            low[list(kept)] = np.array(bias.astype(mx.float32))[list(kept)]
            block.gate.e_score_correction_bias = mx.array(low)
