# SPDX-License-Identifier: Apache-2.0
"""What an MLX folder is known by: names of tensors, and small files. Nothing heavy is imported for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...storage.values import Json

STACKS = ("switch_mlp", "switch_glu", "experts")
"""What mlx-lm calls the module with all experts of a layer."""
BESIDE = ("scales", "biases", "global_scale")
"""What lies beside a quantised weight."""
LAYER = re.compile(r"(?:(.*?)\.)?layers\.(\d{1,6})\.(.+)")
"""A tensor of a decoder layer: what stands before, its index, the path below it."""
INDEX = "model.safetensors.index.json"
_MOST_HEADER = 100 * 2**20  # what the library allows
_OF_A_PROJECTION = re.compile(r".*\.(?:weight|bias|scales|biases|global_scale)")


def is_mlx_folder(path: Path) -> bool:
    """Whether a folder is one that mlx-lm opens: by its config, and the names and metadata of its tensors."""
    config = _json(path / "config.json")
    if not config:
        return False
    quantization = config.get("quantization")
    if isinstance(quantization, dict) and {"group_size", "bits"} <= quantization.keys():
        return True
    weight_map = _json(path / INDEX).get("weight_map")
    files = sorted(path.glob("model*.safetensors"))
    header = _header(files[0]) if files else {}
    names = [*weight_map] if isinstance(weight_map, dict) else [*header]
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and metadata.get("format") == "mlx":
        return not any(re.search(r"\.experts\.\d+\.", name) for name in names)  # else in the layout of the original
    return holds_stacks(name for name in names if ".switch_" in name)


def holds_stacks(names: Iterable[str]) -> bool:
    """Whether some tensors are experts as mlx-lm stacks them."""
    found = (LAYER.fullmatch(name) for name in names)
    return any(match is not None and stack_of(match[3].split(".")) is not None for match in found)


def stack_of(parts: Sequence[str]) -> int | None:
    """Where in a path below a layer the module with stacked experts stands; None where there is none.

    ``mlp.switch_mlp.up_proj.scales``: 1. Experts with tensors of their own, by number, are not stacked.
    """
    place = len(parts) - 3
    if place < 0 or parts[place] not in STACKS or parts[place + 1].isdigit():
        return None
    return place if _OF_A_PROJECTION.fullmatch(".".join(parts)) else None


def _json(path: Path) -> Json:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _header(path: Path) -> Json:
    """The header of a safetensors file that need not be whole."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            values = json.loads(file.read(length)) if length <= _MOST_HEADER else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
