# SPDX-License-Identifier: Apache-2.0
"""What is known of a program that opens pruned models: one frozen row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..storage.values import Json

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig

CHECKPOINT = "transformers checkpoint"
MLX_FOLDER = "MLX folder"
GGUF = "GGUF"
"""What a program opens."""

RUN = "run here"
READ = "read in source"
"""How it is known."""


def any_count(spec: MoESpec, config: ModelConfig, parallel_size: int) -> int:
    """For programs that take every number of experts."""
    return 1


def no_refusal(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    """For programs that open whatever transformers opens."""
    return None


def same_config(values: Json, counts: Mapping[int, int]) -> Json:
    """For programs that read the keys that transformers writes."""
    return values


def no_reason(spec: MoESpec, config: ModelConfig, parallel_size: int) -> str:
    """For programs that take every number of experts."""
    return ""


def nothing(config: ModelConfig) -> str:
    """For programs that read no other keys than transformers writes."""
    return ""


def every_architecture(config: ModelConfig) -> bool:
    """For programs that know what transformers knows."""
    return True


@dataclass(frozen=True)
class Target:
    """One program.

    Attributes:
        name: For ``--for``.
        program: As its people write it.
        version: That was run, or read in source.
        opens: What it opens (``CHECKPOINT``, ``MLX_FOLDER``, ``GGUF``).
        uniform: What it makes of models whose layers keep the same number of experts.
        unequal: The same of layers with different numbers.
        quantised: The same of quantised experts.
        evidence: How that is known (``RUN``, ``READ``).
        parallel: What ``parallel_size`` is for it; empty where it has nothing of the kind.
        count_multiple: What numbers of experts have to be a multiple of, of the architecture, a model's config and
            the parallel size.
        why_multiple: Why they have to, in words that follow the program's name.
        check: Why it refuses a model with such numbers of experts in its layers (None: they are not known yet), or
            None; in words that follow the program's name. Of the architecture, the config before or after pruning, the
            numbers and the parallel size.
        config: A pruned model's ``config.json`` with the keys that it reads put in beside ours; of the file's values
            and the numbers of experts.
        lacks: Keys that it reads, a model's config lacks and ``config`` writes, in words; empty where there are none.
        tried: What of it was run here all the same, where it is known by reading.
        knows: Whether it has an implementation of its own of a model with this config.
    """

    name: str
    program: str
    version: str
    opens: str
    uniform: str
    unequal: str
    quantised: str
    evidence: str
    parallel: str = ""
    count_multiple: Callable[[MoESpec, ModelConfig, int], int] = any_count
    why_multiple: Callable[[MoESpec, ModelConfig, int], str] = no_reason
    check: Callable[[MoESpec, ModelConfig, Mapping[int, int] | None, int], str | None] = no_refusal
    config: Callable[[Json, Mapping[int, int]], Json] = same_config
    lacks: Callable[[ModelConfig], str] = nothing
    knows: Callable[[ModelConfig], bool] = every_architecture
    tried: str = ""

    @property
    def title(self) -> str:
        """Program and version."""
        return f"{self.program} {self.version}"


def quantisation_of(config: ModelConfig) -> Mapping[str, Any]:
    """How a model's weights are quantised, as its ``config.json`` has it; empty where they are not."""
    settings = getattr(config, "quantization_config", None)
    return settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})


def is_uniform(counts: Mapping[int, int] | None) -> bool:
    """Whether all layers have the same number of experts, as far as that is known."""
    return counts is None or len(set(counts.values())) < 2


def architecture_name(config: ModelConfig) -> str:
    """The class that a model's ``config.json`` names, by which servers choose their own; empty where it names none."""
    names = getattr(config, "architectures", None)
    return str(names[0]) if isinstance(names, (list, tuple)) and names else ""
