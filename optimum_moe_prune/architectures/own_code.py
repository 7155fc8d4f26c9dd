# SPDX-License-Identifier: Apache-2.0
"""Routers whose choice no known rule gives: what they did is observed, what they would do is not known.

Scores of what was observed (how often an expert is chosen, how large its output is, by which weight it counts) are as
exact as of any model. Whatever asks what a router would do with fewer experts, or what it thinks of those that it did
not choose, is refused, by the line that says what was not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .routers import Normalisation, RoutingRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OwnCode(RoutingRule, kind="own"):
    """The router's own code, of which no formula is known.

    Attributes:
        top_k: Experts used per token.
        reason: What was not found.
        groups: As the config has them; whether the router looks at them is not known, so they are kept equal.
        top_groups: How many a token may be sent to.
    """

    top_k: int
    reason: str = field(default="", repr=False)
    groups: int = 1
    top_groups: int = 1

    formula = False

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k!r}")

    @property
    def fewest(self) -> int:
        return self.top_k if self.groups == 1 else self.groups * max(2, -(-self.top_k // self.top_groups))

    @property
    def normalised_over(self) -> Normalisation:
        return "none"

    @property
    def ranked(self) -> bool:
        return False

    def refusal(self, what: str) -> RequestError:
        """The error where a formula is asked for."""
        return RequestError(
            f"{what} needs the rule of the routers, and {self.reason}. Use a method that scores what was observed "
            "(frequency, reap, ean, man, msan), or register the rule (register_architecture)."
        )

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        raise self.refusal("routing of other sets of experts")

    def ranking(self, logits: Tensor) -> Tensor:
        raise self.refusal("a ranking of experts by their logits")

    def numerators(self, logits: Tensor) -> Tensor:
        raise self.refusal("a probability of experts")

    def disagreement(self, logits: Tensor, chosen: Tensor, weights: Tensor) -> str:
        if chosen.shape[1] != self.top_k:
            return f"a token is sent to {chosen.shape[1]} experts, and by the rule to {self.top_k}"
        return ""


@dataclass(frozen=True)
class Own:
    """In place of a form, where none was found."""

    reason: str = ""

    def rule(self, config: Any, top_k: int) -> RoutingRule:
        """As :meth:`rules.Form.rule`."""
        groups, top_groups = (getattr(config, key, None) or 1 for key in ("n_group", "topk_group"))
        return OwnCode(top_k, self.reason, int(groups), int(top_groups))
