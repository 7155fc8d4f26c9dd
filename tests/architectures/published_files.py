# SPDX-License-Identifier: Apache-2.0
"""What the writers of published folders share: a model's tensors and config, and a second model for heads."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from architectures.published_formats import Tensors, read
from architectures.tiny import random_model
from transformers import PreTrainedModel


def saved(model: PreTrainedModel) -> Tensors:
    """A model's tensors under the names transformers saves them with."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return read(Path(folder))


def config_of(model: PreTrainedModel) -> dict[str, object]:
    """A model's configuration as transformers 5 saves it."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def of_version_4(config: dict[str, object], *drop: str, **add: object) -> dict[str, object]:
    """The same configuration as transformers 4 wrote it: other keys for the dtype and for positions."""
    old = {name: value for name, value in config.items() if name not in (*drop, "dtype", "rope_parameters")}
    rope = dict(config["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    return old | {"torch_dtype": config["dtype"], "transformers_version": "4.57.1"} | add


def sibling(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Another random model of the same configuration."""
    return random_model(copy.deepcopy(model.config), seed, model.dtype)


def random_like(tensor: torch.Tensor, seed: int, mean: float = 0.0) -> torch.Tensor:
    """Numbers around ``mean`` in the shape and dtype of a tensor."""
    numbers = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (mean + 0.3 * numbers).to(tensor.dtype)


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    """Every name through regular expressions and their replacements, in order."""
    new: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        assert name not in new
        new[name] = tensor
    return new


def under(tensors: Tensors, prefix: str, new: str) -> Tensors:
    """The tensors below ``prefix``, below ``new``."""
    return {new + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def quantised(tensors: Tensors, pattern: str, to: Callable[[torch.Tensor], Tensors]) -> Tensors:
    """``to(weight)`` in place of every weight whose name the pattern finds."""
    new: Tensors = {}
    for name, tensor in tensors.items():
        if re.search(pattern, name):
            stem = name.removesuffix(".weight")
            new |= {f"{stem}.{end}": part for end, part in to(tensor).items()}
        else:
            new[name] = tensor
    return new
