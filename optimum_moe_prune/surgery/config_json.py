# SPDX-License-Identifier: Apache-2.0
"""What ``config.json`` says after pruning: the source's own, with the pruning keys changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..architectures.heads import write_counts_of_heads, write_no_heads
from ..architectures.spec import MoESpec
from ..architectures.table import architecture_of
from ..architectures.unequal import without_standalone
from ..checkpoints.layout import Layout
from ..checkpoints.source import Source
from ..compat import ModelConfig, text_config
from ..errors import RequestError
from ..storage.values import Json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_counts(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int]) -> None:
    """Write the numbers of experts of the MoE layers into a config.

    The same in every layer: under the architecture's key, as in any model. Else as ``per_layer_config``, transformers'
    own schema; the number for the whole model stays what it was, so that whoever does not look at the layers meets
    tensors of other shapes and stops. transformers' permission to read it stays unwritten (``unequal``).
    Code that came with the checkpoint (``standalone``) is for the numbers it had, and is no longer named.
    """
    text, count_key = text_config(config), spec.key_of_count(config)
    layers = text.to_dict().get("per_layer_config") or {}
    own = {int(layer): dict(values) for layer, values in layers.items()}
    aliases = type(text).attribute_map
    for layer, values in own.items():
        own[layer] = {key: value for key, value in values.items() if aliases.get(key, key) != count_key}
    text.per_layer_config = None
    whole = getattr(text, count_key)
    if isinstance(whole, list):  # one for each layer, which says all
        setattr(text, count_key, [counts.get(layer, count) for layer, count in enumerate(whole)])
    elif len(set(counts.values())) == 1:
        setattr(text, count_key, next(iter(counts.values())))
    else:
        for layer, count in counts.items():
            own.setdefault(layer, {})[count_key] = count
    if any(own.values()):
        text.per_layer_config = own
    if hasattr(config, "auto_map"):
        config.auto_map = without_standalone(config.auto_map)
        if not config.auto_map:
            del config.auto_map


def pruned_config(values: Json, before: Any, after: Any, spec: MoESpec) -> Json:
    """A source's own ``config.json`` with what pruning, or a change in memory, made different; all else as it was.

    Args:
        values: The source's, as read.
        before: The config that was made of it.
        after: The pruned model's.
        spec: The architecture.
    """
    values = dict(values)
    count_key, text = spec.key_of_count(after), text_config(after)
    was, now = before.to_dict(), after.to_dict()
    nested = _name_of_part(after, text)
    if nested is not None:
        inner = dict(values.get(nested) or {})
        _change(inner, text_config(before).to_dict(), text.to_dict(), type(text).attribute_map, count_key)
        values[nested] = inner
        del was[nested], now[nested]
        for name in now.keys() - _NOT_OURS:
            if now[name] != was.get(name):
                values[name] = now[name]
    else:
        _change(values, was, now, type(after).attribute_map, count_key)
    if auto_map := without_standalone(values.pop("auto_map", {})):
        values["auto_map"] = auto_map
    return values


_NOT_OURS = frozenset({"dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures"})


def _name_of_part(config: Any, text: Any) -> str | None:
    """The key of a config under which the one of its text part stands; None where it is that itself."""
    if text is config:
        return None
    return next(name for name, value in vars(config).items() if value is text)


def _change(values: Json, was: Json, now: Json, attribute_map: Mapping[str, str], count_key: str) -> None:
    """Put into a config's own values what is different now."""
    aliases = [alias for alias, key in attribute_map.items() if key == count_key]
    for key in [key for key in (count_key, *aliases) if key in values] or [count_key]:
        values[key] = now[count_key]  # the attribute may not be read where layers have their own
    for name in now.keys() - _NOT_OURS - {count_key}:
        if now[name] != was.get(name):
            values[name] = now[name]
    if "per_layer_config" not in now:
        values.pop("per_layer_config", None)


def source_config(source: Source) -> Json:
    """The source's ``config.json``.

    Raises:
        RequestError: If there is none.
    """
    found = source.find("config.json")
    if found is None:
        raise RequestError(f"{source.name_or_path} has no config.json.")
    return read_json(found)


def config_after(layout: Layout, counts: Mapping[int, int], heads: Mapping[int, int] | None) -> ModelConfig:
    """The config of a checkpoint after pruning.

    Args:
        layout: The checkpoint.
        counts: Experts of its MoE layers.
        heads: Experts of its heads, by number; None where they are left out.
    """
    pruned = copy.deepcopy(layout.config)
    write_counts(layout.spec, pruned, counts)
    if heads is None:
        write_no_heads(pruned)
    else:
        write_counts_of_heads(layout.spec, pruned, heads)
    return pruned


def config_of_files(layout: Layout, pruned: ModelConfig) -> Json:
    """The source's ``config.json`` with what is different in the config after pruning."""
    return pruned_config(source_config(layout.checkpoint.source), layout.config, pruned, layout.spec)


def config_of_model(model: PreTrainedModel, source: Source, before: Any) -> Json:
    """The source's ``config.json`` with the pruning keys, and what was changed in memory, put in.

    Args:
        model: The pruned model, whose weights are plain, whatever the source's are.
        source: The original.
        before: The original's config.
    """
    values = pruned_config(source_config(source), before, model.config, architecture_of(model.config))
    dtype = str(model.dtype).removeprefix("torch.")
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = dtype
    for part in (values, *(part for part in values.values() if isinstance(part, dict))):
        part.pop("quantization_config", None)  # a model is pruned in memory with plain weights only
    return values
