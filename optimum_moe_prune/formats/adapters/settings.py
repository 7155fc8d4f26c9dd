# SPDX-License-Identifier: Apache-2.0
"""``adapter_config.json``: what of it can be cut, and what it says of the experts that are left.

Experts that are modules of their own may be named in it by number, in targets and in patterns of ranks and alphas.
Where the same words would reach other experts in the pruned model, each module is named in full;
all else stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import RequestError
from ...storage.values import Json, read_json
from .injected import Wrapped

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_CHANGE_THE_MODEL = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Ways to begin an adapter that take something off the model's own weights, each time it is loaded."""
_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that choose among targets; nothing is left to them where every target is named."""


def read_settings(folder: Path) -> Json:
    """The settings of an adapter that can be cut.

    Raises:
        RequestError: If it is of a kind that cannot, and which.
    """
    settings = read_json(folder / SETTINGS)
    kind = str(settings.get("peft_type") or "")
    if kind != "LORA":
        raise RequestError(
            f"{folder} is an adapter of the kind {kind or 'unknown'} ({SETTINGS}), and LoRA is what can be cut; merge "
            "it into the original (merge_and_unload, save_pretrained) and prune that."
        )
    if settings.get("layer_replication"):
        raise RequestError(
            f"{folder} repeats layers of its model (layer_replication in {SETTINGS}), which a plan does not; merge it "
            "into the original (merge_and_unload, save_pretrained) and prune that."
        )
    _check_values(settings, folder / SETTINGS)
    return settings


def _check_values(settings: Json, path: Path) -> None:
    """Refuse values that no LoRA has, by name."""

    def wrong(name: str) -> RequestError:
        return RequestError(f"{path} is damaged: {name} is {settings.get(name)!r}.")

    rank = settings.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise wrong("r")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name) or {}, dict):
            raise wrong(name)
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        value = settings.get(name)
        if not (value is None or isinstance(value, (str, list))):
            raise wrong(name)


def check_beginning(settings: Json, routers: Iterable[str]) -> None:
    """Refuse adapters whose routers' own weights PEFT changes on loading: of fewer rows it makes other numbers.

    Args:
        settings: The adapter's.
        routers: Modules with an adapter whose rows are experts.

    Raises:
        RequestError: Naming one.
    """
    how = str(settings.get("init_lora_weights")).lower()
    named = next(iter(routers), None)
    if named is not None and how.startswith(_CHANGE_THE_MODEL):
        raise RequestError(
            f"the adapter of {named} was begun from the model's own weights (init_lora_weights={how!r}), which PEFT "
            "takes off them on loading, and of fewer rows that is something else; save it as a plain LoRA first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )


def cut_settings(settings: Json, modules: Mapping[str, str]) -> Json:
    """Settings whose patterns give each module the rank and the alpha that it had.

    Args:
        settings: The original adapter's.
        modules: All with an adapter that are left: their names now, by their names before.
    """
    changed = dict(settings)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns: Json = settings.get(name) or {}
        moved = {old: new for old, new in modules.items() if old != new}
        wrong = {
            key for key in patterns if any(_matches(key, old) != _matches(key, new) for old, new in moved.items())
        }
        if wrong:
            first = {new: _first(patterns, old) for old, new in modules.items()}
            named = {re.escape(new): patterns[key] for new, key in first.items() if key in wrong}
            changed[name] = {**named, **{key: value for key, value in patterns.items() if key not in wrong}}
    return changed


def _first(patterns: Json, module: str) -> str | None:
    """The pattern that PEFT takes for a module."""
    return next((key for key in patterns if _matches(key, module)), None)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise RequestError(
            f"{SETTINGS} has a pattern that is no regular expression: {pattern!r} ({error})."
        ) from error


def named_targets(settings: Json, layers: Iterable[Wrapped], modules: Mapping[str, str | None]) -> Json:
    """Settings that name every module and parameter with an adapter in full.

    Args:
        settings: The original adapter's.
        layers: What has one in the original.
        modules: New names of modules of experts, by those before; None for one that goes.
    """
    left = [(wrapped, modules.get(wrapped.module, wrapped.module)) for wrapped in layers]
    names = sorted({new for wrapped, new in left if new is not None and not wrapped.by_parameter})
    parameters = sorted({f"{new}.{wrapped.parameter}" for wrapped, new in left if new and wrapped.by_parameter})
    return {
        **settings,
        "target_modules": names,
        **({"target_parameters": parameters} if parameters else {}),
        **{name: None for name in _CHOOSING if settings.get(name) is not None},
    }
