# SPDX-License-Identifier: Apache-2.0
"""The known programs, by the names of ``--for``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, nearest_first
from .llama_cpp import LLAMA_CPP
from .mlx_lm import MLX
from .sglang import SGLANG
from .target import CHECKPOINT, GGUF, READ, RUN, Target, is_uniform
from .transformers_lib import TRANSFORMERS
from .vllm import VLLM

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig

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
    raise RequestError(
        f"target is {name!r}, and no program of that name is known. Known: {nearest_first(str(name), [*TARGETS])}."
    )


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def opened_by(
    form: str,
    spec: MoESpec,
    config: ModelConfig,
    counts: Mapping[int, int],
    standalone: bool = False,
    made_for: str | None = None,
) -> str:
    """Which of the known programs open a pruned model, in words that follow "opened by".

    Args:
        form: What is written (``CHECKPOINT``, ``GGUF``, ``MLX_FOLDER``).
        spec: The architecture.
        config: The model's config, before or after pruning.
        counts: Experts of its MoE layers.
        standalone: Whether code that loads unequal layers without this package lies beside.
        made_for: The target whose keys are written, whatever the config says.
    """
    takes, refuses = [], []
    for target in TARGETS.values():
        if not _can_open(target, form, made_for) or not target.knows(config):
            continue
        if target.check(spec, config, counts, 1) is not None:
            refuses.append(target.title)
        elif not _writes_keys(made_for, target) and (keys := target.lacks(config)):
            refuses.append(f"{target.title} (it reads {keys}, which --for {target.name} writes)")
        else:
            takes.append(target.title + _condition(target, is_uniform(counts), standalone))
    said = ", ".join(takes) or "no program that is known here"
    return f"{said}; not by {', '.join(refuses)}" if refuses else said


def _can_open(target: Target, form: str, made_for: str | None) -> bool:
    """Whether what is written in a form is of a kind that a program opens; another's file is converted first."""
    return target.opens == form or (target.name == made_for and target.opens != GGUF)


def _writes_keys(made_for: str | None, target: Target) -> bool:
    """Whether an output for one program has the keys that another reads."""
    return made_for in TARGETS and TARGETS[made_for].config is target.config


def opened_in_general(form: str = CHECKPOINT) -> str:
    """Which of the known programs open what is written in a form, in one sentence for help."""
    here = [target for target in TARGETS.values() if target.opens == form]
    ours = ", ".join(target.title for target in here if target.evidence == RUN)
    others = ", ".join(target.title for target in here if target.evidence == READ)
    return (
        f"opened by {ours}; where all layers keep the same number of experts, also by {others}, as far as they know "
        f"the model ({READ}; see: list targets)"
    )


def _condition(target: Target, uniform: bool, standalone: bool) -> str:
    if target.evidence != RUN:
        return f" ({target.evidence})"
    if target is not TRANSFORMERS or uniform:
        return ""
    return " (after import optimum_moe_prune" + (", or with trust_remote_code=True)" if standalone else ")")


def as_table(mark: str = "") -> list[list[str]]:
    """Head and rows of the table of programs, for people.

    Args:
        mark: Put around names, as Markdown marks code.
    """
    rows = []
    for name, target in TARGETS.items():
        facts = (target.program, target.version, target.opens)
        rows.append(
            [f"{mark}{name}{mark}", *facts, target.uniform, target.unequal, target.quantised, _evidence(target)]
        )
    return [[*_HEAD], *rows]


def _evidence(target: Target) -> str:
    return f"{target.evidence}; run here: {target.tried}" if target.tried else target.evidence


def facts_of(target: Target) -> dict[str, str]:
    """A row as plain values."""
    return {name: value for name, value in vars(target).items() if isinstance(value, str)}
