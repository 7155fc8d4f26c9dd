# SPDX-License-Identifier: Apache-2.0
"""The known architectures, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..compat import ModelConfig
from ..errors import RequestError, nearest_first
from .mixtral import MIXTRAL
from .qwen2_moe import QWEN2_MOE
from .spec import MoESpec

_ROWS: dict[str, MoESpec] = {}

on_register: list[Callable[[MoESpec], None]] = []
"""Called with each row that is registered from now on."""


def register_architecture(spec: MoESpec) -> MoESpec:
    """Make an architecture known.

    Raises:
        RequestError: If its model type is known already.
    """
    if spec.model_type in _ROWS:
        raise RequestError(f"architecture {spec.model_type!r} is registered already.")
    _ROWS[spec.model_type] = spec
    for listener in on_register:
        listener(spec)
    return spec


def list_architectures() -> list[str]:
    """Model types that can be pruned."""
    return sorted(_ROWS)


def all_architectures() -> list[MoESpec]:
    """The rows."""
    return list(_ROWS.values())


def architecture_of(config: ModelConfig) -> MoESpec:
    """The row for a model's config.

    Args:
        config: A ``PretrainedConfig``.

    Raises:
        RequestError: If the model type is not known, or the model has no experts.
    """
    model_type = getattr(config, "model_type", None) or type(config).__name__
    if model_type in _ROWS:
        return _ROWS[model_type]
    has_experts = _names_experts(config.to_dict())
    known = nearest_first(model_type, list_architectures())
    if has_experts:
        raise RequestError(
            f"architecture {model_type!r} is not known. Known: {known}. A row for it can be added with "
            "register_architecture."
        )
    raise RequestError(
        f"a {model_type!r} model has no experts: it is not a Mixture-of-Experts model, so there is nothing to prune. "
        f"Known architectures: {known}."
    )


def _names_experts(values: Any) -> bool:
    """Whether a config, or one nested in it, has a key about experts."""
    if not isinstance(values, dict):
        return False
    return any("expert" in str(key) or "moe" in str(key) or _names_experts(value) for key, value in values.items())


for _spec in (MIXTRAL, QWEN2_MOE):
    register_architecture(_spec)
