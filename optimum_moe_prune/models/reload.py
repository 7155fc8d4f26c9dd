# SPDX-License-Identifier: Apache-2.0
"""Stock ``from_pretrained`` for checkpoints whose layers have different numbers of experts.

Such a checkpoint says so in ``config.json`` in transformers' own schema (``per_layer_config``), which transformers
reads but does not build for most architectures. Importing this package switches the rest on:

- a decoder layer is built with its own number of experts;
- the number for the whole model may be read, as transformers' constructors do; the warning that it is ambiguous is not
  shown, of whatever model type the config with such a key is;
- the auxiliary loss is the mean over layers (see ``unequal``);
- a checkpoint whose experts disagree with its config is refused by name, also with ``ignore_mismatched_sizes=True``,
  which would leave random experts in place.

The classes of an architecture are changed in place when transformers imports its modelling module, or at once if it
has done so; nothing is imported for it. Models with equal layers are built and run as before.

This is the one global state of the package: :func:`enable` and :func:`disable` may be called any number of times.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import logging
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..architectures.table import all_architectures, on_register
from ..compat import LOADING_HOOK, PER_LAYER_WARNER, ModelConfig
from ..errors import RunError

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec

_WARNING = re.compile(r"global config value for per-layer attribute `(\w+)`")
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
    if _finder in sys.meta_path:
        _extend_loaded(spec.modelling_module)


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
    return any(spec.modelling_module == name for spec in all_architectures())


def _extend_loaded(name: str) -> None:
    """Extend a module that was imported before; one that is only being imported is left to the import."""
    module = sys.modules.get(name) if _is_modelling(name) else None
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _extend(module)


def _extend(module: ModuleType) -> None:
    """Extend the classes of a modelling module, if it is that of a known architecture."""
    for spec in all_architectures():
        layer_class = getattr(module, spec.layer_class, None) if spec.modelling_module == module.__name__ else None
        # Without the class it is another version of transformers: such checkpoints then fail to load, loudly.
        if layer_class is None or hasattr(layer_class.__init__, "moe_prune"):
            continue
        from ..architectures.unequal import GLOBAL_COUNT_ALLOWED, PERMISSION, balanced_by_layer

        _set(layer_class, "__init__", _layer_init(layer_class.__init__, spec))
        if hasattr(module, "load_balancing_loss_func"):
            _set(module, "load_balancing_loss_func", balanced_by_layer(module.load_balancing_loss_func))
        for base in _model_bases(module):
            _set(base, LOADING_HOOK, _checked(getattr(base, LOADING_HOOK), spec))
            if (config_class := getattr(base, "config_class", None)) is not None:
                _set(config_class, PERMISSION, GLOBAL_COUNT_ALLOWED)


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


def _layer_init(init: Callable[..., None], spec: MoESpec) -> Callable[..., None]:
    """A decoder layer's ``__init__`` that reads the layer's own config."""
    from ..architectures.unequal import share_config

    @functools.wraps(init)
    def __init__(self: Any, config: ModelConfig, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        if not spec.is_unequal(config):
            init(self, config, layer_idx, *args, **kwargs)
            return
        own = config.per_layer_config[layer_idx]
        init(self, own, layer_idx, *args, **kwargs)
        share_config(self, own, config)

    vars(__init__)["moe_prune"] = True
    return __init__


def _model_bases(module: ModuleType) -> list[Any]:
    """The classes of a modelling module that its models derive from and that can be told what was loaded."""
    return [
        value
        for name, value in vars(module).items()
        if name.endswith("PreTrainedModel")
        and getattr(value, "__module__", None) == module.__name__
        and hasattr(value, LOADING_HOOK)
    ]


def _checked(finalize: Callable[..., Any], spec: MoESpec) -> staticmethod:
    """The last step of loading, which fills gaps with random weights, after a check that the experts have none."""
    from ..architectures.unequal import damage

    experts = tuple(f"{spec.experts}.{name}" for name in spec.expert_tensors)
    where = (spec.layers.rpartition(".")[2], spec.block, (*experts, *spec.router_tensors))

    @functools.wraps(finalize)
    def _finalize_model_loading(model: Any, load_config: ModelConfig, loading_info: Any) -> Any:
        if found := damage(model.config, loading_info, *where):
            raise RunError(found)
        return finalize(model, load_config, loading_info)

    return staticmethod(_finalize_model_loading)


def _unless_ours(record: logging.LogRecord) -> bool:
    """Drop transformers' warning about reading the model-wide number of experts of a known architecture."""
    match = _WARNING.search(str(record.msg))
    if match is None:
        return True
    return match[1] not in {spec.count_key for spec in all_architectures()}
