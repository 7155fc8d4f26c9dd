# SPDX-License-Identifier: Apache-2.0
"""What a calibration can gather, and the tensors that it leaves: names, shapes, dtypes.

Shapes: S samples, N kept tokens, E experts, P experts of the MoE layer before, H hidden size, J draws of labels.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ..architectures.routers import RoutingRule

if TYPE_CHECKING:
    import torch

    from ..storage.tensor_files import Shapes


class Need(str, enum.Enum):
    """A group of statistics that a method can ask the calibration for."""

    ROUTING = "routing"
    ROUTED_NORMS = "routed_norms"
    DENSE_NORMS = "dense_norms"
    SINGLE_ERROR = "single_error"
    GRAM = "gram"
    INPUTS = "inputs"
    COACTIVATION = "coactivation"
    WEIGHTS = "weights"
    FISHER = "fisher"
    MEAN_OUTPUTS = "mean_outputs"

    def __str__(self) -> str:
        return self.value


PER_SAMPLE: dict[Need, tuple[str, ...]] = {
    # tokens with the expert among the chosen; sum of p over them; sums of p and of p log2 p over all tokens
    Need.ROUTING: ("routed_tokens", "routed_probability", "probability", "probability_log2"),
    # over the tokens routed to the expert: sums of ||f||, ||f||^2, g ||f|| with three readings of g, and the largest
    # absolute element of f
    Need.ROUTED_NORMS: (
        "norm",
        "squared_norm",
        "norm_applied",
        "norm_probability",
        "norm_renormalised",
        "max_element",
    ),
    # sum over all tokens of ||f||, estimated from the kept ones (SUMS_OF_KEPT)
    Need.DENSE_NORMS: ("dense_norm",),
    # likewise of ||F_{e} - F_all||^2 and, in every column, of ||F_all||^2
    Need.SINGLE_ERROR: ("single_error", "output_energy"),
    # (S, P, E) float32 in place of (S, E), P the experts of the MoE layer before (0 in the first): the sum over the
    # tokens routed to an expert there of p here
    Need.COACTIVATION: ("coactivation",),
    # (S, E, H) float32: the sum of f over the tokens routed to the expert
    Need.MEAN_OUTPUTS: ("output_sum",),
}
"""Tensors ``(S, E)`` in float64 where nothing else is said, by need."""


IN_FORMAT_1 = {"max_element": "max_norm"}
"""What folders of format 1 lack, and what they hold in its place: the largest norm, which nothing reads."""

PER_TOKEN: dict[Need, tuple[str, ...]] = {
    Need.ROUTING: ("logits",),  # (N, E), dtype of the router's logits
    Need.DENSE_NORMS: ("token_dense_norm",),  # (N, E) float32, ||f||
    # (N, E) and (N, 1) float32, ||F_{e} - F_all||^2 and ||F_all||^2
    Need.SINGLE_ERROR: ("token_single_error", "token_output_energy"),
    Need.GRAM: ("gram",),  # (N, E (E + 1) / 2) float32, upper triangles
    Need.INPUTS: ("inputs",),  # (N, H), dtype of the block's input
    # (N, J, E) and (N, J) float32: products of each expert's output and the gradient, at the experts' output, of the
    # log-probabilities of labels in J draws; and the gradient's squared norm
    Need.FISHER: ("fisher", "gradient_energy"),
}
"""Tensors of the kept tokens, by need."""

PER_EXPERT: dict[Need, tuple[str, ...]] = {
    # means over the weights of all of an expert's matrices, biases left out: of |w|, and of w^2
    Need.WEIGHTS: ("weight_magnitude", "weight_square"),
}
"""Tensors ``(E,)`` in float64 of the experts themselves, which no token has a part in, by need."""

WITHOUT_TEXT = frozenset(PER_EXPERT)
"""The needs for which nothing is calibrated: a model's weights are enough."""


SUMS_OF_KEPT = {
    "dense_norm": "token_dense_norm",
    "single_error": "token_single_error",
    "output_energy": "token_output_energy",
}
"""Tensors of samples that are sums over their kept tokens, for all of their tokens (``samples.sums_of_kept``), and the
tensor of the tokens. In statistics of formats 1 and 2 they are sums over all tokens."""

SINCE_FORMAT_3 = frozenset({"token_dense_norm", "token_output_energy"})
"""What folders of formats 1 and 2 lack."""

LABEL_DRAWS = 2
"""J: how many times labels are drawn for ``Need.FISHER``."""

OF_A_FORWARD_PASS = frozenset(Need) - {Need.FISHER, Need.MEAN_OUTPUTS}
"""What ``"all"`` stands for. Gradients take another pass forward and one back, and mean outputs are a vector for each
sample and expert, which no method reads: both are gathered where they are asked for."""

DENSE = frozenset({Need.DENSE_NORMS, Need.SINGLE_ERROR, Need.GRAM})
"""The needs for which every expert runs on every kept token."""

ROUTED = frozenset({Need.ROUTED_NORMS, Need.MEAN_OUTPUTS})
"""The needs for which each chosen expert's own output is looked at."""

WITHOUT_RULE = WITHOUT_TEXT | {
    Need.ROUTING,
    Need.ROUTED_NORMS,
    Need.DENSE_NORMS,
    Need.INPUTS,
    Need.MEAN_OUTPUTS,
}
"""The needs for which nothing has to be known of how routers choose: but for :data:`OF_RULE`."""

OF_RULE = frozenset({"routed_probability", "probability", "probability_log2", "norm_probability", "norm_renormalised"})
"""The tensors of these that a routing rule gives, and that are empty without one."""


def tensor_names(needs: Iterable[Need], *tables: dict[Need, tuple[str, ...]]) -> tuple[str, ...]:
    """Names of the tensors that ``needs`` stand for, of some of the three tables above, or (by default) of all."""
    wanted, every = set(needs), (PER_SAMPLE, PER_TOKEN, PER_EXPERT)
    return tuple(name for table in tables or every for need in table if need in wanted for name in table[need])


def names_of_format(version: int, needs: Iterable[Need]) -> tuple[str, ...]:
    """The names that ``needs`` stand for in folders of a format."""
    then = IN_FORMAT_1 if version == 1 else {}
    return tuple(then.get(name, name) for name in tensor_names(needs) if version >= 3 or name not in SINCE_FORMAT_3)


def names_in(there: Collection[str], needs: Iterable[Need]) -> tuple[str, ...]:
    """Those of some names that ``needs`` stand for, in whatever format."""
    pairs = ((name, IN_FORMAT_1.get(name, "")) for name in tensor_names(needs))
    return tuple(name for pair in pairs for name in pair if name in there)


def layer_shapes(
    needs: Iterable[Need],
    num_samples: int,
    num_tokens: int,
    num_experts: int,
    experts_before: int,
    hidden_size: int,
    logits_dtype: torch.dtype,
    inputs_dtype: torch.dtype,
    rule: RoutingRule | None = None,
) -> Shapes:
    """Shape and dtype of each tensor of a layer's statistics.

    Args:
        needs: What is gathered.
        num_samples: S.
        num_tokens: N, the kept tokens.
        num_experts: E.
        experts_before: P, experts of the MoE layer before, 0 in the first.
        hidden_size: H.
        logits_dtype: Of the router's logits.
        inputs_dtype: Of the block's input.
        rule: The routers'; says what stands beside the experts (``fixed``).
    """
    import torch

    fixed = 0 if rule is None else rule.fixed
    outputs = num_experts + (fixed if rule is not None and rule.fixed_are_chosen else 0)
    others = {
        "coactivation": ((num_samples, experts_before, num_experts), torch.float32),
        "output_sum": ((num_samples, num_experts, hidden_size), torch.float32),
        "logits": ((num_tokens, num_experts + fixed), logits_dtype),
        "token_dense_norm": ((num_tokens, num_experts), torch.float32),
        "token_single_error": ((num_tokens, num_experts), torch.float32),
        "token_output_energy": ((num_tokens, 1), torch.float32),
        "gram": ((num_tokens, outputs * (outputs + 1) // 2), torch.float32),
        "inputs": ((num_tokens, hidden_size), inputs_dtype),
        **dict.fromkeys(tensor_names(WITHOUT_TEXT), ((num_experts,), torch.float64)),
        "fisher": ((num_tokens, LABEL_DRAWS, outputs), torch.float32),
        "gradient_energy": ((num_tokens, LABEL_DRAWS), torch.float32),
    }
    return {name: others.get(name, ((num_samples, num_experts), torch.float64)) for name in tensor_names(needs)}
