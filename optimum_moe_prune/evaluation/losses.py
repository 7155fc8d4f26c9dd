# SPDX-License-Identifier: Apache-2.0
"""What a model lost, by domain: perplexity, and the divergence from a reference model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..calibration.samples import CalibrationInput, CalibrationSet, sample_length
from ..compat import text_config
from ..errors import RequestError, RunError
from ..models.batches import Batch
from ..models.checks import evaluating, input_device, vocabulary
from ..planning.sensitivity import ALL
from ..progress import progress
from .divergence import batch_size_for, kl_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESAMPLES = 2000
"""Of the samples of a domain, for an interval."""
FEWEST = 8
"""Samples of a domain for which there are intervals: of fewer, resamples say little about other texts."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class DomainResult:
    """One domain, all figures per predicted token.

    Attributes:
        samples: Texts.
        tokens: Predicted tokens: every token of a text but its first.
        perplexity: ``exp`` of the mean negative log-likelihood.
        reference_perplexity: Of the reference model, if there is one.
        kl_divergence: Mean ``KL(reference || model)`` in nats.
        top1_agreement: Share of tokens for which both models find the same next token most likely.
        lost_interval: Of ``lost``, 95%: percentiles over resamples of the samples, the same for both models
            (a paired bootstrap); None where there are fewer than eight samples. It is about the choice of texts alone.
        perplexity_difference_interval: Of ``perplexity - reference_perplexity``, from the same resamples.
    """

    samples: int
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    lost_interval: Interval | None = None
    perplexity_difference_interval: Interval | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats."""
        return math.log(self.perplexity)

    @property
    def lost(self) -> float | None:
        """The loss above that of the reference, in nats."""
        return None if self.reference_perplexity is None else self.loss - math.log(self.reference_perplexity)


@dataclass(frozen=True)
class Evaluation:
    """Results by domain; the domain ``"all"`` weights every token the same."""

    domains: dict[str, DomainResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, figures that were not asked for left out."""
        return {
            name: {key: value for key, value in {**vars(result), "lost": result.lost}.items() if value is not None}
            for name, result in self.domains.items()
        }

    def summary(self) -> str:
        """A table for people."""
        return "\n".join(aligned(self.table()))

    def table(self) -> list[list[str]]:
        """The results as rows of text, the head first."""
        compared = next(iter(self.domains.values())).kl_divergence is not None
        head = ["domain", "samples", "tokens", "perplexity"]
        head += ["reference", "lost (nats)", "95% interval", "KL (nats)", "top-1 same"] if compared else []
        rows = [head]
        for name, r in self.domains.items():
            row = [name, str(r.samples), str(r.tokens), f"{r.perplexity:.2f}"]
            if r.reference_perplexity is not None:
                row += [
                    f"{r.reference_perplexity:.2f}",
                    f"{r.lost:.3f}",
                    "" if r.lost_interval is None else "{:.3f} to {:.3f}".format(*r.lost_interval),
                    f"{r.kl_divergence:.3f}",
                    f"{r.top1_agreement:.1%}",
                ]
            rows.append(row)
        return rows


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def evaluate(
    model: PreTrainedModel,
    data: CalibrationInput,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
) -> Evaluation:
    """Perplexity of a model by domain, and its divergence from a reference model.

    Args:
        model: A causal language model.
        data: Texts, files, records or token tensors; each text is one sample, cut to ``max_length`` tokens.
        tokenizer: For texts.
        reference: The model to compare with, of the same vocabulary; usually the unpruned one.
        batch_size: Samples in a forward pass, at most; fewer where the vocabulary is large.
        max_length: Tokens of a sample at most; less if the model was made for less (``max_position_embeddings``).
        seed: Of the resamples.

    Raises:
        RequestError: If the data cannot be read, a token id is outside a vocabulary, or the vocabularies differ.
        RunError: If a model's loss is NaN or infinite.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; it must be at least 1.")
    samples = CalibrationSet.build(data, tokenizer, max_length=sample_length(max_length, model.config))
    models = [model] if reference is None else [model, reference]
    sizes = [text_config(m.config).vocab_size for m in models]
    samples.check_vocabulary(min(map(vocabulary, models)))
    if len(set(sizes)) > 1:
        raise RequestError(
            f"the model has {sizes[0]} output tokens and the reference {sizes[1]}; they cannot be compared."
        )
    sums = torch.zeros(len(samples), 4, dtype=torch.float64)  # loss, reference's loss, divergence, agreement
    batch_size = batch_size_for(sizes[0], samples, batch_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for m in models:
            stack.enter_context(evaluating(m))
        batches = samples.batches(batch_size)
        for batch in progress(batches, "evaluating", samples.num_batches(batch_size), unit="batch"):
            sample, figures = _batch_figures(models, batch)
            sums.index_add_(0, sample, figures)
    domains = {}
    names = sorted({s.domain for s in samples.samples})
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        rows = [i for i, s in enumerate(samples.samples) if name in (s.domain, ALL)]
        predicted = torch.tensor([samples.samples[i].num_tokens - 1 for i in rows], dtype=torch.float64)
        tokens = int(predicted.sum())
        loss, reference_loss, divergence, agreement = (sums[rows].sum(0) / tokens).tolist()
        if not math.isfinite(loss) or not math.isfinite(reference_loss):
            raise RunError(f"the loss on domain {name!r} is {loss}: a model holds NaN or infinite values.")
        compared: dict[str, Any] = {}
        if reference is not None:
            lost, difference = _intervals(sums[rows, :2].numpy(), predicted.numpy(), seed)
            compared = {
                "lost_interval": lost,
                "perplexity_difference_interval": difference,
                "reference_perplexity": math.exp(min(reference_loss, 700)),
                "kl_divergence": divergence,
                "top1_agreement": agreement,
            }
        domains[name] = DomainResult(len(rows), tokens, math.exp(min(loss, 700)), **compared)
    return Evaluation(domains)


def _intervals(losses: np.ndarray, tokens: np.ndarray, seed: int) -> tuple[Interval | None, Interval | None]:
    """95% intervals of the loss above the reference's and of the difference of perplexities, by a paired bootstrap.

    Args:
        losses: Summed losses of model and reference of each sample ``(S, 2)``.
        tokens: Predicted tokens of each sample ``(S,)``.
        seed: Of the resamples.
    """
    if len(tokens) < FEWEST:
        return None, None
    rng = np.random.default_rng(seed)
    sums = []
    at_once = max(1, 2**22 // len(tokens))
    for first in range(0, RESAMPLES, at_once):  # how often each sample was drawn says all of a resample
        drawn = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), min(at_once, RESAMPLES - first))
        sums.append(drawn @ np.column_stack([losses, tokens]))
    total = np.concatenate(sums)
    mean = total[:, :2] / total[:, 2:]
    low, high = np.percentile(mean[:, 0] - mean[:, 1], [2.5, 97.5]).tolist()
    perplexity = np.exp(np.minimum(mean, 700))
    least, most = np.percentile(perplexity[:, 0] - perplexity[:, 1], [2.5, 97.5]).tolist()
    return (low, high), (least, most)


def _batch_figures(models: list[PreTrainedModel], batch: Batch) -> tuple[Tensor, Tensor]:
    """The sample of each predicted token ``(T,)`` and its figures ``(T, 4)``, from the models' own forwards."""
    mask = batch.attention_mask[:, 1:].bool()
    targets = batch.input_ids[:, 1:][mask][:, None]
    log_p = []
    for model in models:
        device = input_device(model)
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
        ).logits
        log_p.append(torch.log_softmax(logits[:, :-1][mask.to(logits.device)].float(), dim=-1))
    figures = torch.zeros(len(targets), 4, dtype=torch.float64)
    for column, values in enumerate(log_p):
        figures[:, column] = -values.gather(1, targets.to(values.device))[:, 0].double().cpu()
    if len(log_p) == 2:
        mine, reference = log_p[0], log_p[1].to(log_p[0].device)
        figures[:, 2] = kl_per_token(reference, mine).cpu()
        figures[:, 3] = (reference.argmax(1) == mine.argmax(1)).double().cpu()
    return batch.samples[:, None].expand(mask.shape)[mask], figures
