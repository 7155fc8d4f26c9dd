# SPDX-License-Identifier: Apache-2.0
"""Routing rules: how a router turns its logits into chosen experts and their weights.

A rule is a value that a row of the table names. The observer, the replay, the searches, the errors of single experts
and the budgets ask it; nothing else knows how a router decides. Another kind of router is another class here.

Shapes: E experts, T tokens, K top_k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

Normalisation = Literal["chosen", "retained", "none"]


class RoutingRule(ABC):
    """How a router chooses experts and weighs them.

    Attributes:
        top_k: Experts used per token.
        ranked: Whether the chosen are simply the best of those retained by :meth:`ranking`. Where groups of experts
            limit the choice it is not so, and searches go by :meth:`choose` alone.
        normalised_over: Of which experts the numerators are summed in the denominator of a weight: of the chosen ones,
            of all that are retained, or of none.
        epsilon: Added to that sum.
        scale: Every weight is multiplied by it.
    """

    top_k: int
    ranked: ClassVar[bool] = True
    epsilon: float = 0.0
    scale: float = 1.0

    @property
    @abstractmethod
    def normalised_over(self) -> Normalisation:
        """See the class."""

    @abstractmethod
    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The experts the router chooses and the weights it gives them, by the model's own operations.

        Args:
            logits: Router logits ``(T, E)`` in the dtype the model computes them in.
            retained: Sorted ids of the experts that are left; all of them by default.

        Returns:
            Ids of the chosen experts ``(T, min(K, len(retained)))``, in the numbering of ``logits``, and their
            weights in float32, rounded to a lower precision and back where the model rounds.
        """

    @abstractmethod
    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Logarithms ``(T, E)`` float64 of the probabilities over all experts: scores divided by their sum."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """Those probabilities ``(T, E)`` float64."""

    @abstractmethod
    def ranking(self, logits: Tensor) -> Tensor:
        """What experts are ranked by ``(T, E)``, highest first."""

    @abstractmethod
    def numerators(self, logits: Tensor) -> Tensor:
        """Positive numbers ``(T, E)`` float64 to which the weights of the chosen are proportional."""

    @abstractmethod
    def lone_weights(self, logits: Tensor) -> Tensor:
        """The weight ``(T, E)`` float32 that each expert would have if it were the only one left."""

    # -- what follows

    @property
    def fewest(self) -> int:
        """The fewest experts a layer can keep."""
        return self.top_k

    def allows(self, num_experts: int) -> bool:
        """Whether a layer can keep that many experts."""
        return num_experts >= self.fewest

    def weights(self, logits: Tensor, retained: Sequence[int] | None = None) -> Tensor:
        """Routing weights ``(T, E)`` in float64 of the layer pruned to ``retained``, zero for every other expert."""
        import torch

        chosen, weights = self.choose(logits, retained)
        return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter_(
            1, chosen, weights.double()
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for :func:`rule_from_dict`."""
        return asdict(self)  # type: ignore[call-overload]  # every rule is a dataclass


@dataclass(frozen=True)
class SoftmaxTopK(RoutingRule):
    """Softmax over all experts, the K most probable ones, renormalised or not.

    Attributes:
        top_k: Experts used per token.
        renormalise: Whether the weights of the chosen experts are divided by their sum.
        cast_weights: Whether the weights are rounded to the dtype of the logits.
    """

    top_k: int
    renormalise: bool
    cast_weights: bool

    def __post_init__(self) -> None:
        for name, kind in (("top_k", int), ("renormalise", bool), ("cast_weights", bool)):
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} is {getattr(self, name)!r}")

    @property
    def normalised_over(self) -> Normalisation:
        return "chosen" if self.renormalise else "retained"

    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        import torch

        ids = torch.arange(logits.shape[1], device=logits.device)
        if retained is not None:
            ids = torch.as_tensor(retained, device=logits.device)
            logits = logits[:, ids]
        probabilities = torch.softmax(logits.float(), dim=-1)
        weights, chosen = probabilities.topk(min(self.top_k, logits.shape[1]), dim=-1)
        if self.renormalise:
            # Equal to dividing by the sum, but independent of experts that are not chosen: those then tie exactly.
            weights = torch.softmax(logits.float().gather(1, chosen), dim=-1)
        if self.cast_weights:
            weights = weights.to(logits.dtype).float()
        return ids[chosen], weights

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().log_softmax(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(dim=-1)

    def ranking(self, logits: Tensor) -> Tensor:
        return logits

    def numerators(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        # The bound keeps their squares from vanishing; it matters only to experts e^300 times less likely than others.
        return (logits - logits.amax(dim=1, keepdim=True)).clamp_(min=-300).exp_()

    def lone_weights(self, logits: Tensor) -> Tensor:
        return logits.new_ones(()).float().expand(logits.shape)


def rule_from_dict(values: Mapping[str, Any]) -> RoutingRule:
    """A rule from plain values, as statistics hold it.

    Raises:
        TypeError, ValueError: If they are no rule.
    """
    return SoftmaxTopK(**values)
