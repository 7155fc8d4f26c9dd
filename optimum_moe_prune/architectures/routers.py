# SPDX-License-Identifier: Apache-2.0
"""Routing rules: how a router turns its logits into chosen experts and their weights.

A rule is a value that a row of the table names. The observer, the replay, the searches and the errors of single
experts ask it; nothing else knows how a router decides. Another kind of router is another class:

    @dataclass(frozen=True)
    class SigmoidTopK(RoutingRule, kind="sigmoid"):
        top_k: int
        bias: tuple[float, ...] = field(default=(), repr=False)
        ...

Statistics hold a rule by its kind and its fields, which are plain values (numbers, strings, tuples of them).

Shapes: E experts, T tokens, K top_k.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import RequestError
from ..storage.values import Json, Values

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Normalisation = Literal["chosen", "retained", "none"]

_KINDS: dict[str, type[RoutingRule]] = {}


class RoutingRule(ABC):
    """How a router chooses experts and weighs them: ``scale * numerator / (sum of numerators + epsilon)``.

    Attributes:
        kind: The name of the class in statistics.
        reads_router: Whether a layer's rule depends on tensors of its router (see :meth:`of_router`).
        formula: Whether it says what a router chooses; else only what was observed is known (``own_code``).
        top_k: Experts used per token.
        scale: What weights are multiplied by: one number, or one for each expert.
        epsilon: Added to the sum of numerators.
        groups: Groups of equal size in which the router sees its experts, in their order. A model that is pruned cuts
            the experts that are left into as many equal groups, so each has to keep the same number.
        fixed: Columns of the logits after those of the experts, which stay whatever is pruned. Where they are chosen
            like experts (``fixed_are_chosen``) their outputs are observed as well.
        replays: Whether the layer's output with fewer experts follows from its logits and its experts' outputs.
    """

    kind: ClassVar[str]
    reads_router: ClassVar[bool] = False
    formula: ClassVar[bool] = True
    top_k: int
    scale: float | tuple[float, ...] = 1.0
    epsilon: float = 0.0
    groups: int = 1
    fixed: int = 0
    fixed_are_chosen: bool = False
    replays: bool = True

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind:
            cls.kind = kind
            _KINDS[kind] = cls

    # -- what a rule says

    @property
    @abstractmethod
    def normalised_over(self) -> Normalisation:
        """The experts whose numerators are summed in a weight's denominator; with ``"none"`` the denominator is 1."""

    @abstractmethod
    def choose(self, logits: Tensor, retained: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """The experts the router chooses and the weights it gives them, by the model's own operations.

        Args:
            logits: Router logits ``(T, E)`` in the dtype the model computes them in.
            retained: Sorted ids of the experts that are left; all of them by default. A group is what is left of it,
                equal to others or not: searches drop one expert after the other.

        Returns:
            Ids of the chosen experts ``(T, min(K, len(retained)))``, in the numbering of ``logits``, and their
            weights in float32, rounded to a lower precision and back where the model rounds.
        """

    @abstractmethod
    def ranking(self, logits: Tensor) -> Tensor:
        """What experts are ranked by ``(T, E)``, highest first, in the precision the model compares in."""

    @abstractmethod
    def numerators(self, logits: Tensor) -> Tensor:
        """Positive numbers ``(T, E)`` float64, with squares above 0, to which the weights of the chosen belong.

        Where :attr:`normalised_over` is not ``"none"``, each token may have a common factor of its own, unless there
        is an ``epsilon``.
        """

    # -- what a rule may say

    def of_router(self, tensors: Mapping[str, Tensor]) -> RoutingRule:
        """The rule of one layer, with what its router's tensors add, such as a correction bias.

        Args:
            tensors: The tensors that the row names (``router_tensors``), by path below the block.
        """
        return self

    @property
    def ranked(self) -> bool:
        """Whether the chosen are simply the K best by :meth:`ranking` of those that are left.

        Where groups of experts limit the choice it is not so, and searches go by :meth:`choose` alone.
        """
        return True

    def admits(self, retained: Sequence[int], size: int, num_experts: int) -> bool:
        """Whether some of these experts make a set of ``size`` that a layer can consist of.

        Searches ask it where a rule is not ``ranked`` or has groups, and every plan is checked by it.

        Args:
            retained: Sorted ids.
            size: How many are to be left.
            num_experts: Of the whole layer.
        """
        if self.groups == 1:
            return len(retained) >= size
        fewest = min(map(len, self.grouped(retained, num_experts)))
        return self.allows(size) and self.groups * fewest >= size

    @property
    def fewest(self) -> int:
        """The fewest experts a layer can keep."""
        return self.groups * -(-self.top_k // self.groups)

    def allows(self, num_experts: int) -> bool:
        """Whether a layer can keep that many experts."""
        return num_experts >= self.fewest and num_experts % self.groups == 0

    def moved_by(self, logits: Tensor, retained: Sequence[int]) -> Tensor | None:
        """The tokens ``(T, len(retained))`` whose routing among some experts may change when one of them goes.

        None where nothing is known: then each token's may.
        """
        return None

    def grouped(self, experts: Iterable[int], num_experts: int) -> list[list[int]]:
        """Experts of a layer by group, in the order they are given.

        Args:
            experts: Ids.
            num_experts: Of the whole layer.
        """
        groups: list[list[int]] = [[] for _ in range(self.groups)]
        for expert in experts:
            groups[expert * self.groups // num_experts].append(expert)
        return groups

    def least_with(self, experts: Sequence[int], num_experts: int) -> int:
        """The fewest experts that hold these and are the same number in each group.

        Args:
            experts: Ids.
            num_experts: Of the whole layer.
        """
        return self.groups * max(map(len, self.grouped(experts, num_experts)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities ``(T, E)`` float64 over all experts: numerators divided by their sum."""
        numerators = self.numerators(logits)
        return numerators / numerators.sum(dim=1, keepdim=True)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Their natural logarithms ``(T, E)`` float64."""
        return self.probabilities(logits).log()

    # -- what follows

    def weights(self, logits: Tensor, retained: Sequence[int] | None = None) -> Tensor:
        """Routing weights ``(T, E)`` in float64 of the layer pruned to ``retained``, zero for every other expert."""
        import torch

        chosen, weights = self.choose(logits, retained)
        return torch.zeros(logits.shape, dtype=torch.float64, device=logits.device).scatter_(
            1, chosen, weights.double()
        )

    def lone_weights(self, logits: Tensor) -> Tensor:
        """The weight ``(T, E)`` float32 that each expert would have if it were the only one left."""
        numerators = self.numerators(logits)
        scale = _constant(self.scale, logits.device) if isinstance(self.scale, tuple) else self.scale
        weights = numerators * scale
        return (weights if self.normalised_over == "none" else weights / (numerators + self.epsilon)).float()

    def disagreement(self, logits: Tensor, chosen: Tensor, weights: Tensor) -> str:
        """What in a model's routing is not by this rule, in words; empty where everything is.

        Tokens at whose choice experts tie are let pass; so are weights within 1e-5 in float32, 1e-2 in lower
        precision.

        Args:
            logits: Router logits ``(T, E)``.
            chosen: Ids of the experts that the model called ``(T, K)``, in any order.
            weights: Their weights ``(T, K)``.
        """
        import torch

        expected, expected_weights = self.choose(logits)
        if expected.shape != chosen.shape:
            return f"a token is sent to {chosen.shape[1]} experts, and by the rule to {expected.shape[1]}"
        ranking = self.ranking(logits).double()
        ours, theirs = (ranking.gather(1, ids).sort(dim=1).values for ids in (expected, chosen))
        tied = torch.isclose(ours, theirs, rtol=1e-6, atol=1e-6).all(1)
        (expected, order), (chosen, own_order) = expected.sort(dim=1), chosen.sort(dim=1)
        same = (expected == chosen).all(1)
        if not bool((same | tied).all()):
            return f"{int((~(same | tied)).sum())} of {len(logits)} tokens are sent to other experts than by the rule"
        tolerance = 1e-5 if logits.dtype == weights.dtype == torch.float32 else 1e-2
        weights = weights.double().gather(1, own_order)[same]
        difference = (weights - expected_weights.double().gather(1, order)[same]).abs()
        if not bool((difference <= tolerance * (1 + weights.abs())).all()):
            return f"experts are given weights up to {difference.max():.3g} away from those by the rule"
        return ""

    def to_dict(self) -> Json:
        """As plain JSON values, for :func:`rule_from_dict`."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]  # every rule is a dataclass


@dataclass(frozen=True)
class SoftmaxTopK(RoutingRule, kind="softmax"):
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

    def ranking(self, logits: Tensor) -> Tensor:
        return logits

    def numerators(self, logits: Tensor) -> Tensor:
        return likelihoods(logits.double())

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().log_softmax(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(dim=-1)

    def to_dict(self) -> Json:
        """Without its kind: so statistics have been written from the beginning."""
        return asdict(self)


@functools.lru_cache(maxsize=512)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, which is told once: it would be waited for each time."""
    import torch

    return torch.tensor(values, dtype=torch.float64, device=device)


def likelihoods(logits: Tensor) -> Tensor:
    """What softmax divides by its sum ``(T, E)``, over that of each token's most likely expert.

    A bound keeps their squares from vanishing; it matters only to experts e^300 times less likely than others.
    """
    return (logits - logits.amax(dim=1, keepdim=True)).clamp_(min=-300).exp_()


def rule_from_dict(values: Values) -> RoutingRule:
    """A rule from plain values, as statistics hold it.

    Raises:
        RequestError: If no rule of that kind is known.
        TypeError, ValueError: If they are no rule.
    """
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    kind = settings.pop("kind", SoftmaxTopK.kind)
    if kind not in _KINDS:
        raise RequestError(
            f"routers by the rule {kind!r} are not known here. Known: {', '.join(sorted(_KINDS))}. Import the module "
            "that defines it first."
        )
    return _KINDS[kind](**settings)
