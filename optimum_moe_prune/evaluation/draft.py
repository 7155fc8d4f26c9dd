# SPDX-License-Identifier: Apache-2.0
"""A pruned model as the draft of its original: tokens that the original takes in each of its forward passes.

In assisted (speculative) generation a small model proposes tokens and the large one checks them all in one forward
pass. Under greedy decoding what comes out is what the large model alone would say, but for ties in the precision that
it computes in: to check several tokens at once rounds otherwise than to make one at a time. So whoever keeps both
models loses nothing, and gains where a forward pass of the draft costs little beside one of its original: where the
draft fits an accelerator, say, and the original does not.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192; what is measured
is the ``assistant_model`` of transformers' ``generate``.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.samples import CalibrationSet, sample_length
from ..errors import RunError
from ..models.checks import evaluating
from ..models.devices import finish
from ..progress import progress
from ..storage.values import Json, Values
from .speed import hardware, with_range

PROMPTS = 12
PROMPT_TOKENS = 64
NEW_TOKENS = 64
ROUNDS = 3


@dataclass(frozen=True)
class Drafting:
    """What one model is worth as a draft of another, greedily, one prompt at a time.

    Attributes:
        prompts: How many, in equal shares of the domains: the first tokens of samples.
        new_tokens: Generated after each at most.
        tokens: Generated, of all prompts.
        target_forwards: Forward passes of the original that these took, those over the prompts among them.
        draft_forwards: The same of the draft.
        by_domain: Tokens in a forward pass of the original.
        same: The fraction of prompts after which the very tokens came out that the original gives alone.
        gap: Where others come out, the most by which the original's logits of the two tokens differ: as much as
            rounding in its precision, unless something is wrong.
        rounds: How often both ways were taken, in turn.
        speedup: Seconds of the original alone divided by those with the draft: the median of the rounds.
        speedup_range: Least and most of a round.
        hardware: The processor or accelerator, and threads.
    """

    prompts: int
    new_tokens: int
    tokens: int
    target_forwards: int
    draft_forwards: int
    by_domain: dict[str, float]
    same: float
    gap: float
    rounds: int
    speedup: float
    speedup_range: tuple[float, float]
    hardware: str

    @property
    def tokens_per_forward(self) -> float:
        """Tokens in a forward pass of the original; 1 without a draft."""
        return self.tokens / self.target_forwards

    def sentence(self, reference: str = "the original") -> str:
        """What it comes to, for people."""
        where = "every prompt" if self.same == 1 else f"{self.same:.0%} of {self.prompts} prompts"
        parted = f"; where others come out, its logits of the two tokens are at most {self.gap:.2g} apart"
        return (
            f"As a draft: {reference} takes {self.tokens_per_forward:.2f} tokens in a forward pass "
            f"(1 without), {self.draft_forwards / self.tokens:.1f} passes of the draft for each token, and was "
            f"{with_range(self.speedup, self.speedup_range)} times as fast on {self.hardware}. It gives the tokens "
            f"that it gives alone after {where}{parted if self.same < 1 else ''}."
        )

    def to_dict(self) -> Json:
        """As plain JSON values."""
        return {**asdict(self), "tokens_per_forward": self.tokens_per_forward}

    @classmethod
    def from_dict(cls, values: Values) -> Drafting:
        """From plain values.

        Raises:
            TypeError: If something is missing.
            ValueError: If a range is none.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        low, high = known.get("speedup_range", ())
        found = cls(**{**known, "speedup_range": (float(low), float(high))})
        if not found.target_forwards >= 1 or not found.tokens >= 1:
            raise ValueError("a draft that gave no tokens")
        return found


def measure_draft(
    reference: PreTrainedModel,
    draft: PreTrainedModel,
    samples: CalibrationSet,
    *,
    prompts: int = PROMPTS,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    draft_tokens: int | None = None,
) -> Drafting:
    """Let a model generate alone and with a draft, in turn, the order reversed from round to round.

    Args:
        reference: The model whose output it is.
        draft: The model that proposes.
        samples: Prompts are the first tokens of some of them.
        prompts: How many of them, in equal shares of the domains.
        prompt_tokens: Tokens of a prompt at most.
        new_tokens: Tokens generated after each at most.
        rounds: How often both generate.
        draft_tokens: Tokens that the draft proposes at once; by default what the models' generation configs, or
            transformers, say.

    Raises:
        RunError: If transformers cannot generate with this draft, with its reason.
    """
    given = _prompts(samples, prompts, sample_length(prompt_tokens + new_tokens, reference.config) - new_tokens)
    assistant: Json = {"assistant_model": draft}
    used = {p.device for model in (reference, draft) for p in model.parameters() if p.device.type != "meta"}

    def generated(ids: Tensor, **options: Any) -> Tensor:
        ids = ids.to(reference.device)
        model: Any = reference  # its own type names a mixin's method otherwise
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0,
            **options,
        )  # fmt: skip
        return output[0, ids.shape[1] :].cpu()

    def way(options: Json) -> _Way:
        began, tokens, passes = time.perf_counter(), [], []
        for _, ids in given:
            with _counted(reference) as count:
                tokens.append(generated(ids, **options))
            passes.append(count[0])
        finish(used)
        return _Way(time.perf_counter() - began, tokens, passes)

    ratios = []
    with evaluating(reference), evaluating(draft), _proposing(draft, draft_tokens):
        try:
            generated(given[0][1][:, :8], **assistant)  # warms up; what cannot be done is known now
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"transformers cannot generate with this draft: {first}") from error
        for number in progress(range(rounds), "measuring the draft", rounds, unit="round"):
            with _counted(draft) as drafts:
                if number % 2:
                    assisted, alone = way(assistant), way({})
                else:
                    alone, assisted = way({}), way(assistant)
            ratios.append(alone.seconds / assisted.seconds)
        gaps = [
            _gap(reference, ids[0], mine, other)
            for (_, ids), mine, other in zip(given, alone.tokens, assisted.tokens, strict=True)
        ]
    counts = [len(tokens) for tokens in assisted.tokens]
    tokens_of, passes_of = Counter[str](), Counter[str]()
    for (domain, _), count, passes in zip(given, counts, assisted.passes, strict=True):
        tokens_of[domain] += count
        passes_of[domain] += passes
    return Drafting(
        prompts=len(given),
        new_tokens=new_tokens,
        tokens=sum(counts),
        target_forwards=sum(assisted.passes),
        draft_forwards=drafts[0],
        by_domain={domain: count / passes_of[domain] for domain, count in tokens_of.items()},
        same=gaps.count(None) / len(gaps),
        gap=max((gap for gap in gaps if gap is not None), default=0.0),
        rounds=rounds,
        speedup=statistics.median(ratios),
        speedup_range=(min(ratios), max(ratios)),
        hardware=hardware(reference.device),
    )


@dataclass(frozen=True)
class _Way:
    """Generation after all prompts: seconds; tokens after each, and forward passes of the reference for them."""

    seconds: float
    tokens: list[Tensor]
    passes: list[int]


@torch.no_grad()
def _gap(model: PreTrainedModel, prompt: Tensor, mine: Tensor, other: Tensor) -> float | None:
    """How far apart a model's logits are of the first two tokens in which two continuations of a prompt differ.

    None where they do not: one that ends does so by a token of its own.
    """
    place = next((i for i, (a, b) in enumerate(zip(mine.tolist(), other.tolist(), strict=False)) if a != b), None)
    if place is None:
        return None
    ids = torch.cat([prompt, mine[:place]])[None].to(model.device)
    logits = model(ids, use_cache=False).logits[0, -1].float()
    return float((logits[mine[place]] - logits[other[place]]).abs())


def draft_table(drafts: dict[str, Drafting], reference: str) -> list[list[str]]:
    """Rows of text, the head first: a row for each draft, a column for each domain."""
    domains = list(dict.fromkeys(domain for found in drafts.values() for domain in found.by_domain))
    domains = domains if len(domains) > 1 else []
    rows = [[f"as a draft of {reference}", "tokens per forward", *domains, "times as fast"]]
    for name, found in drafts.items():
        shares = (f"{found.by_domain[domain]:.2f}" if domain in found.by_domain else "" for domain in domains)
        speed = with_range(found.speedup, found.speedup_range)
        rows.append([name, f"{found.tokens_per_forward:.2f}", *shares, speed])
    return rows


def _prompts(samples: CalibrationSet, count: int, most: int) -> list[tuple[str, Tensor]]:
    """The first tokens of some samples, with their domains; in equal shares, as far as domains go."""
    by_domain: dict[str, list[Tensor]] = {}
    for sample, ids in zip(samples.samples, samples.token_ids, strict=True):
        by_domain.setdefault(sample.domain, []).append(ids[: max(1, most)][None])
    turns: Iterator[tuple[str, Tensor]] = (
        (domain, found[place])
        for place in range(max(map(len, by_domain.values())))
        for domain, found in sorted(by_domain.items())
        if place < len(found)
    )
    return [prompt for prompt, _ in zip(turns, range(count), strict=False)]


@contextlib.contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Forward passes of a model inside a ``with``."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()


@contextlib.contextmanager
def _proposing(model: PreTrainedModel, count: int | None) -> Iterator[None]:
    """A draft that proposes so many tokens at once inside a ``with``; its settings adapt while it is used."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    if count is not None:
        model.generation_config.num_assistant_tokens = count
        model.generation_config.num_assistant_tokens_schedule = "constant"
    try:
        yield
    finally:
        model.generation_config = before
