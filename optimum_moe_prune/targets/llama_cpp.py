# SPDX-License-Identifier: Apache-2.0
"""llama.cpp as in llama-cpp-python 0.3.36, run here: what was compared stands in ``formats/README.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .target import GGUF, RUN, Target, is_uniform

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig


def _check(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    return None if is_uniform(counts) else "reads one number for all layers (expert_count)"


LLAMA_CPP = Target(
    name="llama.cpp",
    program="llama.cpp",
    version="as in llama-cpp-python 0.3.36",
    opens=GGUF,
    uniform="yes",
    unequal="no: one expert_count for all layers",
    quantised="every type, cut as blocks",
    evidence=RUN,
    check=_check,
)
