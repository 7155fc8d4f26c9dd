# SPDX-License-Identifier: Apache-2.0
"""SGLang 0.5.23."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .target import CHECKPOINT, READ, Target, is_uniform

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig


def _count_multiple(spec: MoESpec, config: ModelConfig, parallel_size: int) -> int:
    return parallel_size


def _check(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    return None if is_uniform(counts) else "it builds every layer with the same number of experts"


SGLANG = Target(
    name="sglang",
    program="SGLang",
    version="0.5.23",
    opens=CHECKPOINT,
    uniform="yes",
    unequal="no",
    quantised="as published",
    evidence=READ,
    parallel="devices that share the experts",
    count_multiple=_count_multiple,
    check=_check,
)
