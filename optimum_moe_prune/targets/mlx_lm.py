# SPDX-License-Identifier: Apache-2.0
"""mlx-lm 0.32.2, run on its CPU build.

It builds all layers with the one number of experts that its ``ModelArgs`` read (``mlx_lm/models/*.py``: every
``SwitchGLU`` and ``SwitchMLP`` is made with it), and reads config keys at the top that transformers 5 writes below
``rope_parameters``, or under other names; what it does not find has a default, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.values import Json
from .mlx_models import MODELS, keys_for, refusal
from .target import MLX_FOLDER, RUN, Target, is_uniform

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig


def _check(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    if not is_uniform(counts):
        return "builds all layers with the same number of experts"
    if not _knows(config):
        return None
    quantised = bool(getattr(config, "quantization_config", None))  # as published: transformers 5 saves no such names
    by_5 = str(getattr(config, "transformers_version", "") or "").startswith("5.") and not quantised
    return refusal(config.model_type, config.get_text_config(), by_5)


def _knows(config: ModelConfig) -> bool:
    return getattr(config, "model_type", "") in MODELS


def _config(values: Json, counts: Mapping[int, int]) -> Json:
    model_type = values.get("model_type", "")
    if model_type not in MODELS:
        return values
    text = values.get("text_config")
    if not isinstance(text, dict):
        return {**values, **keys_for(model_type, values)}
    above = {"vocab_size": text["vocab_size"]} if model_type == "gemma4" and "vocab_size" in text else {}
    return {**values, **above, "text_config": {**text, **keys_for(model_type, text)}}


MLX = Target(
    name="mlx",
    program="mlx-lm",
    version="0.32.2",
    opens=MLX_FOLDER,
    uniform="yes",
    unequal="no: one number for all layers",
    quantised="its own: 2 to 8 bits in groups of a row, mxfp4, mxfp8, nvfp4",
    evidence=RUN,
    check=_check,
    config=_config,
    knows=_knows,
)
