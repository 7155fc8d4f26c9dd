# SPDX-License-Identifier: Apache-2.0
"""The known methods, by name.

A *score* method gives one number per expert and the budget chooses; a *set* method gives the retained experts itself,
because what one expert is worth depends on the others. Both see the statistics of all layers. A *measured* method
(``auto``) names others, and what they retain is measured on the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RequestError, RunError, nearest_first
from ..names import BY_SENSITIVITY, ESTIMATED, GLOBAL, UNIFORM
from ..statistics.needs import Need
from ..storage.values import Values
from .budget import Budget, UniformBudget, choose_ranked, keys_of
from .selection import Retained, Scores, Selection
from .ties import tied_by_keys

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats, LayerStats

logger = logging.getLogger(__name__)

ENTRY_POINTS = "optimum_moe_prune.methods"

ALLOCATIONS = (UNIFORM, GLOBAL)
"""What a method does itself; by measured or estimated divergences goes every method that takes a number for each
layer."""


MEASURED = (BY_SENSITIVITY, UNIFORM)
"""What a method does that measures others."""

TIE_ADVICE = "more calibration text, or another method, may tell them apart"


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class Method:
    """One way of choosing experts.

    Attributes:
        name: As in ``MoEPrunerConfig(method=...)`` and ``--method``.
        summary: What it does, in one line.
        source: Where it was published.
        needs: The statistics it reads, given its options.
        options: A frozen dataclass of its options, each with a default.
        allocations: How it can spread a budget over the layers, its own way first: ``"uniform"`` (the same in every
            layer, a ``UniformBudget``) or ``"global"`` (a number for the whole model, a plain ``Budget``); of a method
            that measures ``"sensitivity"`` as well.
        formula: What it calculates, in words, for model cards.
        check: ``(budget, options) -> None``: raises what can be refused before any work.
        tie_advice: What tells experts apart that are equally good by it (``Selection.ties``), in words.
        by_layer: Whether its answer for a layer, of a given number of experts, follows from the statistics of that
            layer alone. Where it does not, choosing layer by layer (``MoEPrunerConfig.progressive``) needs statistics
            of the later layers as well, and takes those of the unpruned model.
        scores: ``(stats, options) -> {layer: (E,)}``, higher = keep; or
        retained: ``(stats, budget, options) -> {layer: experts}``, or a ``Selection``; or
        candidates: ``(options) -> (method, ...)``: the methods of whose sets the best are taken, by measuring.
    """

    name: str
    summary: str
    source: str
    needs: Callable[[Any], frozenset[Need]]
    options: type
    allocations: tuple[str, ...]
    formula: str = ""
    check: Callable[[Any, Any], None] | None = None
    tie_advice: str = TIE_ADVICE
    by_layer: bool = False
    scores: Callable[[CalibrationStats, Any], Scores] | None = None
    retained: Callable[[CalibrationStats, Any, Any], Retained | Selection] | None = None
    candidates: Callable[[Any], tuple[str, ...]] | None = None

    @property
    def takes(self) -> tuple[str, ...]:
        """The allocations that can be asked for."""
        if self.measures or "uniform" not in self.allocations:
            return self.allocations
        return (*self.allocations, BY_SENSITIVITY, ESTIMATED)

    @property
    def measures(self) -> bool:
        """Whether it chooses among the sets of other methods by measuring them; statistics alone are not enough."""
        return self.candidates is not None

    def select(self, stats: CalibrationStats, budget: Budget, options: Any) -> Selection:
        """The method's answer.

        Raises:
            RunError: If it does not keep to the budget.
        """
        if self.scores is not None:
            scores = self.scores(stats, options)
            keys = keys_of(scores, budget)
            chosen = choose_ranked(keys, budget)
            return Selection(chosen, scores, ties=tied_by_keys(keys, budget, chosen))
        if self.retained is None:
            raise RequestError(statistics_alone(self.name))
        answer = self.retained(stats, budget, options)
        selection = answer if isinstance(answer, Selection) else Selection(answer)
        retained = selection.retained
        for layer in budget.original:
            experts = retained.get(layer, ())
            fixed = budget.num_experts[layer] if isinstance(budget, UniformBudget) else None
            enough = len(experts) in budget.allowed(layer) if fixed is None else len(experts) == fixed
            total, rule = budget.original[layer], budget.rule
            inside = set(budget.protected[layer]) <= set(experts) <= set(range(total))
            if not enough or not inside or not rule.admits(sorted(experts), len(experts), total):
                count = f"{budget.allowed(layer)[0]} or more" if fixed is None else fixed
                shared = f", as many in each of the router's {rule.groups} groups," if rule.groups > 1 else ""
                raise RunError(
                    f"method {self.name!r} retains {list(experts)} in layer {layer}, where the budget keeps {count} "
                    f"experts{shared} and protects {list(budget.protected[layer])}."
                )
        total = sum(len(retained[layer]) for layer in budget.original)
        if total != budget.total:
            raise RunError(f"method {self.name!r} retains {total} experts, and the budget keeps {budget.total}.")
        return selection


_METHODS: dict[str, Method] = {}
_entry_points_read = False


def register_method(
    name: str,
    *,
    kind: str,
    summary: str,
    source: str,
    needs: frozenset[Need] | set[Need] | Callable[[Any], frozenset[Need]],
    options: type = NoOptions,
    allocations: tuple[str, ...] | None = None,
    formula: str = "",
    check: Callable[[Any, Any], None] | None = None,
    tie_advice: str = TIE_ADVICE,
    by_layer: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the function of a method and make it known.

    Args:
        name: Its name.
        kind: ``"scores"``, ``"set"`` or ``"measured"``: see ``Method.scores``, ``Method.retained`` and
            ``Method.candidates`` for what the function takes and gives.
        summary: What it does, in one line.
        source: Where it was published.
        needs: The statistics it reads, or a function of its options.
        options: A frozen dataclass of its options.
        allocations: See ``Method.allocations``; by default both for scores, uniform for a set, and by sensitivity or
            uniform for what is measured.
        formula: What it calculates, in words, for model cards.
        check: Raises what can be refused before any work.
        tie_advice: See ``Method.tie_advice``.
        by_layer: See ``Method.by_layer``.

    Raises:
        RequestError: If the name is taken or the kind unknown.

    Example:
        >>> @register_method("largest_router_row", kind="scores", summary="...", source="...", needs={Need.ROUTING})
        ... def largest(stats, options):
        ...     return {i: layer.total("probability").numpy() for i, layer in stats.layers.items()}
    """
    if name in _METHODS:
        raise RequestError(f"method {name!r} is registered already.")
    if kind not in ("scores", "set", "measured"):
        raise RequestError(f"kind is {kind!r}; a method gives 'scores' or a 'set', or others are 'measured' by it.")
    if kind == "measured":
        allocations = allocations or MEASURED
    elif allocations is None:
        allocations = ALLOCATIONS if kind == "scores" else ALLOCATIONS[:1]
    if not allocations or not set(allocations) <= set(MEASURED if kind == "measured" else ALLOCATIONS):
        raise RequestError(f"allocations are {allocations!r}; known: {', '.join(ALLOCATIONS)}.")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        needed = needs if callable(needs) else lambda _options: frozenset(needs)
        _METHODS[name] = Method(
            name,
            summary,
            source,
            needed,
            options,
            allocations,
            formula,
            check,
            tie_advice,
            by_layer,
            scores=function if kind == "scores" else None,
            retained=function if kind == "set" else None,
            candidates=function if kind == "measured" else None,
        )
        return function

    return register


def statistics_alone(name: str) -> str:
    """What is wrong where a method that measures the model is to choose without it."""
    return (
        f"method {name!r} chooses by measuring the model, and here are statistics alone; choose one that needs no "
        "more (method='mosaic'), or give what was measured of the model (sensitivity=...)."
    )


def list_methods() -> list[str]:
    """Names of the known methods, those that installed packages register as entry points included."""
    global _entry_points_read
    if not _entry_points_read:
        _entry_points_read = True
        for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                entry_point.load()
            except Exception as error:  # another package's mistake must not stop this one
                logger.warning("the methods of %s cannot be loaded: %r", entry_point.value, error)
    return sorted(_METHODS)


def every_method() -> list[str]:
    """The same, those that measure others last: what ``"all"`` means where methods stand side by side."""
    return sorted(list_methods(), key=lambda name: _METHODS[name].measures)


def get_method(name: str) -> Method:
    """A method by name, in capitals or not.

    Raises:
        RequestError: If there is none, listing those there are, the most similar name first.
    """
    known = list_methods()
    if isinstance(name, str) and name in _METHODS:
        return _METHODS[name]
    alike = [each for each in known if _plain(each) == _plain(str(name))]
    if len(alike) != 1:
        raise RequestError(f"method {name!r} is not known. Known: {nearest_first(str(name), known)}.")
    return _METHODS[alike[0]]


def _plain(name: str) -> str:
    """A name without what people write in different ways: ``Soft-Frequency``, ``soft_frequency``."""
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def make_options(method: Method, values: Values) -> Any:
    """The options of a method from plain values; numbers and truth values may come as text.

    Raises:
        RequestError: If an option is unknown, or its value has the wrong type or is refused by the method.
    """
    if not isinstance(values, Mapping):
        raise RequestError(f"method_options is {values!r}; it must be a mapping of names to values.")
    hints = typing.get_type_hints(method.options)
    known = [f.name for f in dataclasses.fields(method.options)]
    converted = {}
    for name, value in values.items():
        if name not in known:
            options = f"Its options: {nearest_first(name, known)}." if known else "It has none."
            raise RequestError(f"method {method.name!r} has no option {name!r}. {options}")
        converted[name] = _converted(method.name, name, value, hints[name])
    try:
        return method.options(**converted)
    except ValueError as error:
        raise RequestError(f"method {method.name!r}: {error}") from error


_KINDS = {int: "an integer", float: "a number", bool: "true or false", type(None): "none"}


def _converted(method: str, name: str, value: Any, hint: Any) -> Any:
    """An option's value in one of the types its annotation allows; text is read, as the command line gives it."""
    choices: list[Any] = []
    kinds: list[type] = []
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    for part in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(part) is typing.Literal:
            choices += typing.get_args(part)
        else:
            kinds.append(part)
    if isinstance(value, str) and value in choices:
        return value
    for kind in kinds:
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if isinstance(value, str):
            if kind is type(None) and value.lower() == "none":
                return None
            if kind is bool and value.lower() in ("true", "false"):
                return value.lower() == "true"
            if kind is int or kind is float:
                with contextlib.suppress(ValueError):
                    return kind(value)
    expected = [*map(repr, choices), *(_KINDS.get(kind, kind.__name__) for kind in kinds)]
    raise RequestError(f"option {name!r} of method {method!r} is {value!r}; it takes {' or '.join(expected)}.")


def per_routed_token(layer: LayerStats, name: str) -> np.ndarray:
    """A sum over routed tokens divided by their number ``(E,)``; 0 for an expert without any."""
    total, tokens = layer.total(name).numpy(), layer.total("routed_tokens").numpy()
    return np.divide(total, tokens, out=np.zeros_like(total), where=tokens > 0)
