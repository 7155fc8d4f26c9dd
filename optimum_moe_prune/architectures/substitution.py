# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in which some experts are left out and answer with a constant: how they are written, and who reads them.

The layout is that of MoNE (arXiv 2507.00390) as vLLM reads it (0.33.0, ``layers/fused_moe/expert_substitution.py`` and
``models/expert_substitution.py``): ``config.json`` lists the experts of each layer under ``approximate_experts``, the
router is whole and every count stays what it was, retained experts keep their numbers, and of an expert that is left
out there is one vector, ``<experts>.<number>.approx_value``. Routing does not change: what an expert that is left out
adds is its vector times the weight that the router gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..compat import ModelConfig, text_config
from ..errors import RequestError

READER = "vLLM"
READER_VERSION = "0.33"
OPENED = (
    f"{READER} {READER_VERSION} (read in source), on one GPU or with tensor parallelism; not by transformers, SGLang, "
    "mlx-lm"
)
"""Which programs open such a checkpoint, in words that follow "opened by"."""
KEY = "approximate_experts"
SUFFIX = ".approx_value"

MODEL_TYPES = frozenset(
    {
        "afmoe",
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5_moe",
        "exaone_moe",
        "glm4_moe",
        "lfm2_moe",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Types whose experts vLLM builds in the one way that takes it, and loads by the numbers in their names: its default
class of experts, neither weights of the router on what goes into experts nor a transform of that."""

DTYPES = ("F32", "BF16", "F16")
"""What experts' tensors have to be, in files: quantised ones are refused."""

_NAME = re.compile(r"(.+)\.(\d{1,6})" + re.escape(SUFFIX))


def name_of_constant(experts: str, number: int) -> str:
    """The name of an expert's vector.

    Args:
        experts: How the names of the layer's experts begin, without the dot.
        number: The expert's.
    """
    return f"{experts}.{number}{SUFFIX}"


def constants_in(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Of the names of tensors those of vectors: by name how the experts' names begin, and the expert's number."""
    found = {name: _NAME.fullmatch(name) for name in names}
    return {name: (match[1], int(match[2])) for name, match in found.items() if match is not None}


def substituted_in(config: ModelConfig) -> dict[int, tuple[int, ...]]:
    """The experts that answer with a constant, by layer; none in every other checkpoint.

    Raises:
        RequestError: If what the config says of them is damaged.
    """
    said: Any = None
    for part in (text_config(config), config):
        said = getattr(part, KEY, None) if said is None else said
    if said is None:
        return {}
    try:
        if not isinstance(said, Mapping):
            raise TypeError(said)
        listed = {int(layer): sorted(map(int, experts or ())) for layer, experts in said.items()}
        if any(layer < 0 or min(experts, default=0) < 0 for layer, experts in listed.items()):
            raise ValueError(said)
        if any(len({*experts}) < len(experts) for experts in listed.values()):
            raise ValueError(said)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{KEY} in config.json is damaged: it must be lists of experts by layer, and is {said!r}."
        ) from error
    return {layer: tuple(experts) for layer, experts in sorted(listed.items()) if experts}


def check_whole(config: ModelConfig, name: str) -> None:
    """Raise unless a checkpoint holds all experts of its layers, as far as its config says.

    Args:
        config: The model's.
        name: Its folder or Hub id.

    Raises:
        RequestError: If some answer with a constant.
    """
    if substituted_in(config):
        raise RequestError(
            f"{name} leaves experts out that answer with a constant ({KEY} in its config.json): {READER} "
            f"{READER_VERSION} opens it, and evaluate measures it. Prune the original, or apply the plan in it to "
            "that one."
        )
