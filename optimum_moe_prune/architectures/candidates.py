# SPDX-License-Identifier: Apache-2.0
"""Which known form of rule does what routers were seen to do: all forms, tried from the simplest on.

Choices and weights are looked at one after the other. What experts were chosen says the score, a bias, groups; their
weights, as far as they are a multiple of what the form gives, say the factor, which need not be known before.

Shapes: T tokens, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .routers import RoutingRule
from .rows import ROWS
from .rules import Form, Mixer, Softmax, TopK

AnyForm = Form | Softmax | Mixer

_FACTORS = ("scal", "factor")  # in names of keys by whose values weights may be multiplied
_CONSTANT = 1e-5  # as close as weights have to be, as a share of them: what is added to a small sum is seen so
_EPSILONS = (1e-20, 1e-12, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Observed:
    """What a router was seen to do.

    Attributes:
        layer: The decoder layer.
        logits: ``(T, E)``.
        ids: Experts that were called ``(T, K)``.
        weights: Their weights ``(T, K)``.
        tensors: The router's tensors by path.
    """

    layer: int
    logits: Tensor
    ids: Tensor
    weights: Tensor
    tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def vectors(self) -> list[str]:
        """Names of tensors with one number for each expert, as rules read them."""
        names = [path.rpartition(".")[2] for path in self.tensors]
        found = [n for n, t in zip(names, self.tensors.values(), strict=True) if t.numel() == self.logits.shape[1]]
        return [name for name in found if names.count(name) == 1]


@dataclass
class _Nearest:
    """The form that came nearest, to be named where none is right."""

    words: str = "none"
    layer: int = -1
    elsewhere: int = -1
    tokens: int = 0
    difference: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        return (float("inf"), 0.0) if self.elsewhere < 0 else (self.elsewhere / self.tokens, self.difference)

    def __str__(self) -> str:
        if self.elsewhere < 0:
            return "no known rule gives its routing"
        what = f"{self.elsewhere} of {self.tokens} tokens elsewhere"
        if not self.elsewhere:
            what = f"with weights up to {self.difference:.2g} away"
        return f"no known rule gives the routing of layer {self.layer}: nearest was {self.words}, {what}"


def find_form(config: Any, observed: Sequence[Observed]) -> AnyForm:
    """The simplest form that gives all choices and weights.

    Args:
        config: The config of the model's text part.
        observed: In float32, of one layer or more.

    Raises:
        RequestError: If there is none, naming the nearest.
    """
    top_k, nearest = observed[0].ids.shape[1], _Nearest()
    for choice in _choices(config, observed):
        if not _chooses(choice, config, top_k, observed, nearest):
            continue
        for form in _weighings(choice, config, top_k, observed, nearest):
            if all(not form.rule(config, top_k).of_router(o.tensors).disagreement(o.logits, o.ids, o.weights)
                   for o in observed):  # fmt: skip
                return form
    for row in dict.fromkeys(row.form for row in ROWS if row.form is not None):
        if isinstance(row, AnyForm) and _is_right(row, config, top_k, observed):
            return row
    raise RequestError(str(nearest))


def of_precision(form: AnyForm, config: Any, lower: Sequence[Observed]) -> AnyForm:
    """The same form, with what it does in a lower precision.

    Args:
        form: What was found in float32.
        config: The config of the model's text part.
        lower: What the routers did in that precision; perhaps nothing.
    """
    if not lower or isinstance(form, Mixer):
        return form
    if isinstance(form, Softmax):
        return replace(form, cast_weights=all(o.weights.dtype == o.logits.dtype for o in lower))
    top_k = lower[0].ids.shape[1]

    def differences(exact: bool) -> float:
        assert isinstance(form, Form)
        rule = replace(form, exact=exact).rule(config, top_k)
        weights = [(rule.of_router(o.tensors).weights(o.logits), o) for o in lower]
        return sum(
            float((w - torch.zeros_like(w).scatter_(1, o.ids, o.weights.double())).abs().mean()) for w, o in weights
        )

    return replace(form, exact=differences(True) <= differences(False))


def words_of(form: AnyForm, top_k: int) -> str:
    """A form in words."""
    if isinstance(form, Mixer):
        return f"the {top_k} best one after the other, each by a softmax of those near it ({form.jitter})"
    if isinstance(form, Softmax):
        return f"softmax, the {top_k} best, weights {'over their sum' if form.renormalise else 'as they are'}"
    chosen = "the logits" if form.by_logits else form.score
    parts = [
        f"{chosen}{f' + {form.bias}' if form.bias else ''}, the {top_k} best"
        + (f" of the best groups ({form.group_score})" if form.groups else ""),
        f"weights {form.score if form.by_logits else 'of the scores'} {'over their sum' if form.renormalise else ''}",
        f"x {form.scale}" if form.scale != 1.0 else "",
        f"x {form.expert_scale}" if form.expert_scale else "",
        f"epsilon {form.epsilon}" if form.epsilon else "",
        f"at least {form.floor}" if form.floor else "",
        f"logits capped by {form.softcap}" if form.softcap else "",
        f"logits x {form.multiplier}" if form.multiplier != 1.0 else "",
    ]
    return ", ".join(part.strip() for part in parts if part)


def _choices(config: Any, observed: Sequence[Observed]) -> Iterator[Form]:
    """All ways of choosing, simple ones first; of their weights only that they are the scores."""
    values = config.to_dict()
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and value}
    softcaps = [0.0, *(key for key in numbers if "softcap" in key)]
    multipliers = [1.0, *(key for key in numbers if "multipl" in key or "logit_scale" in key)]
    biases = ["", *dict.fromkeys(name for o in observed for name in o.vectors)]
    grouped = (values.get("n_group") or 1) > 1
    found = [
        Form(score, by_logits=by_logits, renormalise=False, bias=bias, groups=groups != "",
             group_score=groups or "top2", softcap=softcap, multiplier=multiplier)  # type: ignore[arg-type]
        for score, by_logits, bias, groups, softcap, multiplier in product(
            ("softmax", "sigmoid", "sqrtsoftplus"), (False, True), biases, ("", "top2", "max") if grouped else ("",),
            softcaps, multipliers,
        )
        if not by_logits or bias or groups  # else it makes no difference
    ]  # fmt: skip
    plain = vars(Form(renormalise=False))
    return iter(sorted(found, key=lambda form: sum(value != plain[name] for name, value in vars(form).items())))


def _rule(form: Form, config: Any, top_k: int, o: Observed) -> TopK:
    rule = form.rule(config, top_k).of_router(o.tensors)
    assert isinstance(rule, TopK)
    return rule


def _chooses(form: Form, config: Any, top_k: int, observed: Iterable[Observed], nearest: _Nearest) -> bool:
    """Whether a form sends every token where it went; ties may be broken otherwise."""
    for o in observed:
        if form.bias and form.bias not in o.vectors:
            return False
        rule = _rule(form, config, top_k, o)
        if rule.groups > 1 and o.logits.shape[1] % rule.groups:
            return False
        expected, _ = rule.choose(o.logits)
        ranking = rule.ranking(o.logits)
        a, b = (ranking.gather(1, ids).sort(dim=1).values for ids in (expected, o.ids))
        same = (expected.sort(1).values == o.ids.sort(1).values) | torch.isclose(a, b, rtol=1e-6, atol=1e-6)
        elsewhere = int((~same.all(1)).sum())
        if elsewhere:
            _note(nearest, form, top_k, o, elsewhere, 0.0)
            return False
    return True


def _weighings(
    form: Form, config: Any, top_k: int, observed: Sequence[Observed], nearest: _Nearest
) -> Iterator[Form | Softmax]:
    """Forms that choose as this one, and weigh as was seen."""
    floors = [key for key, value in config.to_dict().items() if isinstance(value, float) and "min" in key]
    options = [
        (False, 0.0, 0.0),
        (True, 0.0, 0.0),
        *((True, e, 0.0) for e in _EPSILONS),
        *((True, 0.0, f) for f in floors),
    ]
    vectors = ["", *dict.fromkeys(name for o in observed for name in o.vectors)]
    for expert_scale, (renormalise, epsilon, floor) in product(vectors, options):
        way = replace(form, renormalise=renormalise, epsilon=epsilon, floor=floor, expert_scale=expert_scale)
        if expert_scale == form.bias and expert_scale:
            continue
        factors: list[Tensor] = []
        for o in observed:
            if expert_scale and expert_scale not in o.vectors:
                break
            expected = _given(way, config, top_k, o)
            factor = (o.weights.double() * expected).sum() / expected.square().sum()
            difference = (expected * factor - o.weights.double()).abs()
            if not bool((difference <= _CONSTANT * o.weights.abs() + 1e-8).all()):
                _note(nearest, way, top_k, o, 0, float(difference.max()))
                break
            factors.append(factor)
        else:
            scale = _scale(torch.stack(factors), config)
            if scale is not None:
                yield _plainest(replace(way, scale=scale))


def _given(form: Form, config: Any, top_k: int, o: Observed) -> Tensor:
    """The weights ``(T, K)`` float64 that a form gives to the experts that were called."""
    rule = _rule(form, config, top_k, o)
    score = rule._score(o.logits).gather(1, o.ids).double()
    if rule.renormalise:
        total = score.sum(dim=1, keepdim=True) + rule.epsilon
        score = score / (total.clamp(min=rule.floor) if rule.floor else total)
    return score * rule._scale(torch.arange(o.logits.shape[1]))[o.ids]


def _scale(factors: Tensor, config: Any) -> float | str | None:
    """One factor for all: 1, a key of the config that has it, or the number; None where layers differ in it."""
    factor = float(factors.mean())
    if factor <= 0 or not bool(torch.isclose(factors, factors.mean(), rtol=_CONSTANT, atol=0).all()):
        return None
    if abs(factor - 1) < 2 * _CONSTANT:
        return 1.0
    for key, value in config.to_dict().items():
        if any(part in key for part in _FACTORS) and isinstance(value, (int, float)):
            if abs(value - factor) <= 2 * _CONSTANT * factor:
                return key
    return float(f"{factor:.6g}")


def _plainest(form: Form) -> Form | Softmax:
    """The oldest of the rules, where a form is that."""
    return Softmax(form.renormalise) if form == Form(renormalise=form.renormalise) else form


def _is_right(form: AnyForm, config: Any, top_k: int, observed: Iterable[Observed]) -> bool:
    try:
        rule: RoutingRule = form.rule(config, top_k)
        return not any(rule.of_router(o.tensors).disagreement(o.logits, o.ids, o.weights) for o in observed)
    except (AttributeError, RequestError, RuntimeError, TypeError, ValueError):  # it reads what is not there
        return False


def _note(nearest: _Nearest, form: Form, top_k: int, o: Observed, elsewhere: int, difference: float) -> None:
    found = _Nearest(words_of(form, top_k), o.layer, elsewhere, len(o.logits), difference)
    if found.rank < nearest.rank:
        vars(nearest).update(vars(found))
