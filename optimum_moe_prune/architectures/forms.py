# SPDX-License-Identifier: Apache-2.0
"""How a row names the rule of its routers: a form, whose texts are keys of the model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import RequestError
from .routers import RoutingRule, SoftmaxTopK
from .rules import SCORES, Hashed, SparseMixer, TopK


@dataclass(frozen=True)
class Form:
    """A rule as a row states it: texts are keys of the text model's config, other values are as they are.

    Attributes:
        score, by_logits, renormalise, epsilon, floor, scale, softcap, multiplier, exact, on_input: As in
            :class:`TopK`.
        groups: Whether ``n_group`` and ``topk_group`` limit the choice.
        group_score, others_are_zero: As in :class:`TopK`.
        bias: Name of the router's tensor with a bias for choosing.
        expert_scale: Name of the one with a scale for each expert.
        table: Name of the router's tensor that says by a token's id where it goes, in the layers that have one.
        limited: A key and the value with which the groups count; without it they always do.
        fixed: Key of the number of columns after the experts' that stay.
        shared: Whether these are of shared experts.
    """

    score: str = "softmax"
    by_logits: bool = False
    renormalise: bool | str = True
    epsilon: float | str = 0.0
    floor: float | str = 0.0
    scale: float | str = 1.0
    softcap: float | str = 0.0
    multiplier: float | str = 1.0
    exact: bool = True
    on_input: bool = False
    groups: bool = False
    group_score: Literal["top2", "max"] = "top2"
    others_are_zero: bool = False
    bias: str = ""
    bias_if: str = ""
    expert_scale: str = ""
    table: str = ""
    limited: tuple[str, str] | None = None
    fixed: str = ""
    shared: bool = False

    def rule(self, config: Any, top_k: int) -> RoutingRule:
        """The rule of a model.

        Args:
            config: The config of its text part.
            top_k: Experts used per token.
        """

        def said(value: Any) -> Any:
            return getattr(config, value) if isinstance(value, str) else value

        score = self.score if self.score in SCORES else str(getattr(config, self.score))
        if score not in SCORES:
            raise RequestError(f"routers with {self.score}={score!r} are not known here; known: {', '.join(SCORES)}.")
        grouped = self.groups and (self.limited is None or getattr(config, self.limited[0]) == self.limited[1])
        return TopK(
            top_k=top_k,
            score=score,  # type: ignore[arg-type]  # checked above
            by_logits=self.by_logits,
            renormalise=bool(said(self.renormalise)),
            epsilon=float(said(self.epsilon)),
            floor=float(said(self.floor)),
            scale=float(said(self.scale)),
            groups=int(getattr(config, "n_group", None) or 1) if grouped else 1,
            top_groups=int(getattr(config, "topk_group", None) or 1) if grouped else 1,
            group_score=self.group_score,
            others_are_zero=self.others_are_zero,
            softcap=float(said(self.softcap) or 0.0),
            multiplier=float(said(self.multiplier)),
            exact=self.exact,
            on_input=self.on_input,
            fixed=int(getattr(config, self.fixed) or 0) if self.fixed else 0,
            shared=self.shared,
            bias_from=self.bias if not self.bias_if or getattr(config, self.bias_if) else "",
            scale_from=self.expert_scale,
        )

    def by_table(self, rule: RoutingRule) -> RoutingRule:
        """The rule of a layer that goes by a table of token ids, of the rule of the others."""
        assert isinstance(rule, TopK)
        return Hashed(**{**vars(rule), "bias": (), "bias_from": ""})


@dataclass(frozen=True)
class Softmax:
    """Softmax, the K best, renormalised (always, never, or by a key of the config); weights in the logits' dtype.

    Choosing by logits and taking the softmax of the chosen is the same.
    """

    renormalise: bool | str = True
    cast_weights: bool = True

    def rule(self, config: Any, top_k: int) -> RoutingRule:
        """As :meth:`Form.rule`."""
        renormalise = getattr(config, self.renormalise) if isinstance(self.renormalise, str) else self.renormalise
        return SoftmaxTopK(top_k, bool(renormalise), self.cast_weights)


@dataclass(frozen=True)
class Mixer:
    """:class:`SparseMixer` as a row states it.

    Attributes:
        jitter: The config's key.
    """

    jitter: str

    def rule(self, config: Any, top_k: int) -> RoutingRule:
        """As :meth:`Form.rule`."""
        return SparseMixer(top_k, float(getattr(config, self.jitter)))
