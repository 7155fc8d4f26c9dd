# SPDX-License-Identifier: Apache-2.0
"""Which programs open a pruned checkpoint that lies in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig

from ..architectures.substitution import OPENED
from ..architectures.table import architecture_of
from ..errors import RequestError
from ..names import STANDALONE_STEM
from ..plan import PruningPlan
from ..targets.table import opened_by
from ..targets.target import CHECKPOINT


def opened_in_words(folder: str | os.PathLike, plan: PruningPlan) -> str:
    """The programs, in words that follow "opened by"; empty where the config is one of code that came with the model.

    Args:
        folder: The checkpoint.
        plan: That it was pruned by.
    """
    if "substitution" in plan.provenance:
        return OPENED
    try:
        config = AutoConfig.from_pretrained(folder)
        spec = architecture_of(config)
    except (OSError, ValueError, LookupError, RequestError):
        return ""
    standalone = (Path(folder) / f"{STANDALONE_STEM}.py").is_file()
    counts, made_for = plan.without_heads.num_experts, plan.config.get("target")
    return opened_by(CHECKPOINT, spec, config, counts, standalone, made_for)
