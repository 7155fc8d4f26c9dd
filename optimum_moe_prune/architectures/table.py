# SPDX-License-Identifier: Apache-2.0
"""The known architectures, by the model type of their text part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..compat import ModelConfig, text_config
from ..errors import RequestError, nearest_first
from .rows import ROWS
from .spec import MoESpec

_ROWS: dict[str, MoESpec] = {}

on_register: list[Callable[[MoESpec], None]] = []
"""Called with each row that is registered from now on."""


def register_architecture(spec: MoESpec) -> MoESpec:
    """Make an architecture known.

    Raises:
        RequestError: If its model type is known already.
    """
    types = (spec.model_type, *spec.also)
    for model_type in types:
        if model_type in _ROWS:
            raise RequestError(f"architecture {model_type!r} is registered already.")
    _ROWS.update(dict.fromkeys(types, spec))
    for listener in on_register:
        listener(spec)
    return spec


def list_architectures() -> list[str]:
    """Model types that can be pruned."""
    return sorted(model_type for model_type, spec in _ROWS.items() if not spec.refused)


def all_architectures() -> list[MoESpec]:
    """The rows."""
    return list(dict.fromkeys(_ROWS.values()))


def architecture_of(config: ModelConfig) -> MoESpec:
    """The row for a model's config.

    Args:
        config: A ``PretrainedConfig``; of a model that sees or hears as well, the row of its text part is meant.

    Raises:
        RequestError: If the model type is not known, or refused, or the model has no experts.
    """
    spec = find_architecture(config)
    if spec is not None:
        return spec
    model_type = _model_type(config)
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


def find_architecture(config: ModelConfig) -> MoESpec | None:
    """The row for a model's config, or None where none is known.

    Raises:
        RequestError: If models of this type are refused, and why.
    """
    for model_type in (_model_type(text_config(config)), _model_type(config)):
        if (spec := _ROWS.get(model_type)) is not None:
            if spec.refused:
                raise RequestError(f"a {model_type!r} model cannot be pruned: {spec.refused}.")
            return spec
    return None


def _model_type(config: ModelConfig) -> str:
    return getattr(config, "model_type", None) or type(config).__name__


def _names_experts(values: Any) -> bool:
    """Whether a config, or one nested in it, has a key about experts."""
    if not isinstance(values, dict):
        return False
    return any("expert" in str(key) or "moe" in str(key) or _names_experts(value) for key, value in values.items())


for _spec in ROWS:
    register_architecture(_spec)
