# SPDX-License-Identifier: Apache-2.0
"""The known architectures, by the model type of their text part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from ..compat import ModelConfig, text_config
from ..errors import RequestError, nearest_first
from .rows import ROWS
from .spec import MoESpec

_ROWS: dict[str, MoESpec] = {}

on_register: list[Callable[[MoESpec], None]] = []
"""Called with each row that is registered from now on."""

discoverers: list[Callable[[Any, ModelConfig], MoESpec]] = []
"""Asked for the row of a model whose type is not known, with the model (or the source of one) and its config."""


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


@contextlib.contextmanager
def supposing(spec: MoESpec) -> Iterator[None]:
    """Take a row for granted inside a ``with``: one that is being tried."""
    before = _ROWS.get(spec.model_type)
    _ROWS[spec.model_type] = spec
    try:
        yield
    finally:
        del _ROWS[spec.model_type]
        if before is not None:
            _ROWS[spec.model_type] = before


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
            f"architecture {model_type!r} is not known. Known: {known}. Its routing rule can be found by trying the "
            "model itself, where that is at hand; else a row can be added with register_architecture."
        )
    raise RequestError(
        f"a {model_type!r} model has no experts: it is not a Mixture-of-Experts model, so there is nothing to prune. "
        f"Known architectures: {known}."
    )


def architecture_for(thing: Any, config: ModelConfig) -> MoESpec:
    """The row of a model that is at hand; where its type is not known, one that is found by trying it.

    What was found is kept for the process, and found anew for models of the type with other settings.

    Args:
        thing: The model, or the source of one.
        config: Its config.

    Raises:
        RequestError: As :func:`architecture_of`, or naming what was not found.
    """
    spec = find_architecture(config)
    if spec is None and not _names_experts(config.to_dict()):
        return architecture_of(config)
    if spec is None or (spec.found is not None and spec.found[1] != settings_of(config, spec.count_key)):
        for discover in discoverers:
            spec = discover(thing, config)
            _ROWS[spec.model_type] = spec
            for listener in on_register:
                listener(spec)
    return architecture_of(config)


def settings_of(config: ModelConfig, count_key: str) -> str:
    """What of a config could matter to a routing rule: all but names, precision, and the numbers of experts."""
    text = text_config(config)
    aliases = {alias for alias, key in type(text).attribute_map.items() if key == count_key}
    without = {*_NO_SETTINGS, *aliases, count_key}
    kept = {key: value for key, value in text.to_dict().items() if not (key in without or key.startswith("_"))}
    return json.dumps(kept, sort_keys=True, default=str)


_NO_SETTINGS = frozenset(
    "architectures auto_map dtype torch_dtype transformers_version per_layer_config use_cache quantization_config "
    "allow_global_per_layer_attribute_access".split()
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
