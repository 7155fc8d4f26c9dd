# SPDX-License-Identifier: Apache-2.0
"""What gathering gradients takes (``Need.FISHER``): memory, disk and time beside those of a calibration, roughly."""

from __future__ import annotations

from ..calibration.gradients import LOGIT_BYTES
from ..compat import ModelConfig
from ..statistics.needs import LABEL_DRAWS

FORWARD_PASSES = 2 + 2 * LABEL_DRAWS
"""What a layer's pass forward, its second one and the gradients that go back come to, in passes forward."""

_OF_ATTENTION = 16  # copies of a batch's hidden states that are held to differentiate a layer, beside its experts'
_OF_LOGITS = 4  # copies of a piece of logits


def states_of_tokens(layers: int) -> int:
    """How often a token's hidden states wait on disk where a layer at a time is held: before each, and gradients."""
    return layers + 1 + 2 * LABEL_DRAWS


def memory_of(tokens: int, longest: int, config: ModelConfig, top_k: int, expert: int, itemsize: int) -> int:
    """Bytes to differentiate one layer, or the logits, of a batch.

    Args:
        tokens: Of the batch.
        longest: Of its longest sample.
        config: The model's, of its text.
        top_k: Experts of a token.
        expert: Parameters of an expert.
        itemsize: Bytes of a number.
    """
    hidden_size = config.hidden_size
    inside = top_k * (expert // hidden_size + 2 * hidden_size)  # of a token: what its experts calculate
    layer = tokens * itemsize * (_OF_ATTENTION * hidden_size + inside)
    of_token = 4 * config.vocab_size
    logits = min(tokens * of_token, max(LOGIT_BYTES, longest * of_token))
    return max(layer, _OF_LOGITS * logits)
