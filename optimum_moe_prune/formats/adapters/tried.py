# SPDX-License-Identifier: Apache-2.0
"""What becomes of an adapter, tried in the original and in the pruned model before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...architectures.structure import structure_of
from ...architectures.table import architecture_of
from ...compat import WeightNames
from ...errors import RequestError
from ...plan import PruningPlan
from ...storage.tensor_files import TensorEntry
from ...storage.values import Json
from .injected import Injected, Loaded, peft_version, skeletons
from .original import Original
from .settings import SETTINGS, check_beginning, cut_settings, named_targets
from .tensors import Kept, Places, module_of

Entries = Mapping[str, TensorEntry]
"""Tensors by name: dtype, shape and where they lie."""


@dataclass(frozen=True)
class AdapterCut:
    """What becomes of an adapter.

    Attributes:
        settings: ``adapter_config.json`` for the pruned model.
        kept: What is kept of each tensor; None of one that goes.
        tensors: The source's.
        aside: What PEFT leaves aside of the source as well.
    """

    settings: Json
    kept: Mapping[str, Kept | None]
    tensors: Entries = field(repr=False)
    aside: tuple[str, ...] = ()

    @property
    def sources(self) -> dict[str, str]:
        """Names in the source of what is written, by the new ones, in the source's order."""
        return {kept.name: name for name, kept in self.kept.items() if kept is not None}

    @property
    def written(self) -> dict[str, TensorEntry]:
        """What is written, by its new names; the bytes count from 0."""
        return {new: self._entry(name) for new, name in self.sources.items()}

    @property
    def changed(self) -> int:
        """How many tensors lose a part of themselves, or go."""
        return sum(kept is None or kept.index is not None or kept.table is not None for kept in self.kept.values())

    def _entry(self, name: str) -> TensorEntry:
        before, kept = self.tensors[name], self.kept[name]
        assert kept is not None
        shape = kept.shape(before.shape)
        return TensorEntry(before.dtype, shape, 0, before.nbytes // max(1, math.prod(before.shape)) * math.prod(shape))


def adapter_cut(plan: PruningPlan, settings: Json, tensors: Entries, original: Original) -> AdapterCut:
    """What becomes of an adapter; it loads in the pruned model as the source does in the original.

    Raises:
        RequestError: If it is not for the original, or cannot be cut.
    """
    what = f"the original ({original.name})"
    failures = []
    for model in skeletons(original.config, settings, tensors, original.trust_remote_code):
        spec = architecture_of(original.config)
        structure, names, modules = structure_of(model, spec), WeightNames(model), dict(model.named_modules())
        try:
            injected = Injected(model, settings, what)
            loaded = injected.load(tensors)
            places = Places(spec, structure, names, injected.layers, plan)
            _check_loaded(loaded, places, modules, tensors, what)
        except RequestError as error:
            failures.append(error)
            continue
        routers = (layer.module for layer in injected.layers.values() if places.rows_are_experts(layer))
        check_beginning(settings, routers)
        kept = {name: places.kept(name, tensors) for name in tensors}
        renamed = {module_of(name): module_of(new.name) for name, new in kept.items() if new is not None}
        cut = AdapterCut(cut_settings(settings, renamed), kept, tensors, loaded.unexpected)
        return _tried(cut, injected, original, type(model))
    raise failures[0]


def _check_loaded(loaded: Loaded, places: Places, modules: Mapping[str, Any], tensors: Entries, what: str) -> None:
    """Refuse an adapter that PEFT does not read whole in its own original, but for what older files name otherwise.

    Raises:
        RequestError: If it is of another model, or not whole.
    """
    if loaded.missing:
        more = f" and {len(loaded.missing) - 1} more" if len(loaded.missing) > 1 else ""
        raise RequestError(
            f"the adapter lacks {loaded.missing[0]}{more}, which {SETTINGS} asks for in {what}: it is of another "
            "model, or not whole."
        )
    by_number = any(map(places.is_numbered, tensors)) if loaded.unexpected else False
    for name in loaded.unexpected[len(loaded.misread) :]:
        module = module_of(name)
        if module not in modules or (places.is_routed(module) and not by_number):
            raise RequestError(
                f"{what} has no place for {name} of the adapter (PEFT {peft_version()}): it is of another model, or "
                f"{SETTINGS} is not its own."
            )


def _tried(cut: AdapterCut, before: Injected, original: Original, kind: type) -> AdapterCut:
    """The cut, if it loads in the pruned model; with every target named in full where it does not otherwise.

    Raises:
        RequestError: If it does not in any way.
    """
    renamed = {module_of(name): None if kept is None else module_of(kept.name) for name, kept in cut.kept.items()}
    expected = {
        (new, layer.parameter): (layer.rank, layer.alpha)
        for layer in before.layers.values()
        if (new := renamed.get(layer.module, layer.module)) is not None
    }
    by_name = replace(cut, settings=named_targets(cut.settings, before.layers.values(), renamed))
    for tried in (cut, by_name):
        models = skeletons(original.pruned_config, tried.settings, tried.written, original.trust_remote_code)
        after = Injected(next(model for model in models if type(model) is kind), tried.settings, "the pruned model")
        found = {(layer.module, layer.parameter): (layer.rank, layer.alpha) for layer in after.layers.values()}
        if found != expected:
            continue
        loaded = after.load(tried.written)
        if not loaded.missing and len(loaded.unexpected) <= len(cut.aside):
            return tried
    raise RequestError(
        f"the adapter cannot be cut: PEFT {peft_version()} would not read what is left of it in the pruned model. "
        "Merge it into the original (merge_and_unload, save_pretrained) and prune that."
    )
