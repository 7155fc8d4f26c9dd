# SPDX-License-Identifier: Apache-2.0
"""The decision: which experts every layer retains. A person can read, edit, compare, keep and apply it again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RequestError, check_type
from .names import PLAN_NAME
from .storage.files import check_own, write_json
from .storage.gguf_files import is_gguf, read_gguf_plan
from .storage.kinds import PLAN, reading
from .storage.paths import check_name
from .storage.values import Json, Values, check_version, is_integer, read_from, read_json

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

FORMAT_VERSION = 1
_IN_NOTES = ("ties", "unreached", "few_tokens")  # findings that a note says in words
_MOST_EXPERTS = 100_000  # beyond any model; keeps a damaged file from asking for all memory


@dataclass(frozen=True)
class PruningPlan:
    """Which experts to retain, by decoder layer. Expert ids are those of the model the plan was made for.

    Attributes:
        model_type: Of that model.
        top_k: Experts used per token.
        method: How the experts were chosen.
        retained: Sorted ids of the retained experts, by layer. Dense layers are absent. Heads for further tokens (MTP)
            count as layers after the last; one that is not named is left whole or out, or pruned by its router
            (``mtp``).
        original_num_experts: Experts before pruning, by layer.
        scores: The method's scores ``(E,)`` by layer; None for methods that choose sets.
        config: The recipe, as plain values.
        provenance: Model and calibration it was made from, versions, times.
        heads: Those of the layers that are heads.
    """

    model_type: str
    top_k: int
    method: str
    retained: dict[int, tuple[int, ...]]
    original_num_experts: dict[int, int]
    scores: dict[int, tuple[float, ...]] | None = None
    config: Json = field(default_factory=dict)
    provenance: Json = field(default_factory=dict)
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        if not self.retained or set(self.retained) != set(self.original_num_experts):
            raise RequestError(
                "a plan names retained experts and the original number for each MoE layer, the same layers."
            )
        if not set(self.heads) < set(self.retained):
            raise RequestError("the plan's heads are layers that it does not name, or all it names.")
        if not is_integer(self.top_k) or self.top_k < 1:
            raise RequestError(f"the plan's top_k is {self.top_k!r}; it must be a positive integer.")
        if not isinstance(self.provenance.get("findings", {}), dict):
            raise RequestError("the plan's findings are damaged.")
        made_for = self.provenance.get("model") or {}
        if (
            not isinstance(made_for, dict)
            or not isinstance(made_for.get("fingerprint", ""), str)
            or not _is_sketch(made_for.get("router_sketch") or {})
        ):
            raise RequestError("the plan's provenance of the model is damaged.")
        for layer, experts in self.retained.items():
            original = self.original_num_experts[layer]
            if not is_integer(layer) or layer < 0:
                raise RequestError(f"the plan names layer {layer!r}; layers are numbered from 0.")
            if not is_integer(original) or not 1 <= original <= _MOST_EXPERTS:
                raise RequestError(f"layer {layer}: the plan's original_num_experts is {original!r}.")
            if not all(map(is_integer, experts)) or list(experts) != sorted(set(experts)):
                raise RequestError(f"layer {layer}: retained experts must be distinct integers in rising order.")
            outside = next((expert for expert in experts if not 0 <= expert < original), None)
            if outside is not None:
                raise RequestError(
                    f"layer {layer}: retained names expert {outside}, and its experts are 0 to {original - 1}."
                )
            if len(experts) < self.top_k:
                raise RequestError(
                    f"layer {layer}: {len(experts)} experts are retained, and every token uses {self.top_k}."
                )
            scores = None if self.scores is None else self.scores.get(layer)
            if scores is not None and (
                len(scores) != original or not np.isfinite(np.asarray(scores, dtype=float)).all()
            ):
                raise RequestError(f"layer {layer}: scores must be {original} finite numbers.")

    @property
    def num_experts(self) -> dict[int, int]:
        """Retained experts, by layer."""
        return {layer: len(experts) for layer, experts in self.retained.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of routed experts that is removed."""
        return 1 - sum(self.num_experts.values()) / sum(self.original_num_experts.values())

    @property
    def made_for(self) -> Json:
        """The model it was made for: ``fingerprint``, ``name_or_path``, ``revision`` ..., where known."""
        return self.provenance.get("model") or {}

    @property
    def lineage(self) -> list[Json]:
        """``made_for`` of this plan and of those before it, where its model had been pruned before; the last first."""
        models: list[Json] = []
        provenance: Any = self.provenance
        while isinstance(provenance, dict):  # of the earlier plans nothing was checked
            model, parent = provenance.get("model"), provenance.get("parent")
            models += [model] if isinstance(model, dict) else []
            provenance = parent.get("provenance") if isinstance(parent, dict) else None
        return models

    @property
    def uniform_num_experts(self) -> int | None:
        """The number of experts where every layer of the model retains the same, else None."""
        counts = {len(experts) for layer, experts in self.retained.items() if layer not in self.heads}
        return counts.pop() if len(counts) == 1 else None

    @property
    def notes(self) -> list[str]:
        """What a person must know of it, of what was recovered, and of what experts that go answer with, each once; of
        what was edited, what can be read."""
        more = [self.provenance.get(name) for name in ("recovery", "substitution")]
        parts = [self.provenance.get("notes"), *(part.get("notes") for part in more if isinstance(part, dict))]
        return list(dict.fromkeys(str(note) for part in parts if isinstance(part, (list, tuple)) for note in part))

    @property
    def without_recovery(self) -> PruningPlan:
        """The plan of the cut alone: what recovered weights were worth is not true of a model that lacks them, nor
        what experts answered with of one that has none in their place."""
        if not {"recovery", "substitution"} & self.provenance.keys():
            return self
        left = {k: v for k, v in self.provenance.items() if k not in ("recovery", "substitution")}
        return replace(self, provenance=left)

    @property
    def without_heads(self) -> PruningPlan:
        """The plan of the model's own layers."""
        if not self.heads:
            return self

        def of_layers(values: dict[int, Any]) -> dict[int, Any]:
            return {layer: value for layer, value in values.items() if layer not in self.heads}

        scores = None if self.scores is None else of_layers(self.scores)
        retained, original = of_layers(self.retained), of_layers(self.original_num_experts)
        return replace(self, retained=retained, original_num_experts=original, scores=scores, heads=())

    def summary(self) -> str:
        """A table for people: one line per layer."""
        kept, total = sum(self.num_experts.values()), sum(self.original_num_experts.values())
        lines = [
            f"{self.method}: {kept} of {total} experts retained in {len(self.retained)} layers ({self.sparsity:.0%} "
            "removed)"
        ]
        width = max(len(str(layer)) for layer in self.retained)
        for layer, experts in sorted(self.retained.items()):
            ids = " ".join(map(str, experts))
            counts = f"{len(experts)} of {self.original_num_experts[layer]}"
            lines.append(f"  layer {layer:>{width}}  {counts}: {ids}{' (head)' if layer in self.heads else ''}")
        found = {
            name: value for name, value in (self.provenance.get("findings") or {}).items() if name not in _IN_NOTES
        }
        if found:
            lines.append("  found: " + "; ".join(f"{name} {_shown(value)}" for name, value in found.items()))
        return "\n".join(lines)

    def diff(self, other: PruningPlan) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Where two plans differ: by layer, the experts only this one retains and those only the other does."""
        check_type(other, PruningPlan, "a PruningPlan (PruningPlan.load reads a file)")
        layers = sorted(set(self.retained) | set(other.retained))
        pairs = {layer: (set(self.retained.get(layer, ())), set(other.retained.get(layer, ()))) for layer in layers}
        return {
            layer: (tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine)))
            for layer, (mine, theirs) in pairs.items()
            if mine != theirs
        }

    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """Prune a model in memory: the same model, now smaller (``surgery.in_memory.apply_plan``)."""
        from .surgery.in_memory import apply_plan

        return apply_plan(self, model)

    def apply_to_checkpoint(self, source: str | Path, target: str | Path, **options: Any) -> Path:
        """Write a pruned copy of a checkpoint without building the model (``MoEPruner.prune_checkpoint``).

        Args:
            source: The folder or Hub id of the model the plan was made for; or the same model in another form
                (``formats/README.md``): a GGUF file, an MLX folder, an adapter that was trained on it.
            target: The folder, or file, to write, absent or empty.
            options: ``max_shard_size``, ``overwrite``; of a checkpoint ``standalone``, ``mtp``, ``program`` that is to
                open it (``list targets``) and ``parallel_size``, the devices over which that spreads experts,
                ``substitute`` (statistics with mean outputs, with which experts that go answer in what vLLM reads);
                for the card ``base_model``, ``license``, ``language``; and for the Hub ``revision``, ``token``,
                ``cache_dir``, ``trust_remote_code``.
        """
        from .publishing.outputs import apply_anywhere

        return apply_anywhere(self, source, target, **options)

    def export(self, format: str = "json") -> str:
        """The plan as other tools read it (``publishing.export``); the format ``"json"`` says everything.

        Raises:
            RequestError: If the format is not known.
        """
        from .publishing.export import export_plan

        return export_plan(self, format)

    # -- files

    def to_dict(self) -> Json:
        """As plain JSON values."""
        scores = self.scores or {}
        return {
            "format_version": FORMAT_VERSION,
            "model_type": self.model_type,
            "top_k": self.top_k,
            "method": self.method,
            "config": self.config,
            "layers": {
                str(layer): {
                    "original_num_experts": self.original_num_experts[layer],
                    "num_experts": len(experts),
                    "retained": list(experts),
                    "scores": list(scores[layer]) if layer in scores else None,
                    **({"head": True} if layer in self.heads else {}),
                }
                for layer, experts in sorted(self.retained.items())
            },
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: Values) -> PruningPlan:
        """From plain values.

        Raises:
            RequestError: If they are of a newer format, or no sound plan.
        """
        check_version(values, FORMAT_VERSION, "the plan")
        entries = values.get("layers")
        if not isinstance(entries, dict):
            raise RequestError("the plan is damaged: it has no layers, as an object with an entry for each.")
        try:
            layers = {_layer_number(layer): entry for layer, entry in entries.items()}
            for layer, entry in layers.items():
                if not isinstance(entry, dict) or not isinstance(entry.get("retained"), list):
                    raise RequestError(f"layer {layer}: the plan is damaged: it has no list of retained experts.")
                if entry["num_experts"] != len(entry["retained"]):
                    raise RequestError(
                        f"layer {layer}: num_experts is {entry['num_experts']!r}, and {len(entry['retained'])} "
                        "experts are retained; change both when editing a plan."
                    )
            scores = {
                layer: tuple(entry["scores"]) for layer, entry in layers.items() if entry.get("scores") is not None
            }
            return cls(
                model_type=str(values["model_type"]),
                top_k=values["top_k"],
                method=str(values["method"]),
                retained={layer: tuple(entry["retained"]) for layer, entry in layers.items()},
                original_num_experts={layer: entry["original_num_experts"] for layer, entry in layers.items()},
                scores=scores or None,
                config=dict(values.get("config") or {}),
                provenance=dict(values.get("provenance") or {}),
                heads=tuple(sorted(layer for layer, entry in layers.items() if entry.get("head"))),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, RequestError):
                raise
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise RequestError(f"the plan is damaged: {what}.") from error

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, to a ``.json`` file or as ``moe_pruning_plan.json`` into a folder.

        Raises:
            RequestError: If something else than a plan is there.
            RunError: If it cannot be written.
        """
        path = check_name(path)
        if path.suffix != ".json":
            path = path / PLAN_NAME
        check_own(path, PruningPlan.load)
        return write_json(path, self.to_dict(), indent=2)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan from a file, or from what this package made by it: the folder of a checkpoint, a GGUF file.

        Raises:
            RequestError: If there is none, or it is damaged or of a newer format.
        """
        given = path = Path(path)
        if path.is_dir():
            path = path / PLAN_NAME
        with reading(given, PLAN), read_from(path):
            return cls.from_dict(read_gguf_plan(path) if is_gguf(path) else read_json(path))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **hub: Any) -> PruningPlan:
        """The plan of a checkpoint this package made, from its folder or from the Hub.

        Args:
            name_or_path: The folder or Hub id.
            hub: ``revision``, ``token``, ``cache_dir``.

        Raises:
            RequestError: If there is none, or it is damaged or of a newer format.
        """
        from .checkpoints.source import Source

        plan = Source.of(name_or_path, **hub).stored_plan()
        if plan is None:
            raise RequestError(f"{name_or_path} has no {PLAN_NAME}: it was not pruned by this package.")
        return plan


def _shown(value: Any) -> str:
    """A finding as text; of one by layer its values."""
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def with_parent(plan: PruningPlan, parent: PruningPlan | None) -> PruningPlan:
    """The plan, remembering the plan that made the model it was made for, if there is one."""
    if parent is None or "parent" in plan.provenance:
        return plan
    return replace(plan, provenance={**plan.provenance, "parent": parent.to_dict()})


def _layer_number(name: str) -> int:
    """The layer that a key names, which is written in one way alone: else two keys could name one layer."""
    if not re.fullmatch("-?(0|[1-9][0-9]{0,8})", name):
        raise RequestError(f"the plan is damaged: {name!r} is no number of a layer.")
    return int(name)


def _is_sketch(value: Any) -> bool:
    """Whether it is lists of numbers by layer (``architectures.fingerprint.sketch_of``)."""
    return isinstance(value, dict) and all(
        isinstance(numbers, list) and all(is_integer(number) or isinstance(number, float) for number in numbers)
        for numbers in value.values()
    )
