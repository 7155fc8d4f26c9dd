# SPDX-License-Identifier: Apache-2.0
"""The course of a distillation: which text each step sees, how fast it learns, and which of its results is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.samples import CalibrationSet
from ..errors import RequestError, RunError
from ..models.batches import Batch
from ..planning.sensitivity import ALL
from .trained import EXPERTS, NORMS, ROUTER

KL = dict[str, float]
"""Nats per predicted token by domain, ``"all"`` first: every token of the samples weighs the same there."""

FEWEST_HELD_BACK = 32
"""Samples by which it can be judged well; of fewer there is a note."""
WORSE = 0.05
"""A result in which a domain's divergence grew by more than this share is not kept."""
NOTHING = 1e-4
"""Nats that are no difference."""

_RATES = {EXPERTS: 1e-2, ROUTER: 6e-3, NORMS: 6e-3}
_EPOCHS = 6.0
_TOKENS, _LEAST, _MOST = 512, 60, 180  # of a step in memory; steps
_CHECK_EVERY = 15
_LOOKS_SHARE = 0.25  # of the time, that looks at the held-back text take
_TIMES_FORWARD = 3  # that a step takes for a token
_STREAMED_STEPS = 16
_LARGEST_STEP = 2**16  # tokens of a step that is streamed: their states wait in front of every layer


@dataclass(frozen=True)
class DistilOptions:
    """How a distillation is done. What is None is left to the amount of text and to where the model is.

    Attributes:
        steps: Changes of the weights: by default as many as go through the text six times, of 60 to 180; 16 of a
            model that is streamed.
        tokens: Of each step, at least: whole samples are taken. By default 512; of a model that is streamed as many
            as go through the text six times, of 512 to 65,536.
        rates: By role the largest change of a step, relative to the numbers of a tensor (their root mean square), of
            steps of 512 tokens and matrices that sum over 128 numbers. Of larger steps it is larger by the root of how
            much, of wider matrices smaller likewise.
        warm_up: Steps in which the rate grows, a quarter of all at most; afterwards it falls evenly to a tenth.
        check_every: Steps between two looks at the held-back text: by default 15, or more where there is so much of
            it that looks would take more than a fourth of the time of steps; 1 of a model that is streamed.
        patience: Looks in a row that find nothing better, after which it stops.
        rank: Of the change of each down projection, 0 for any change; by default that where it fits in memory, else
            16.
        batch_size: Samples that go through the model at once.
        seed: Of the order of the text.
    """

    steps: int | None = None
    tokens: int | None = None
    rates: Mapping[str, float] = field(default_factory=lambda: dict(_RATES))
    warm_up: int = 10
    check_every: int | None = None
    patience: int = 3
    rank: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "steps": 1, "tokens": 1, "check_every": 1, "patience": 1, "batch_size": 1, "warm_up": 0, "rank": 0,
        }  # fmt: skip
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise RequestError(f"{name} is {value}; it must be at least {number}.")

    def in_memory(self, fit: CalibrationSet, held_back: CalibrationSet) -> DistilOptions:
        """The same with nothing left open, for a model in memory."""
        tokens = self.tokens or _TOKENS
        steps = self.steps or max(_LEAST, min(_MOST, math.ceil(_EPOCHS * fit.num_tokens / tokens)))
        looks = math.ceil(held_back.num_tokens / (_LOOKS_SHARE * _TIMES_FORWARD * tokens))
        return self._settled(steps, tokens, self.check_every or max(_CHECK_EVERY, looks))

    def streamed(self, fit: CalibrationSet) -> DistilOptions:
        """The same for one that is read twice for each step."""
        steps = self.steps or _STREAMED_STEPS
        each = math.ceil(_EPOCHS * fit.num_tokens / steps)
        return self._settled(steps, self.tokens or max(_TOKENS, min(_LARGEST_STEP, each)), self.check_every or 1)

    def _settled(self, steps: int, tokens: int, check_every: int) -> DistilOptions:
        return replace(self, steps=steps, tokens=tokens, check_every=check_every)

    def rate(self, role: str) -> float:
        """The largest relative change of a step."""
        return self.rates[role] * math.sqrt(max(1.0, (self.tokens or _TOKENS) / _TOKENS))

    def pace(self, step: int, steps: int) -> float:
        """The share of the largest rate that a step has, of 0 to ``steps - 1``."""
        warm_up = min(self.warm_up, steps // 4)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 1 - 0.9 * (step - warm_up) / max(1, steps - warm_up - 1)


def step_batches(fit: CalibrationSet, options: DistilOptions) -> Iterator[list[Batch]]:
    """The batches of one step after another, without end: all samples in a drawn order, and then again in another."""
    assert options.tokens is not None
    generator = torch.Generator().manual_seed(options.seed)
    chosen: list[int] = []
    while True:
        for number in torch.randperm(len(fit), generator=generator).tolist():
            chosen.append(number)
            if sum(fit.samples[n].num_tokens - 1 for n in chosen) >= options.tokens:
                yield batches_of(fit, chosen, options.batch_size)
                chosen = []


def batches_of(samples: CalibrationSet, numbers: list[int], batch_size: int) -> list[Batch]:
    """Some of the samples, each as often as it is named, those of similar length together."""
    order = sorted(numbers, key=lambda n: (-samples.samples[n].num_tokens, n))
    found = []
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        ids = torch.zeros(len(part), samples.samples[part[0]].num_tokens, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(part):
            ids[row, : len(samples.token_ids[number])] = samples.token_ids[number]
            mask[row, : len(samples.token_ids[number])] = 1
        found.append(Batch(ids, mask, torch.tensor(part)))
    return found


def predicted(batch: Batch) -> int:
    """How many tokens of a batch are predicted."""
    return int(batch.attention_mask[:, 1:].sum())


def by_domain(samples: CalibrationSet, sums: Tensor) -> KL:
    """Divergences per token of what was summed over the predicted tokens of each sample ``(S,)``."""
    found: KL = {}
    for name in (ALL, *sorted({sample.domain for sample in samples.samples})):
        rows = [n for n, sample in enumerate(samples.samples) if name in (ALL, sample.domain)]
        found[name] = float(sums[rows].sum()) / sum(samples.samples[n].num_tokens - 1 for n in rows)
    return found


def worse_domains(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """The domains that a change made worse by more than it may."""
    return [
        name
        for name, old in before.items()
        if name != ALL and after[name] > old * (1 + WORSE) and after[name] - old > NOTHING
    ]


@dataclass
class Watch:
    """Looks at the held-back text, and which of them was the best.

    A look at which a domain is worse than before by more than it may be is not the best, however good the others are.

    Attributes:
        patience: Looks in a row that find nothing better, after which it is over.
        looks: Step and divergences of each, the unchanged model first.
        sums: By step what its look found, summed over the predicted tokens of each sample ``(S,)``.
        best: The number of steps of the best.
    """

    patience: int
    looks: list[tuple[int, KL]] = field(default_factory=list)
    sums: dict[int, Tensor] = field(default_factory=dict)
    best: int = 0
    _since: int = 0

    def look(self, step: int, found: KL, sums: Tensor | None = None) -> bool:
        """Take in what was found after a number of steps, by domain and of each sample.

        Returns:
            Whether it is the best until now.

        Raises:
            RunError: If the unchanged model gives no finite numbers.
        """
        if not self.looks and not math.isfinite(found[ALL]):
            raise RunError("the pruned model gives NaN for the held-back text; there is nothing to recover.")
        self.looks.append((step, found))
        if sums is not None:
            self.sums[step] = sums.clone()
        if step == 0:
            return True
        lowest = dict(self.looks)[self.best][ALL]
        if math.isfinite(found[ALL]) and found[ALL] < lowest and not worse_domains(self.before, found):
            self.best, self._since = step, 0
            return True
        self._since += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether nothing better is to be expected."""
        return self._since >= self.patience

    @property
    def before(self) -> KL:
        """The divergences of the unchanged model."""
        return self.looks[0][1]

    @property
    def after(self) -> KL:
        """Those of the best."""
        return dict(self.looks)[self.best]


@dataclass(frozen=True)
class Distilled:
    """What a distillation found.

    Attributes:
        tensors: The changed parameters by their name in the pruned model, in their own dtype, on the processor; none
            where nothing was better than the unchanged model.
        kl_before: Nats per predicted token of the held-back text, by domain and ``"all"``, of the unchanged model.
        kl_after: With ``tensors``.
        divergences: Of both, what was summed over the predicted tokens of each held-back sample ``(2, S)``.
        steps: Steps that were done.
        best: The number of steps after which ``tensors`` were so.
        looks: ``(steps, nats)`` of each look at the held-back text.
        shares: By layer the largest share of the routing weight that one expert has, before and after.
        rank: Of the changes of down projections; 0 for any.
        numbers: How many numbers were trained, by role.
        memory: Bytes that training was expected to take beside the model.
        notes: What a person must know, as sentences.
    """

    tensors: Mapping[str, Tensor]
    kl_before: KL
    kl_after: KL
    divergences: Tensor
    steps: int
    best: int
    looks: tuple[tuple[int, float], ...]
    shares: Mapping[int, tuple[float, float]]
    rank: int
    numbers: Mapping[str, int]
    memory: int
    notes: tuple[str, ...] = field(default=())

    @property
    def is_better(self) -> bool:
        """Whether there is anything to take over."""
        return bool(self.tensors)

    @classmethod
    def of(
        cls,
        watch: Watch,
        tensors: Mapping[str, Tensor],
        steps: int,
        shares: Mapping[int, tuple[float, float]],
        rank: int,
        numbers: Mapping[str, int],
        memory: int,
        notes: Sequence[str],
    ) -> Distilled:
        """What was watched until now."""
        looks = tuple((step, found[ALL]) for step, found in watch.looks)
        return cls(
            tensors,
            watch.before,
            watch.after,
            torch.stack([watch.sums[0], watch.sums[watch.best]]),
            steps,
            watch.best,
            looks,
            shares,
            rank,
            numbers,
            memory,
            tuple(notes),
        )
