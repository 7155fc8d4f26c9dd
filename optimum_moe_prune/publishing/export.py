# SPDX-License-Identifier: Apache-2.0
"""A plan for programs that leave experts out while they load the original checkpoint.

No release of the common servers reads a file for that beside the original (looked for in autumn 2026: vLLM, SGLang,
llama.cpp, KTransformers, TensorRT-LLM, mlx-lm, MLC, ExLlama, DeepSpeed). What their documents call an expert map or
mask places experts on devices, or limits how many a token uses. So there is a generic file (``json``), which says
everything. vLLM 0.33 reads checkpoints in which experts are left out and answer with a constant, which takes more than
a plan: ``substitute`` (``surgery.substituted``).

For a server that only reads checkpoints there is nothing to export: ``PruningPlan.apply_to_checkpoint``. What
statistics say of experts has formats of its own (``export_statistics``).
"""

from __future__ import annotations

import json
from typing import Any

from ..architectures.patterns import patterns_of_type
from ..errors import RequestError, nearest_first
from ..plan import PruningPlan
from ..storage.values import Json, check_version, no_constant

FORMAT = "optimum-moe-prune/experts"
FORMAT_VERSION = 1
EXPORT_FORMATS = ("json",)
"""The formats of :func:`export_plan`."""


def export_plan(plan: PruningPlan, format: str = "json") -> str:
    """A plan as the text of a file in another format.

    Expert ids are those of the model the plan was made for, layers are decoder layers, and layers without experts are
    absent.

    ``json``: this package's own, one object:

    - ``format``: ``"optimum-moe-prune/experts"``; ``format_version``: 1. A reader refuses a newer version.
    - ``model``: ``name_or_path``, ``revision`` (a commit) and ``fingerprint`` of the model, each a string or null. The
      fingerprint is the sha256 of its router weights, see ``models.blocks.fingerprint``.
    - ``model_type``: as in the model's ``config.json``; ``top_k``: experts that each token uses, before and after.
    - ``method``: how the experts were chosen.
    - ``num_experts_key``: where ``config.json`` says the number of experts; null for an unknown architecture.
    - ``tensors``: names in the model's checkpoint, with ``{layer}`` and ``{expert}`` to fill in; null for an unknown
      architecture. Where there are several, a checkpoint has one of them.

      - ``router``: tensors with a row for each expert. Keep the rows ``retained``, in that order.
      - ``expert``: how the names of one expert's tensors begin. Leave out those of ``removed``; the others belong to
        the expert ``new_ids[expert]``.
      - ``fused_experts``: tensors with the experts in the first dimension, in checkpoints that hold them so. Keep the
        slices ``retained``, in that order.

    - ``layers``: by number, as a string:

      - ``original_num_experts``, ``num_experts``: before and after.
      - ``retained``, ``removed``: ids in rising order; together all.
      - ``new_ids``: for each id before, the id after: 0, 1, ... over ``retained``, and -1 for a removed expert.
      - ``keep``: for each id before, whether it is retained.

    Removing an expert is the same as a router logit of minus infinity before the ``top_k`` are chosen and the weights
    are computed; a program that cannot leave tensors out may mask with ``keep``.

    Args:
        plan: The plan.
        format: A name in :data:`EXPORT_FORMATS`.

    Raises:
        RequestError: If the format is not known.
    """
    if format not in EXPORT_FORMATS:
        raise RequestError(f"export format {format!r} is not known: {nearest_first(str(format), [*EXPORT_FORMATS])}.")
    return _json(plan)


def import_plan(text: str) -> dict[int, tuple[int, ...]]:
    """The retained experts by layer, from a file of the format ``json``.

    Args:
        text: What :func:`export_plan` gave.

    Raises:
        RequestError: If it is another format, a newer version, damaged, or contradicts itself.
    """
    try:
        values = json.loads(text, parse_constant=no_constant, object_pairs_hook=_object)
        if values["format"] != FORMAT:
            raise RequestError(f"the file's format is {values['format']!r}, and {FORMAT!r} is read.")
        check_version(values, FORMAT_VERSION, "the exported plan")
        plan = PruningPlan(
            model_type=str(values["model_type"]),
            top_k=values["top_k"],
            method=str(values["method"]),
            retained={int(layer): tuple(entry["retained"]) for layer, entry in values["layers"].items()},
            original_num_experts={
                int(layer): entry["original_num_experts"] for layer, entry in values["layers"].items()
            },
        )
        for name, entry in values["layers"].items():
            layer = int(name)
            if name != str(layer) or json.dumps(entry, sort_keys=True) != json.dumps(
                _layer(plan, layer), sort_keys=True
            ):
                raise RequestError(f"layer {name}: the entries of the file contradict one another.")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the exported plan is damaged: {error!r}.") from error
    return dict(sorted(plan.retained.items()))


def _json(plan: PruningPlan) -> str:
    known = patterns_of_type(plan.model_type)
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {key: _text_or_none(plan.made_for.get(key)) for key in ("name_or_path", "revision", "fingerprint")},
        "model_type": plan.model_type,
        "top_k": plan.top_k,
        "method": plan.method,
        "num_experts_key": None if known is None else known.count_key,
        "tensors": None if known is None else known.tensors,
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    layers = [f"    {json.dumps(str(layer))}: {json.dumps(_layer(plan, layer))}" for layer in sorted(plan.retained)]
    lines.append('  "layers": {\n' + ",\n".join(layers) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _layer(plan: PruningPlan, layer: int) -> Json:
    count, retained = plan.original_num_experts[layer], plan.retained[layer]
    new_ids = [-1] * count
    for new, old in enumerate(retained):
        new_ids[old] = new
    return {
        "original_num_experts": count,
        "num_experts": len(retained),
        "retained": list(retained),
        "removed": [expert for expert, new in enumerate(new_ids) if new < 0],
        "new_ids": new_ids,
        "keep": [new >= 0 for new in new_ids],
    }


def _text_or_none(value: Any) -> str | None:
    """What a plan says of its model; plans are edited by hand."""
    return value if isinstance(value, str) else None


def _object(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values
