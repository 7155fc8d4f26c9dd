# SPDX-License-Identifier: Apache-2.0
"""What can be done with models of each known type, for people: the table of ``list models`` and of the README here."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..compat import default_config
from .forms import Form, Mixer
from .rows import ROWS
from .spec import MoESpec
from .table import all_architectures

BUILT_MTP = frozenset(
    "bailing_hybrid deepseek_v3 deepseek_v4 glm4_moe inkling_text mellum nemotron_h sarvam_mla sarvam_moe "
    "step3p5".split()
)
"""The types of the rows whose heads for further tokens transformers builds."""
_OF_ROWS = frozenset(model_type for spec in ROWS for model_type in (spec.model_type, *spec.also))


@dataclass(frozen=True)
class Support:
    """One model type.

    Attributes:
        model_type: Of the config of its text part.
        routing: How its routers choose.
        unequal: Whether layers may keep different numbers of experts. The same number in each is always possible.
        streaming: Whether one layer at a time can be held in memory.
        mtp: Whether transformers builds its heads for further tokens, so that they are calibrated as well. Others are
            cut by the rows of their routers.
        methods: Which methods apply.
        notes: What else is to be known.
    """

    model_type: str
    routing: str
    unequal: bool
    streaming: bool
    mtp: bool
    methods: str
    notes: str


def supported() -> list[Support]:
    """All types that can be pruned, by name."""
    found = []
    for spec in all_architectures():
        for model_type in () if spec.refused else (spec.model_type, *spec.also):
            notes = "; ".join(note for note in (_groups(spec), spec.notes) if note)
            facts = (spec.unequal, spec.streams, _has_mtp(model_type))
            found.append(Support(model_type, _routing(spec), *facts, _methods(spec), notes))
    return sorted(found, key=lambda support: support.model_type)


def refused() -> dict[str, str]:
    """The types that are refused, and why."""
    return {spec.model_type: spec.refused for spec in all_architectures() if spec.refused}


def as_table(mark: str = "") -> list[list[str]]:
    """Head and rows of the table.

    Args:
        mark: Put around names, as Markdown marks code.
    """
    head = ["model type", "routing", "unequal layers", "streaming", "MTP heads calibrated", "methods", "notes"]

    def cell(value: str | bool) -> str:
        return value if isinstance(value, str) else "yes" if value else "no"

    rows = [[*map(cell, asdict(support).values())] for support in supported()]
    return [head, *([f"{mark}{name}{mark}", *others] for name, *others in rows)]


def _routing(spec: MoESpec) -> str:
    form = spec.form
    if isinstance(form, Mixer):
        return "sparse mixer"
    if not isinstance(form, Form):
        return "softmax"
    score = form.score if form.score in ("softmax", "sigmoid") else "by its config"
    parts = [score, *(["bias"] if form.bias else []), *(["groups"] if form.groups else [])]
    parts += ["scale of each expert"] if form.expert_scale == "per_expert_scale" else []
    parts += ["on the input"] if form.on_input else []
    parts += ["tables of token ids"] if form.table else []
    return ", ".join(parts)


def _groups(spec: MoESpec) -> str:
    return "with n_group > 1, the same number in each group" if getattr(spec.form, "groups", False) else ""


def _methods(spec: MoESpec) -> str:
    if getattr(spec.form, "shared", False):
        return "of scores"
    return "all; in layers with a table those of scores" if getattr(spec.form, "table", "") else "all"


def _has_mtp(model_type: str) -> bool:
    if model_type in _OF_ROWS:  # without transformers
        return model_type in BUILT_MTP
    try:
        config = default_config(model_type)
    except (ValueError, KeyError):
        return False
    return any(hasattr(config, name) for name in ("num_mtp_layers", "num_nextn_predict_layers"))
