# SPDX-License-Identifier: Apache-2.0
"""transformers, as continuous integration runs it in its oldest and newest supported version."""

from __future__ import annotations

from .target import CHECKPOINT, RUN, Target

TRANSFORMERS = Target(
    name="transformers",
    program="transformers",
    version="5.14+",
    opens=CHECKPOINT,
    uniform="yes",
    unequal="after import optimum_moe_prune, or with --standalone",
    quantised="as published",
    evidence=RUN,
)
