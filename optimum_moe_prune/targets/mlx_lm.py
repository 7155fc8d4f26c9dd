# SPDX-License-Identifier: Apache-2.0
"""mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.values import Json
from .target import MLX_FOLDER, READ, Target, is_uniform

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig


def _check(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    return None if is_uniform(counts) else "it builds every layer with the same number of experts"


def _config(values: Json, counts: Mapping[int, int]) -> Json:
    return values


MLX = Target(
    name="mlx",
    program="mlx-lm",
    version="0.32.2",
    opens=MLX_FOLDER,
    uniform="yes",
    unequal="no",
    quantised="its own, in groups of a row",
    evidence=READ,
    check=_check,
    config=_config,
)
