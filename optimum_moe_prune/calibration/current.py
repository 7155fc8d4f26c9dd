# SPDX-License-Identifier: Apache-2.0
"""The batch being computed: which rows of hidden states are tokens, of which samples, and which of them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.batches import Batch
from ..models.transfers import sent
from ..statistics.samples import MaxTokens, most_tokens
from .samples import CalibrationSet


@dataclass(frozen=True)
class Places:
    """Where the tokens of a batch are, on one device.

    Attributes:
        tokens: Rows of tokens among all rows, padding left out.
        sample: Which of the batch's samples each token is of ``(T,)``.
        kept: The kept tokens, among the tokens.
        others: The tokens that are not kept.
    """

    tokens: Tensor
    sample: Tensor
    kept: Tensor
    others: Tensor


class Current:
    """The batch being computed.

    What is known of it is known to the host, so that nothing has to wait for a device; each device is told once.

    Args:
        calibration: All samples.
        max_tokens: The most tokens for which statistics per token are kept, or ``"all"``.
        seed: Decides which.

    Attributes:
        token_sample: The sample of each kept token ``(N,)``, of all batches.
        token_position: Its position in the sample ``(N,)``.
        samples: The numbers of the batch's samples ``(B,)``.
        lengths: Their tokens.
        rows: Its tokens among all rows of hidden states, padding left out.
        padded: Whether the batch has rows that are no tokens.
        num_tokens: Tokens of the batch.
        kept_row: Among all kept tokens, those of the batch.
        all_kept: Whether these are all of its tokens.
    """

    samples: Tensor
    lengths: Sequence[int]
    rows: Tensor
    padded: bool
    num_tokens: int
    kept_row: Tensor

    def __init__(self, calibration: CalibrationSet, max_tokens: MaxTokens, seed: int) -> None:
        self.lengths_of_samples = torch.tensor([sample.num_tokens for sample in calibration.samples])
        self.token_sample, self.token_position = calibration.kept_tokens(most_tokens(max_tokens), seed)
        self._num_kept = torch.bincount(self.token_sample, minlength=len(calibration))
        self._first_kept = self._num_kept.cumsum(0) - self._num_kept
        self._places: dict[torch.device, Places] = {}

    @property
    def num_samples(self) -> int:
        """Samples, in all batches."""
        return len(self.lengths_of_samples)

    @property
    def all_kept(self) -> bool:
        return len(self.kept_row) == self.num_tokens

    def set(self, batch: Batch) -> None:
        """Go on to a batch."""
        lengths = batch.attention_mask.sum(1)
        self.rows = tokens = batch.attention_mask.flatten().nonzero().flatten()
        self.samples, self.lengths = batch.samples, lengths.tolist()
        self.padded, self.num_tokens = len(tokens) < batch.attention_mask.numel(), len(tokens)
        kept, rows = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        first_token = 0
        for number, length in zip(batch.samples.tolist(), self.lengths, strict=True):
            first, count = int(self._first_kept[number]), int(self._num_kept[number])
            kept.append(first_token + self.token_position[first : first + count])
            rows.append(torch.arange(first, first + count))
            first_token += length
        is_kept = torch.zeros(len(tokens), dtype=torch.bool)
        is_kept[torch.cat(kept)] = True
        self.kept_row = torch.cat(rows)
        sample = torch.arange(len(lengths)).repeat_interleave(lengths)
        host = Places(tokens, sample, torch.cat(kept), (~is_kept).nonzero().flatten())
        self._places = {torch.device("cpu"): host}

    def on(self, device: torch.device) -> Places:
        """Where the tokens are, as a device knows it."""
        if device not in self._places:
            host = self._places[torch.device("cpu")]
            parts = (host.tokens, host.sample, host.kept, host.others)
            self._places[device] = Places(*(sent(part, device) for part in parts))
        return self._places[device]

    def real(self, tensor: Tensor) -> Tensor:
        """The rows of tokens."""
        return tensor[self.on(tensor.device).tokens] if self.padded else tensor
