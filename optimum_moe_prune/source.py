# SPDX-License-Identifier: Apache-2.0
"""What is known of a model before its weights are read: its config, its MoE layers, the plan that made it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .architectures import architecture_of, list_architectures
from .architectures.block import moe_blocks
from .errors import RequestError
from .plan import PLAN_NAME, PruningPlan
from .shards import commit_of, find_file


def moe_layers(model_config: Any) -> tuple[dict[int, int], int]:
    """Experts in each MoE layer, and the experts used per token, from a config alone (a model without weights)."""
    with torch.device("meta"):
        blocks = moe_blocks(AutoModelForCausalLM.from_config(model_config))
    return {block.layer: block.num_experts for block in blocks}, blocks[0].routing.top_k


def load_model_config(name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """The config of a model whose architecture is known.

    Args:
        name_or_path: Its folder or Hub id.
        kwargs: Passed to ``AutoConfig.from_pretrained``.

    Raises:
        RequestError: If there is no model, or it is not a known Mixture-of-Experts model.
    """
    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise RequestError(f"{name_or_path} is not a model's folder: it has no config.json.")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **kwargs)
    except Exception as error:  # a config can be wrong in as many ways as there are model types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"no model can be read from {str(name_or_path)!r}: {first} Known architectures: "
            f"{', '.join(list_architectures())}."
        ) from error
    architecture_of(config)
    config._commit_hash = commit_of(name_or_path, kwargs)  # transformers no longer says which one it was
    return config


def stored_plan(name_or_path: str | os.PathLike, hub: Mapping[str, Any]) -> PruningPlan | None:
    """The plan in a checkpoint that this package made, or None."""
    stored = find_file(name_or_path, PLAN_NAME, hub)
    return None if stored is None else PruningPlan.load(stored)
