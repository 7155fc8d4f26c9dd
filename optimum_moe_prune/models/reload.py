# SPDX-License-Identifier: Apache-2.0
"""Stock ``from_pretrained`` for checkpoints whose layers have different numbers of experts.

Such a checkpoint says so in ``config.json`` in transformers' own schema (``per_layer_config``), which transformers
reads but does not build for most architectures. Importing this package switches the rest on:

- a decoder layer is built with its own number of experts;
- the number for the whole model may be read, as transformers' constructors do; the warning that it is ambiguous is not
  shown, of whatever model type the config with such a key is;
- the auxiliary loss is the mean over layers (see ``unequal``);
- a checkpoint whose experts disagree with its config is refused by name, also with ``ignore_mismatched_sizes=True``,
  which would leave random experts in place; so is one whose experts answer with constants in part.

The classes of an architecture are changed in place when transformers imports its modelling module, or at once if it
has done so; nothing is imported for it. Models with equal layers are built and run as before.

This is the one global state of the package: :func:`enable` and :func:`disable` may be called any number of times.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..architectures.spec import COUNT_KEYS
from ..architectures.substitution import check_whole
from ..architectures.table import all_architectures, find_architecture, on_register
from ..compat import LOADING_HOOK, PER_LAYER_WARNER, ModelConfig, text_config
from ..errors import RequestError, RunError

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec

_WARNING = re.compile(r"global config value for per-layer attribute `(\w+)`")
_EXPERTS = re.compile(r"Experts|MoE|Moe")
_ABSENT: Any = object()

_undo: list[tuple[Any, str, Any]] = []
"""What was there before: owner, attribute, value."""


def enable() -> None:
    """Let transformers build layers with different numbers of experts, from now on and in what it has imported."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    logging.getLogger(PER_LAYER_WARNER).addFilter(_unless_ours)
    for name in list(sys.modules):
        _extend_loaded(name)


def disable() -> None:
    """Put everything back as transformers made it.

    Models with unequal layers that were built before still run, but have no auxiliary loss.
    """
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for owner, name, before in reversed(_undo):
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    _undo.clear()
    logging.getLogger(PER_LAYER_WARNER).removeFilter(_unless_ours)


def extend_registered(spec: MoESpec) -> None:
    """Reach a new architecture, also if its modelling module was imported before, or is not one of transformers."""
    if _finder in sys.meta_path and spec.modelling:
        _extend_loaded(spec.modelling)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers' modelling modules as Python does, and extends them once they were executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = importlib.machinery.PathFinder.find_spec(name, path) if _is_modelling(name) else None
        loader: Any = None if found is None else found.loader
        if loader is None:
            return None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _extend(module)

        loader.exec_module = exec_module  # of this loader only; it serves no other module
        return found


_finder = _Finder()
on_register.append(extend_registered)


def _is_modelling(name: str) -> bool:
    return (name.startswith("transformers.models.") and ".modeling_" in name) or _is_registered(name)


def _is_registered(name: str) -> bool:
    return any(spec.modelling == name for spec in all_architectures() if spec.modelling)


def _extend_loaded(name: str) -> None:
    """Extend a module that was imported before; one that is only being imported is left to the import."""
    module = sys.modules.get(name) if _is_modelling(name) else None
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _extend(module)


def _extend(module: ModuleType) -> None:
    """Extend the classes of a modelling module that has experts; in others there is nothing to extend."""
    own = {name: value for name, value in vars(module).items() if _is_own_class(value, module)}
    if not _is_registered(module.__name__) and not any(_EXPERTS.search(name) for name in own):
        return
    from transformers import PreTrainedConfig

    from ..architectures.unequal import GLOBAL_COUNT_ALLOWED, PERMISSION, balanced_by_layer

    for value in own.values():
        if _is_layer(value) and not hasattr(value.__init__, "moe_prune"):
            _set(value, "__init__", _layer_init(value.__init__))
        if value.__name__.endswith("PreTrainedModel") and hasattr(value, LOADING_HOOK):
            _set(value, LOADING_HOOK, _checked(getattr(value, LOADING_HOOK)))
    if hasattr(module, "load_balancing_loss_func"):
        _set(module, "load_balancing_loss_func", balanced_by_layer(module.load_balancing_loss_func))
    for value in list(vars(module).values()):  # of the whole model, and of its text part
        if isinstance(value, type) and issubclass(value, PreTrainedConfig) and value is not PreTrainedConfig:
            _set(value, PERMISSION, GLOBAL_COUNT_ALLOWED)


def _is_own_class(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


def _is_layer(value: type) -> bool:
    """Whether a class is that of decoder layers: built of a config and the layer's index."""
    from torch import nn

    if not issubclass(value, nn.Module) or not re.search(r"(Layer|Block)$", value.__name__):
        return False
    return {"config", "layer_idx"} <= set(inspect.signature(value.__init__).parameters)


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


def _row(config: ModelConfig) -> MoESpec | None:
    """The row of a config, also where models of the type are refused or not known: None then."""
    try:
        return find_architecture(config)
    except RequestError:
        return None


def _layer_init(init: Callable[..., None]) -> Callable[..., None]:
    """A decoder layer's ``__init__`` that reads the layer's own config."""
    from ..architectures.unequal import share_config

    signature = inspect.signature(init)

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        config, index = given.arguments["config"], given.arguments["layer_idx"]
        spec = _row(config) if getattr(config, "per_layer_attributes", None) else None
        if spec is None or not spec.is_unequal(config):
            init(self, *args, **kwargs)
            return
        own = given.arguments["config"] = config.per_layer_config[index]
        init(*given.args, **given.kwargs)
        share_config(self, own, config)

    vars(__init__)["moe_prune"] = True
    return __init__


def _checked(finalize: Callable[..., Any]) -> staticmethod:
    """The last step of loading, which fills gaps with random weights, after a check that the experts have none."""
    from ..architectures.unequal import damage

    @functools.wraps(finalize)
    def _finalize_model_loading(model: Any, load_config: ModelConfig, loading_info: Any) -> Any:
        config = text_config(model.config)
        if any(".experts." in str(key) for key in (*loading_info.mismatched_keys, *loading_info.missing_keys)):
            try:
                check_whole(model.config, model.name_or_path or "this checkpoint")
            except RequestError as error:
                raise RunError(str(error)) from error
        spec = _row(config) if getattr(config, "is_heterogeneous", False) else None
        if spec is not None and (loading_info.mismatched_keys or loading_info.missing_keys):
            from ..architectures.structure import structure_of

            if found := damage(config, loading_info, *structure_of(model, spec).where):
                raise RunError(found)
        return finalize(model, load_config, loading_info)

    return staticmethod(_finalize_model_loading)


def _unless_ours(record: logging.LogRecord) -> bool:
    """Drop transformers' warning about reading the model-wide number of experts of a known architecture."""
    match = _WARNING.search(str(record.msg))
    if match is None:
        return True
    return match[1] not in {*COUNT_KEYS, *(spec.count_key for spec in all_architectures())}
