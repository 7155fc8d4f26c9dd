# SPDX-License-Identifier: Apache-2.0
"""What goes into a model: token ids, padded on the right."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of similar length, padded on the right.

    Attributes:
        input_ids: ``(B, L)`` int64.
        attention_mask: ``(B, L)`` int64, 0 on padding.
        samples: The number of each sample in its set ``(B,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    samples: Tensor
