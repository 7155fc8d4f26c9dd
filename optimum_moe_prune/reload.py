# SPDX-License-Identifier: Apache-2.0
"""Stock ``from_pretrained`` for checkpoints whose layers have different numbers of experts.

Such a checkpoint says so in ``config.json`` in transformers' own schema (``per_layer_config``), which transformers
reads but does not build for most architectures. Importing this package switches the rest on:

- a decoder layer is built with its own number of experts;
- the auxiliary loss is the mean over layers (see ``unequal``);
- a checkpoint whose tensors disagree with its config is refused by name, also with ``ignore_mismatched_sizes=True``,
  which would leave random experts in place;
- transformers' warning that the model-wide number of experts is ambiguous is not shown for the keys concerned.

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

from .errors import RunError

if TYPE_CHECKING:
    from .architectures import MoESpec

_MODELLING = re.compile(r"transformers\.models\.\w+\.modeling_\w+")
_WARNING = re.compile(r"global config value for per-layer attribute `(\w+)`")
_WARNER = "transformers.integrations.heterogeneity.configuration_utils"
_ABSENT: Any = object()

_undo: dict[str, list[tuple[Any, str, Any]]] = {}
"""What was there before, by modelling module."""


def enable() -> None:
    """Let transformers build layers with different numbers of experts, from now on and in what it has imported."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    logging.getLogger(_WARNER).addFilter(_unless_ours)
    for name in [name for name in sys.modules if _MODELLING.fullmatch(name)]:
        _extend(sys.modules[name])


def disable() -> None:
    """Put everything back as transformers made it. Models that were built stay as they are."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for changes in _undo.values():
        for owner, name, before in reversed(changes):
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
    _undo.clear()
    logging.getLogger(_WARNER).removeFilter(_unless_ours)


def extend_registered(spec: MoESpec) -> None:
    """Reach an architecture that is registered after transformers imported its modelling module."""
    if _finder in sys.meta_path and spec.modelling_module in sys.modules:
        _extend(sys.modules[spec.modelling_module])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers' modelling modules as Python does, and extends them once they were executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = importlib.machinery.PathFinder.find_spec(name, path) if _MODELLING.fullmatch(name) else None
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


def _extend(module: ModuleType) -> None:
    """Extend the classes of a modelling module, if it is that of a known architecture."""
    from .architectures.table import all_architectures  # not before torch is there

    for spec in all_architectures():
        if spec.modelling_module == module.__name__ and module.__name__ not in _undo:
            layer_class = getattr(module, spec.layer_class, None)
            if layer_class is None:  # another version of transformers: such checkpoints then fail to load, loudly
                continue
            changes = _undo[module.__name__] = []
            _set(changes, layer_class, "__init__", _layer_init(layer_class.__init__, spec))
            if hasattr(module, "load_balancing_loss_func"):
                from .unequal import balanced_by_layer

                _set(changes, module, "load_balancing_loss_func", balanced_by_layer(module.load_balancing_loss_func))
            for base in _model_bases(module):
                _set(changes, base, "_finalize_model_loading", _checked(base._finalize_model_loading, spec))


def _set(changes: list[tuple[Any, str, Any]], owner: Any, name: str, value: Any) -> None:
    changes.append((owner, name, vars(owner).get(name, _ABSENT)))
    setattr(owner, name, value)


def _layer_init(init: Callable[..., None], spec: MoESpec) -> Callable[..., None]:
    """A decoder layer's ``__init__`` that reads the layer's own config."""
    from .unequal import is_unequal, share_config

    @functools.wraps(init)
    def __init__(self: Any, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        if not is_unequal(config, spec.count_key):
            init(self, config, layer_idx, *args, **kwargs)
            return
        own = config.per_layer_config[layer_idx]
        init(self, own, layer_idx, *args, **kwargs)
        share_config(self, own, config)

    return __init__


def _model_bases(module: ModuleType) -> list[Any]:
    """The classes of a modelling module that its models derive from and that can be told what was loaded."""
    return [
        value
        for name, value in vars(module).items()
        if name.endswith("PreTrainedModel")
        and getattr(value, "__module__", None) == module.__name__
        and hasattr(value, "_finalize_model_loading")
    ]


def _checked(finalize: Callable[..., Any], spec: MoESpec) -> staticmethod:
    """The last step of loading, which fills gaps with random weights, after a check that the experts have none."""
    from .unequal import is_unequal

    @functools.wraps(finalize)
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        if is_unequal(model.config, spec.count_key):
            _check_loaded(loading_info, spec)
        return finalize(model, load_config, loading_info)

    return staticmethod(_finalize_model_loading)


def _check_loaded(loading_info: Any, spec: MoESpec) -> None:
    """Raise unless every tensor of the MoE blocks was found in its shape.

    Raises:
        RunError: Naming the layer, what ``config.json`` says and what the checkpoint holds.
    """
    in_block = re.compile(rf"(?:^|\.){re.escape(spec.layers.rpartition('.')[2])}\.(\d+)\.{re.escape(spec.block)}\.")
    advice = "The checkpoint is damaged or was edited; it is not loaded, since these experts would be random."
    for name, found, expected in sorted(loading_info.mismatched_keys):
        if match := in_block.search(name):
            raise RunError(
                f"layer {match[1]}: config.json says {expected[0]} experts (per_layer_config), and the checkpoint "
                f"holds {found[0]} ({name} has shape {tuple(found)}, not {tuple(expected)}). {advice}"
            )
    for name in sorted(loading_info.missing_keys):
        if match := in_block.search(name):
            raise RunError(f"layer {match[1]}: {name} is missing in the checkpoint. {advice}")


def _unless_ours(record: logging.LogRecord) -> bool:
    """Drop transformers' warning about reading the model-wide number of experts of a known architecture."""
    match = _WARNING.search(str(record.msg))
    if match is None:
        return True
    from .architectures.table import all_architectures

    return match[1] not in {spec.count_key for spec in all_architectures()}
