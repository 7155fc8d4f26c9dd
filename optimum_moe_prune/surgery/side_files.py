# SPDX-License-Identifier: Apache-2.0
"""Files beside a model's weights: what in them names or counts experts follows the cut.

Settings of other tools (which modules are quantised, and how) name experts by their old numbers; copied as they are,
they would be about other experts. Whatever is not certain is refused by name, never guessed.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.foreign import foreign_format
from ..errors import RequestError
from ..storage.values import Json
from .carried import carried
from .expert_names import OTHER_PARTS, Cut, ExpertNames, Reading, Refusal
from .expert_patterns import ExpertPatterns

__all__ = ["Cut", "carried", "foreign_format", "rewritten", "rewritten_file"]

COUNT_KEYS = frozenset(
    "num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts n_experts num_moe_experts "
    "moe_num_routed_experts expert_count".split()
)
"""Keys whose value is the number of routed experts."""
_SETTINGS = frozenset("quantization_config compression_config quantization quant_config sparsity_config".split())
_NOT_CONVERTED = frozenset(
    "modules_to_not_convert llm_int8_skip_modules linear_weights_not_to_quantize modules_to_skip".split()
)
_FIRST_HOLDS = {
    "dynamic": Reading.GPTQ_MODEL,
    "extra_config": Reading.AUTO_ROUND,
    "fqn_to_config": Reading.TORCHAO,
    "module_fqn_to_config": Reading.TORCHAO,
    "layer_quant_config": Reading.NAMES,
}
"""Objects with patterns as keys, of which the first that fits is taken."""
_OTHER_CONFIGS = re.compile(rf"({'|'.join(sorted(OTHER_PARTS))})(?:_config|_encoder|_cfg)?")
_IDS = re.compile(r"(?:^|_)experts?(?:_ids?|_idx|_ind(?:ex|ices)|_list)?$")


def rewritten(values: Json, cut: Cut, where: str) -> Json:
    """Settings with the experts named and counted as they are after pruning.

    Args:
        values: A JSON object, as read.
        cut: How experts were numbered anew.
        where: The file, for messages. Names with ``quant``, ``recipe`` or ``dtype`` are of files with settings only.

    Raises:
        RequestError: If something names experts, and which ones, or how to say it after pruning, is not certain.
    """
    return _Rewriter(cut, where).rewritten(values)


def rewritten_file(path: Path, cut: Cut) -> bytes | None:
    """What must stand in a file after pruning; None: what is there. JSON and YAML are looked at; comments in YAML go.

    Raises:
        RequestError: As :func:`rewritten`, or if it names experts and cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml"):
        return None
    content = path.read_bytes()
    rewriter = _Rewriter(cut, path.name)
    if not rewriter.all_settings and b"expert" not in content.lower():
        return None
    try:
        text = content.decode()
        values = json.loads(text) if kind == ".json" else _yaml().safe_load(text)
    except Exception as error:  # a YAML file can be wrong in as many ways as there are parsers
        if rewriter.names.by_number.search(content.decode(errors="replace")):
            raise RequestError(
                f"{path.name} names experts by number, which pruning changes, and cannot be read: "
                f"{str(error).splitlines()[0]}. Mend or remove it."
            ) from error
        return None
    new = rewriter.rewritten(values)
    if new == values:
        return None
    if kind != ".json":
        return str(_yaml().safe_dump(new, sort_keys=False, allow_unicode=True, width=10**6)).encode()
    indent = re.match(r"\s*[\[{]\n( *)", text)
    end = "\n" if text.endswith("\n") else ""
    return (json.dumps(new, indent=indent and len(indent[1]), ensure_ascii=text.isascii()) + end).encode()


def _yaml() -> Any:
    return importlib.import_module("yaml")  # it comes with huggingface_hub; where it should not, files are refused


class _Rewriter:
    """Walks through one document."""

    def __init__(self, cut: Cut, where: str) -> None:
        self.cut, self.where = cut, where
        self.names = ExpertNames(cut)
        self.patterns = ExpertPatterns(self.names)
        self.all_settings = bool(re.search("quant|recipe|dtype", where.rpartition("/")[2].lower()))
        extra = {place.layer for place in self.names.places if place.kind}
        layers = [layer for layer in cut.retained if layer not in extra]
        counts = {len(cut.retained[layer]) for layer in layers}
        self.uniform = next(iter(counts)) if len(counts) == 1 else None
        self.before = {cut.original[layer] for layer in layers}
        alike = {(cut.original[layer], cut.retained[layer]) for layer in layers}
        self.alike = next(iter(alike)) if len(alike) == 1 else None
        self.nothing = all(len(kept) == cut.original[layer] for layer, kept in cut.retained.items())

    def rewritten(self, values: Any) -> Any:
        return values if self.nothing else self._value(values, (), "")

    def _refused(self, path: Sequence[str], what: Any, why: str) -> RequestError:
        at = f" ({' > '.join(path)})" if path else ""
        return RequestError(
            f"{self.where}{at}: {_short(what)} {why}. Pruning numbers experts anew: rewrite or remove that entry in "
            "the source."
        )

    # -- names

    def _reading(self, path: tuple[str, ...], method: str) -> Reading:
        last = path[-1] if path else ""
        if last in _NOT_CONVERTED:
            return Reading.AWQ if method == "awq" else Reading.TRANSFORMERS
        usual = Reading.COMPRESSED_TENSORS if method == "compressed-tensors" else Reading.NAMES
        return _FIRST_HOLDS.get(last, usual)

    def _string(self, text: str, path: tuple[str, ...], method: str) -> list[str] | None:
        settings = self.all_settings or any(key in _SETTINGS for key in path)
        try:
            return self.patterns.replaced(text, self._reading(path, method), settings)
        except Refusal as refusal:
            raise self._refused(path, text, str(refusal)) from refusal

    def _value(self, value: Any, path: tuple[str, ...], method: str) -> Any:
        if isinstance(value, dict):
            return self._object(value, path, method)
        if isinstance(value, list):
            return self._list(value, path, method)
        if isinstance(value, str):
            new = self._string(value, path, method)
            if new is None:
                return value
            if not new:
                raise self._refused(path, value, "names only experts that are pruned")
            marks = {re.match(r"(?:re:|[+-]:)?", text)[0] for text in new}  # type: ignore[index]
            if len(new) == 1:
                return new[0]
            if marks == {"re:"}:
                return "re:" + "|".join(f"(?:{text[3:]})" for text in new)
            raise self._refused(path, value, f"names {len(new)} experts after pruning, and one string cannot")
        if path and path[-1] in COUNT_KEYS and type(value) is int:
            return self._count(value, path)
        return value

    def _object(self, value: dict[Any, Any], path: tuple[str, ...], method: str) -> dict[Any, Any]:
        method = str(value.get("quant_method") or ("awq" if {"w_bit", "q_group_size"} <= value.keys() else method))
        if path and path[-1] == "config_groups":
            self._check_groups(value, path)
        numbers = self._numbers(value, path)
        new: dict[Any, Any] = {}
        for key, item in value.items():
            keys: list[Any] | None = None
            if numbers is not None:
                keys = [type(key)(n) for n in numbers.get(int(key), [])]
            elif isinstance(key, str):
                keys = self._string(key, path, method.lower())
            if keys == []:
                continue
            made = self._value(item, (*path, str(key)), method.lower())
            for name in [key] if keys is None else keys:
                if name in new and path and path[-1] in _FIRST_HOLDS:
                    continue
                if name in new and new[name] != made:
                    raise self._refused(path, key, f"becomes {name!r}, which is there already with another value")
                new[name] = made
        return new

    def _list(self, value: list[Any], path: tuple[str, ...], method: str) -> list[Any]:
        if path and path[-1] in COUNT_KEYS and all(type(item) is int for item in value):
            return self._counts(value, path)
        rows = self._rows(value, path)
        mixed = not all(isinstance(item, str) for item in value)
        new: list[Any] = []
        for item in value if rows is None else [value[row] for row in rows]:
            if isinstance(item, str):
                names = self._string(item, path, method)
                if mixed and names is not None and len(names) != 1:
                    raise self._refused(
                        path, item, "stands in a list with other values, and names no single expert now"
                    )
                new += [item] if names is None else names
                continue
            said = [self._string(text, (*path, *key), method) for key, text in _said_of(item)]
            if [] in said:  # a record about a pruned expert goes with it
                if any(said):
                    raise self._refused(path, item, "is about experts that are pruned and others that are not")
                continue
            new.append(self._value(item, path, method))
        return new

    def _check_groups(self, groups: dict[str, Any], path: tuple[str, ...]) -> None:
        """Refuse expressions of two groups for one module: which one holds depends on how they are spelled."""
        targets = [
            (name, text, self._string(text, (*path, name, "targets"), ""))
            for name, group in groups.items()
            if isinstance(group, dict) and isinstance(group.get("targets"), list)
            for text in group["targets"]
            if isinstance(text, str) and text.startswith("re:")
        ]
        for name, text, new in targets:
            for other, another, _ in targets:
                if new is not None and name != other and self.patterns.both(text, another, Reading.NAMES):
                    raise self._refused(path, text, f"and {another!r} of another group name the same experts")

    # -- numbers

    def _layer(self, path: Sequence[str]) -> tuple[bool, int | None]:
        return self.names.layer_of(path)

    def _count(self, value: int, path: Sequence[str]) -> int:
        for part in filter(None, map(_OTHER_CONFIGS.fullmatch, path[:-1])):
            counts = {(self.cut.original[n], len(self.cut.retained[n])) for n in self.names.layers_of(part[1])}
            return next(iter(counts))[1] if {before for before, _ in counts} == {value} and len(counts) == 1 else value
        said, layer = self._layer(path)
        if said:
            matches = layer is not None and value == self.cut.original[layer]
            return len(self.cut.retained[layer]) if matches else value  # type: ignore[index]
        if self.uniform is None or value == self.uniform:
            return value  # config.json as well keeps the number for the whole model where layers differ
        if len(self.before) > 1:
            raise self._refused(path, value, "counts experts, of which layers had different numbers")
        return self.uniform if {value} == self.before else value

    def _counts(self, value: list[int], path: Sequence[str]) -> list[int]:
        """One count per layer."""
        of_layers = max(self.cut.original) < len(value)
        if not of_layers or any(value[layer] != count for layer, count in self.cut.original.items()):
            if set(value) & set(self.cut.original.values()):
                raise self._refused(path, value, "counts experts, and not those of each layer in turn")
            return value
        return [len(self.cut.retained.get(layer, ())) or count for layer, count in enumerate(value)]

    def _retained(self, path: Sequence[str], length: int) -> tuple[int, ...] | None:
        """The experts that remain of some entries, one per expert; None if that is not what they are.

        Raises:
            LookupError: If they may be those of layers that were cut differently.
        """
        said, layer = self._layer(path)
        if said:
            return self.cut.retained[layer] if layer is not None and length == self.cut.original[layer] else None
        if length not in self.cut.original.values():
            return None
        if self.alike is None:
            raise LookupError
        return self.alike[1]

    def _rows(self, value: list[Any], path: Sequence[str]) -> tuple[int, ...] | None:
        """Which entries of a list with one per expert remain; None if it is no such list."""
        key = next((key for key in reversed(path) if not key.isdigit()), "")
        plain = not any(isinstance(item, str) and self.names.word.search(item) for item in value)
        if not value or "expert" not in key.lower() or re.match("(?:num|n|top)_", key) or not plain:
            return None
        said, layer = self._layer(path)
        ids = all(type(item) is int for item in value) and len(set(value)) == len(value)
        if (
            ids
            and _IDS.search(key)
            and max(value) < max(self.cut.original.values())
            and (layer is not None or not said)
        ):
            raise self._refused(path, value, "seems to list experts by number")
        try:
            return self._retained(path, len(value))
        except LookupError:
            raise self._refused(path, value, "has one entry per expert and says no layer") from None

    def _numbers(self, value: dict[Any, Any], path: Sequence[str]) -> dict[int, list[int]] | None:
        """Old number -> new ones, of an object with an entry per expert and its number as the key; else None."""
        key = path[-1].lower() if path else ""
        if not value or "expert" not in key or "layer" in key.rpartition(".")[2] or not all(map(_is_number, value)):
            return None
        said, layer = self._layer(path)
        if said and (layer is None or len(self.cut.retained[layer]) == self.cut.original[layer]):
            return None
        cut = self.alike if layer is None else (self.cut.original[layer], self.cut.retained[layer])
        if cut is None or max(map(int, value)) >= cut[0] or (not said and len(value) != cut[0]):
            raise self._refused(path, list(value), "seem to be numbers of experts, and of no layer that is known")
        return {old: [new] for new, old in enumerate(cut[1])}


def _is_number(key: Any) -> bool:
    return type(key) is int or (isinstance(key, str) and re.fullmatch("0|[1-9][0-9]*", key) is not None)


def _said_of(record: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The strings of what is no mere list of strings."""
    if isinstance(record, dict):
        yield from (((str(key),), item) for key, item in record.items() if isinstance(item, str))
    elif isinstance(record, list) and not all(isinstance(item, str) for item in record):
        yield from (((), item) for item in record if isinstance(item, str))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
