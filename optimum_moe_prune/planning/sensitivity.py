# SPDX-License-Identifier: Apache-2.0
"""How far a model can be pruned, and where: divergences of its final output (``allocation`` spreads budgets by them).

For each method, layer and number of experts, the divergence when only that layer is pruned; and for whole plans over a
grid of sparsities. ``allocation="sensitivity"`` takes for each layer the number of experts that minimises the sum of
the measured divergences under the budget: exactly, by dynamic programming over the layers.

The sum stands in for the divergence of the whole plan, which is measured as well: layers that are pruned together
often cost less or more than the sum of what they cost alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.fingerprint import same_routers
from ..errors import RequestError
from ..storage.files import check_own, write_json
from ..storage.kinds import SENSITIVITY, reading
from ..storage.values import Json, Values, check_version, is_integer, read_from, read_json

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

FORMAT_VERSION = 1
ALL = "all"


Retained = dict[int, tuple[int, ...]]


Divergence = dict[str, float]
"""Mean KL(original || pruned) in nats per predicted token, by domain; ``"all"`` weights every token the same."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer, pruned alone by one method.

    Attributes:
        original_num_experts: Experts in the layer.
        retained: For each number of experts measured, those retained.
        kl: For each number of experts measured, the divergence.
    """

    original_num_experts: int
    retained: dict[int, tuple[int, ...]] = field(default_factory=dict)
    kl: dict[int, Divergence] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelSensitivity:
    """A whole plan by one method.

    Attributes:
        allocation: How its budget was spread over the layers.
        sparsity: The fraction of experts that was to be removed.
        retained: Experts by layer.
        kl: The divergence.
    """

    allocation: str
    sparsity: float
    retained: Retained
    kl: Divergence


@dataclass(frozen=True)
class MethodSensitivity:
    """What was measured of one method.

    Attributes:
        config: The settings that decide about its sets (:func:`decisive`).
        layers: By decoder layer.
        model: Whole plans.
    """

    config: Json
    layers: dict[int, LayerSensitivity]
    model: tuple[ModelSensitivity, ...] = ()


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of one model.

    Attributes:
        model: Facts of the model, as statistics and plans have them.
        tokens_by_domain: Predicted tokens it was measured on.
        methods: By method.
        domain_weights: The share of each domain in choosing experts, where it was set.
        provenance: Samples, settings, versions, times.
    """

    model: Json
    tokens_by_domain: dict[str, int]
    methods: dict[str, MethodSensitivity]
    domain_weights: dict[str, float] | None = None
    provenance: Json = field(default_factory=dict)

    def for_recipe(
        self, config: MoEPrunerConfig, model: Values, domain_weights: Mapping[str, float] | None = None
    ) -> MethodSensitivity:
        """What was measured of a recipe's method.

        Args:
            config: The recipe.
            model: Facts of the model it is for.
            domain_weights: The share of each domain.

        Raises:
            RequestError: If it was measured on another model, of other methods, or with other settings.
        """
        if not same_routers(self.model, model):
            raise RequestError(
                f"the sensitivity was measured on another model ({self.model.get('name_or_path') or 'unnamed'})."
            )
        if config.method not in self.methods:
            raise RequestError(
                f"the sensitivity was measured for {', '.join(sorted(self.methods))} and not for {config.method!r}; "
                "measure it as well (sensitivity --method)."
            )
        measured = self.methods[config.method]
        settings = {**measured.config, "domain_weights": self.domain_weights}
        asked = {**decisive(config), "domain_weights": None if domain_weights is None else dict(domain_weights)}
        for name, value in asked.items():
            if settings.get(name) != value:
                raise RequestError(
                    f"the sensitivity was measured with {name} {settings.get(name)!r}, and the recipe has {value!r}; "
                    "they must be the same."
                )
        return measured

    def summary(self) -> str:
        """Tables for people: for each method the divergence of each layer alone, and of the whole model."""
        lines = []
        for name, method in self.methods.items():
            counts = sorted({count for layer in method.layers.values() for count in layer.kl})
            lines.append(f"{name}: nats per token lost when one layer alone retains so many experts")
            lines.append("  layer  of" + "".join(f"{count:>8}" for count in counts))
            for index, layer in sorted(method.layers.items()):
                cells = (f"{layer.kl[c][ALL]:8.3f}" if c in layer.kl else " " * 8 for c in counts)
                lines.append(f"  {index:>5}{layer.original_num_experts:>4}" + "".join(cells))
            if method.model:
                sparsities = sorted({entry.sparsity for entry in method.model})
                lines.append(f"{name}: nats per token lost by the whole model at a sparsity of")
                lines.append(" " * 13 + "".join(f"{sparsity:>8.3g}" for sparsity in sparsities))
                for allocation in dict.fromkeys(entry.allocation for entry in method.model):
                    kl = {e.sparsity: e.kl[ALL] for e in method.model if e.allocation == allocation}
                    cells = (f"{kl[s]:8.3f}" if s in kl else " " * 8 for s in sparsities)
                    lines.append(f"  {allocation:<11}" + "".join(cells))
        return "\n".join(lines)

    # -- files

    def to_dict(self) -> Json:
        """As plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "samples": {"tokens_by_domain": self.tokens_by_domain},
            "methods": {
                name: {
                    "config": method.config,
                    "layers": {
                        str(index): {
                            "original_num_experts": layer.original_num_experts,
                            "counts": {
                                str(count): {"retained": list(layer.retained[count]), "kl": layer.kl[count]}
                                for count in sorted(layer.kl)
                            },
                        }
                        for index, layer in sorted(method.layers.items())
                    },
                    "model": [
                        {
                            "allocation": entry.allocation,
                            "sparsity": entry.sparsity,
                            "num_experts": {str(layer): len(experts) for layer, experts in entry.retained.items()},
                            "retained": {str(layer): list(experts) for layer, experts in entry.retained.items()},
                            "kl": entry.kl,
                        }
                        for entry in method.model
                    ],
                }
                for name, method in self.methods.items()
            },
            "domain_weights": self.domain_weights,
            "provenance": self.provenance,
        }

    @classmethod
    def from_dict(cls, values: Values) -> Sensitivity:
        """From plain values.

        Raises:
            RequestError: If they are of a newer format, or damaged.
        """
        check_version(values, FORMAT_VERSION, "the sensitivity")
        try:
            methods = {}
            for name, method in values["methods"].items():
                layers = {
                    int(index): LayerSensitivity(
                        _integer(entry["original_num_experts"]),
                        {int(count): _experts(one["retained"]) for count, one in entry["counts"].items()},
                        {int(count): _divergence(one["kl"]) for count, one in entry["counts"].items()},
                    )
                    for index, entry in method["layers"].items()
                }
                for layer in layers.values():
                    if any(
                        len(experts) != count or not experts or experts[-1] >= layer.original_num_experts
                        for count, experts in layer.retained.items()
                    ):
                        raise ValueError("the retained experts of a layer disagree with their number")
                model = tuple(
                    ModelSensitivity(
                        str(entry["allocation"]),
                        float(entry["sparsity"]),
                        {int(layer): _experts(experts) for layer, experts in entry["retained"].items()},
                        _divergence(entry["kl"]),
                    )
                    for entry in method["model"]
                )
                methods[str(name)] = MethodSensitivity(dict(method["config"]), layers, model)
            return cls(
                dict(values["model"]),
                {str(domain): _integer(n) for domain, n in values["samples"]["tokens_by_domain"].items()},
                methods,
                None if values.get("domain_weights") is None else dict(values["domain_weights"]),
                dict(values.get("provenance") or {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RequestError(f"the sensitivity is damaged: {error!r}.") from error

    def save(self, path: str | Path) -> Path:
        """Write a ``.json`` file."""
        return write_json(check_own(path, Sensitivity.load), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read a file.

        Raises:
            RequestError: If there is none, or it is damaged or of a newer format.
        """
        with reading(path, SENSITIVITY), read_from(path):
            return cls.from_dict(read_json(path))


def decisive(config: MoEPrunerConfig) -> Json:
    """The settings of a recipe that decide which experts are retained for given numbers, as plain JSON values."""
    values = config.to_dict()
    options = dict(sorted(vars(config.options()).items()))
    names = ("method", "protect", "skip_layers", "protect_super_experts", "seed")
    return json.loads(json.dumps({**{name: values[name] for name in names}, "method_options": options}))


def _integer(value: Any) -> int:
    if not is_integer(value) or value < 0:
        raise ValueError(f"{value!r} is no number of something")
    return int(value)


def _experts(values: Any) -> tuple[int, ...]:
    experts = tuple(map(_integer, values))
    if list(experts) != sorted(set(experts)):
        raise ValueError(f"{values!r} are not distinct experts in rising order")
    return experts


def _divergence(values: Values) -> Divergence:
    kl = {str(domain): float(value) for domain, value in values.items()}
    if ALL not in kl or not all(map(math.isfinite, kl.values())):
        raise ValueError(f"{values!r} is no divergence by domain")
    return kl
