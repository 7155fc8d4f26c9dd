# SPDX-License-Identifier: Apache-2.0
"""The known programs, by the names of ``--for``."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError, nearest_first
from .llama_cpp import LLAMA_CPP
from .mlx_lm import MLX
from .sglang import SGLANG
from .target import Target
from .transformers_lib import TRANSFORMERS
from .vllm import VLLM

TARGETS: dict[str, Target] = {target.name: target for target in (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX)}
_HEAD = ("for", "program", "version", "opens", "uniform", "unequal", "quantised", "evidence")


def get_target(name: Any) -> Target:
    """A program by its name, in any spelling (``vLLM``, ``mlx-lm``, ``llama_cpp``).

    Raises:
        RequestError: If it is not known.
    """
    for target in TARGETS.values():
        if _letters(str(name)) in (_letters(target.name), _letters(target.program)):
            return target
    raise RequestError(f"target {name!r} is not known. Known: {nearest_first(str(name), [*TARGETS])}.")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def as_table(mark: str = "") -> list[list[str]]:
    """Head and rows of the table of programs, for people.

    Args:
        mark: Put around names, as Markdown marks code.
    """
    rows = []
    for name, target in TARGETS.items():
        facts = (target.program, target.version, target.opens)
        rows.append([f"{mark}{name}{mark}", *facts, target.uniform, target.unequal, target.quantised, target.evidence])
    return [[*_HEAD], *rows]


def facts_of(target: Target) -> dict[str, str]:
    """A row as plain values."""
    return {name: value for name, value in vars(target).items() if isinstance(value, str)}
