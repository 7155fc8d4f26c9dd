# SPDX-License-Identifier: Apache-2.0
"""Statistics for other programs: bits for each expert, for packers of mixed precision, and an order of experts.

Two formats are this package's own and say everything (``bits``, ``order``). The others are what a program reads as it
is; each was looked up in its source, or run:

- ``auto-round``: AutoRound 0.16.1, run: ``AutoRound(model, ..., layer_config=json.load(file))``. A key is part of a
  module's name; what it unfuses of transformers' experts has names of their own.
- ``gptqmodel``: GPTQModel 7.7.0, read (``quantization/config.py``): ``QuantizeConfig(bits=4,
  dynamic=json.load(file))``.
- ``sglang``: SGLang 0.5.23, read (``eplb/expert_location.py``): ``--init-expert-location FILE.json`` places experts on
  devices by how often each is used.

What these two packers write for transformers has experts of different widths in one layer; vLLM 0.33 refuses that
(``quantization/inc/config_parser.py``: one width for a fused layer). Programs that name whole tensors, and not single
experts, can take no such file: llama.cpp's ``--tensor-type`` and mlx-lm's predicate by path see the stacked experts of
a layer as one. No released server reads an order of experts; SGLang 0.5.23 with KTransformers runs those numbered 0 to
``--kt-num-gpu-experts`` on the card, which takes a checkpoint that was renumbered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..architectures.patterns import patterns_of_type
from ..errors import RequestError, nearest_first
from ..plan import PruningPlan
from ..provenance import without_folders
from ..statistics.stats import CalibrationStats
from ..storage.values import Json, check_version, is_integer, no_constant
from .ranking import CONTRIBUTION, TOKENS, Ranked, assigned_bits, ranked, score_of

BITS_FORMAT, ORDER_FORMAT = "optimum-moe-prune/bits", "optimum-moe-prune/order"
FORMAT_VERSION = 1
WITH_BITS = ("bits", "auto-round", "gptqmodel")
STATISTICS_FORMATS = (*WITH_BITS, "order", "sglang")
"""The formats of :func:`export_statistics`."""
WIDTHS = (2, 3, 4, 8)
"""The numbers of bits that both packers know."""


def export_statistics(
    stats: CalibrationStats,
    format: str = "order",
    *,
    bits: float | None = None,
    widths: Sequence[int] = WIDTHS,
    plan: PruningPlan | None = None,
) -> str:
    """What statistics say of experts, as the text of a file for another program.

    Layers are decoder layers, heads for further tokens are left out. The keys of ``bits`` and ``order`` stand in
    ``storage/FORMATS.md``.

    Args:
        stats: Of a calibration. Domains count as :meth:`CalibrationStats.with_domain_weights` made them.
        format: A name in :data:`STATISTICS_FORMATS`.
        bits: For formats with bits: of an expert's weights, the mean of each layer at most.
        widths: The numbers of bits that an expert may have.
        plan: Of the same model: the file is for the model that it makes, its experts numbered anew.

    Raises:
        RequestError: If the format is not known, the statistics lack what it takes, or it cannot be said in it.
    """
    if format not in STATISTICS_FORMATS:
        known = nearest_first(str(format), [*STATISTICS_FORMATS])
        raise RequestError(f"export format {format!r} is not known of statistics: {known}.")
    check_bits(format, bits, widths)
    layers = ranked(stats, plan)
    if format == "sglang":
        return json.dumps({"logical_count": _counts(stats, layers)}) + "\n"
    if format == "order":
        return _own(stats, plan, ORDER_FORMAT, {}, {index: _order(layer) for index, layer in layers.items()})
    assert bits is not None
    given = {index: assigned_bits(layer.scores, widths, bits) for index, layer in layers.items()}
    if format == "bits":
        head = {"bits": bits, "widths": list(widths)}
        entries = {index: {**_ranking(layer), "bits": given[index]} for index, layer in layers.items()}
        return _own(stats, plan, BITS_FORMAT, head, entries)
    return json.dumps(_by_module(str(stats.model["model_type"]), given, _SPELLINGS[format]), indent=1) + "\n"


def check_bits(format: str, bits: float | None, widths: Sequence[int]) -> None:
    """Raise unless bits can be given as asked, where the format has any.

    Raises:
        RequestError: If the mean lies outside the widths, or these are none.
    """
    if format not in WITH_BITS:
        return
    known = _widths(widths)
    if bits is None or not isinstance(bits, (int, float)) or not known[0] <= bits <= known[-1]:
        raise RequestError(
            f"bits is {bits!r}; format {format!r} takes the mean number of bits of an expert's weights, from "
            f"{known[0]} to {known[-1]}."
        )


def import_bits(text: str) -> dict[int, tuple[int, ...]]:
    """The bits of each expert by layer, from a file of the format ``bits``.

    Args:
        text: What :func:`export_statistics` gave.

    Raises:
        RequestError: If it is another format, a newer version, damaged, or contradicts itself.
    """

    def read(values: Json) -> dict[int, tuple[int, ...]]:
        widths = _widths(values["widths"])
        found = {}
        for index, entry in _layers(values, ("tokens", "scores", "ranking", "bits")):
            bits = entry["bits"]
            if not all(is_integer(width) and width in widths for width in bits):
                raise RequestError(f"layer {index}: bits are {bits}, and widths {list(widths)}.")
            if sum(bits) > values["bits"] * len(bits) + 1e-6:
                raise RequestError(f"layer {index}: bits are more than {values['bits']} on average.")
            found[index] = tuple(bits)
        return found

    return _read(text, BITS_FORMAT, read)


def import_order(text: str) -> dict[int, tuple[int, ...]]:
    """The experts of each layer, those first that matter most, from a file of the format ``order``.

    Args:
        text: What :func:`export_statistics` gave.

    Raises:
        RequestError: If it is another format, a newer version, damaged, or contradicts itself.
    """
    return _read(
        text,
        ORDER_FORMAT,
        lambda values: {
            index: tuple(entry["ranking"])
            for index, entry in _layers(values, ("tokens", "scores", "ranking", "covered"))
        },
    )


def check_exported(text: str, format: str) -> None:
    """Raise unless a file is one that :func:`export_statistics` gives.

    Raises:
        RequestError: If it is something else.
    """
    if format in ("bits", "order"):
        (import_bits if format == "bits" else import_order)(text)
        return
    try:
        values = json.loads(text, parse_constant=no_constant)
        if format == "sglang":
            known = list(values) == ["logical_count"]
            known = known and all(is_integer(count) for row in values["logical_count"] for count in row)
        else:
            known = bool(values) and all(
                _KEYS[format].fullmatch(key) and [*value] == ["bits"] and is_integer(value["bits"])
                for key, value in values.items()
            )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"the file is no export of the format {format!r}: {error}.") from error
    if not known:
        raise RequestError(f"the file is no export of the format {format!r}.")


# -- this package's own formats


def _own(
    stats: CalibrationStats, plan: PruningPlan | None, format: str, more: Json, layers: Mapping[int, Json]
) -> str:
    known = patterns_of_type(str(stats.model["model_type"]))
    head: Json = {
        "format": format,
        "format_version": FORMAT_VERSION,
        "model": {key: without_folders(stats.model).get(key) for key in ("name_or_path", "revision", "fingerprint")},
        "model_type": stats.model["model_type"],
        "top_k": stats.model["top_k"],
        "calibration": stats.fingerprint,
        "domain_weights": stats.domain_weights,
        "numbering": "original" if plan is None else "pruned",
        "score": score_of(stats),
        "modules": None if known is None else f"{known.modules}.{{expert}}",
        **more,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    entries = [f"    {json.dumps(str(index))}: {json.dumps(entry)}" for index, entry in sorted(layers.items())]
    lines.append('  "layers": {\n' + ",\n".join(entries) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _ranking(layer: Ranked) -> Json:
    return {
        "num_experts": len(layer.scores),
        "original": list(layer.original),
        "tokens": list(layer.tokens),
        "scores": list(layer.scores),
        "ranking": layer.order,
    }


def _order(layer: Ranked) -> Json:
    total = sum(layer.tokens) or 1.0
    covered = accumulate(layer.tokens[expert] for expert in layer.order)
    return {**_ranking(layer), "covered": [round(tokens / total, 6) for tokens in covered]}


def _read(text: str, format: str, read: Callable[[Json], dict[int, tuple[int, ...]]]) -> dict[int, tuple[int, ...]]:
    try:
        values = json.loads(text, parse_constant=no_constant)
        if values["format"] != format:
            raise RequestError(f"the file's format is {values['format']!r}, and {format!r} is read.")
        check_version(values, FORMAT_VERSION, "the exported statistics")
        return read(values)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the exported statistics are damaged: {error!r}.") from error


def _layers(values: Json, lists: Sequence[str]) -> list[tuple[int, Json]]:
    """The layers of a file, their lists of one length and their ranking that of the scores."""
    if values["score"] not in (CONTRIBUTION, TOKENS) or values["numbering"] not in ("original", "pruned"):
        raise RequestError(f"score is {values['score']!r} and numbering {values['numbering']!r}.")
    found = []
    for name, entry in values["layers"].items():
        index, count = int(name), entry["num_experts"]
        if name != str(index) or index < 0 or not is_integer(count) or count < 1:
            raise RequestError(f"layer {name}: num_experts is {count!r}.")
        if wrong := [key for key in (*lists, "original") if len(entry[key]) != count]:
            raise RequestError(f"layer {name}: {wrong[0]} must have {count} values.")
        order = Ranked(tuple(entry["tokens"]), tuple(entry["scores"]), tuple(entry["original"])).order
        if order != entry["ranking"] or entry["original"] != sorted(set(entry["original"])):
            raise RequestError(f"layer {name}: the entries of the file contradict one another.")
        found.append((index, entry))
    if not found:
        raise RequestError("the exported statistics name no layers.")
    return sorted(found, key=lambda pair: pair[0])


def _widths(widths: Any) -> tuple[int, ...]:
    found = tuple(widths) if isinstance(widths, (list, tuple)) else ()
    if not found or not all(is_integer(w) and 1 <= w <= 16 for w in found) or list(found) != sorted(set(found)):
        raise RequestError(f"widths are {widths!r}; they must be whole numbers of bits from 1 to 16, rising.")
    return found


# -- formats of other programs


def _by_module(
    model_type: str, bits: Mapping[int, Sequence[int]], spelled: Callable[[str, str], str]
) -> dict[str, dict[str, int]]:
    """Bits by what a packer matches names of modules with: the experts of a layer that have the same together."""
    known = patterns_of_type(model_type)
    if known is None:
        raise RequestError(f"the names of experts in a {model_type!r} model are not known; use the format 'bits'.")
    found = {}
    for index, given in bits.items():
        for width in sorted(set(given)):
            numbers = "|".join(str(expert) for expert, own in enumerate(given) if own == width)
            found[spelled(known.modules.format(layer=index), numbers)] = {"bits": width}
    return found


def _auto_round(modules: str, numbers: str) -> str:
    """AutoRound escapes dots itself, and looks for the whole anywhere in a name."""
    return f"{modules}.({numbers})."


def _gptqmodel(modules: str, numbers: str) -> str:
    """GPTQModel matches from the beginning of a name."""
    return rf"+:.*\b{re.escape(modules)}\.(?:{numbers})\..*"


_KEYS = {
    "auto-round": re.compile(r"\w+\.\d+\.[\w.]+\.\(\d+(\|\d+)*\)\."),
    "gptqmodel": re.compile(r"\+:\.\*\\b[\w\\.]+\\\.\(\?:\d+(\|\d+)*\)\\\.\.\*"),
}
_SPELLINGS: dict[str, Callable[[str, str], str]] = {"auto-round": _auto_round, "gptqmodel": _gptqmodel}


def _counts(stats: CalibrationStats, layers: Mapping[int, Ranked]) -> list[list[int]]:
    """Tokens of each expert, for every decoder layer; zeros for those without experts.

    Raises:
        RequestError: If layers have different numbers of experts.
    """
    sizes = {len(layer.tokens) for layer in layers.values()}
    if len(sizes) > 1:
        raise RequestError(
            f"layers have {min(sizes)} to {max(sizes)} experts, and SGLang takes the same number in each; export a "
            "model or a plan with equal layers."
        )
    dense = {int(index): (0,) * max(sizes) for index in stats.model.get("dense_layers") or ()}
    rows: dict[int, Sequence[float]] = {**dense, **{index: layer.tokens for index, layer in layers.items()}}
    return [[round(tokens) for tokens in rows[index]] for index in sorted(rows)]
