# SPDX-License-Identifier: Apache-2.0
"""transformers, and what builds on it."""

from __future__ import annotations

from .target import CHECKPOINT, RUN, Target

TRANSFORMERS = Target(
    name="transformers",
    program="transformers",
    version="5.14+",
    opens=CHECKPOINT,
    uniform="yes",
    unequal="with import optimum_moe_prune, or --standalone",
    quantised="as published",
    evidence=RUN,
)
