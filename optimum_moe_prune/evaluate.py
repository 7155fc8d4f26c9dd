# SPDX-License-Identifier: Apache-2.0
"""What a model lost, by domain: perplexity, and the divergence from a reference model."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .architectures.block import evaluating, input_device, vocabulary
from .calibration import Batch, CalibrationInput, CalibrationSet, sample_length
from .errors import RequestError, RunError
from .progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL = "all"
_LOGIT_BYTES = 256 * 2**20  # logits of a batch, in float32; a batch is made smaller to keep to it


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
    """

    samples: int
    tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats."""
        return math.log(self.perplexity)


@dataclass(frozen=True)
class Evaluation:
    """Results by domain; the domain ``"all"`` weights every token the same."""

    domains: dict[str, DomainResult] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, figures that were not asked for left out."""
        return {
            name: {key: value for key, value in vars(result).items() if value is not None}
            for name, result in self.domains.items()
        }

    def summary(self) -> str:
        """A table for people."""
        compared = next(iter(self.domains.values())).kl_divergence is not None
        head = ["domain", "samples", "tokens", "perplexity"]
        head += ["reference", "lost (nats)", "KL (nats)", "top-1 same"] if compared else []
        rows = [head]
        for name, r in self.domains.items():
            row = [name, str(r.samples), str(r.tokens), f"{r.perplexity:.2f}"]
            if r.reference_perplexity is not None:
                row += [
                    f"{r.reference_perplexity:.2f}",
                    f"{math.log(r.perplexity / r.reference_perplexity):.3f}",
                    f"{r.kl_divergence:.3f}",
                    f"{r.top1_agreement:.1%}",
                ]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def evaluate(
    model: PreTrainedModel,
    data: CalibrationInput,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
) -> Evaluation:
    """Perplexity of a model by domain, and its divergence from a reference model.

    Args:
        model: A causal language model.
        data: Texts, files, records or token tensors; each text is one sample, cut to ``max_length`` tokens.
        tokenizer: For texts.
        reference: The model to compare with, of the same vocabulary; usually the unpruned one.
        batch_size: Samples in a forward pass, at most; fewer where the vocabulary is large.
        max_length: Tokens of a sample at most; less if the model was made for less (``max_position_embeddings``).

    Raises:
        RequestError: If the data cannot be read, a token id is outside a vocabulary, or the vocabularies differ.
        RunError: If a model's loss is NaN or infinite.
    """
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; it must be at least 1.")
    samples = CalibrationSet.build(data, tokenizer, max_length=sample_length(max_length, model.config))
    models = [model] if reference is None else [model, reference]
    sizes = [m.config.get_text_config().vocab_size for m in models]
    samples.check_vocabulary(min(map(vocabulary, models)))
    if len(set(sizes)) > 1:
        raise RequestError(
            f"the model has {sizes[0]} output tokens and the reference {sizes[1]}; they cannot be compared."
        )
    sums = torch.zeros(len(samples), 4, dtype=torch.float64)  # loss, reference's loss, divergence, agreement
    longest = max(sample.num_tokens for sample in samples.samples)
    batch_size = min(batch_size, max(1, _LOGIT_BYTES // (4 * longest * sizes[0])))
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
        tokens = sum(samples.samples[i].num_tokens - 1 for i in rows)
        loss, reference_loss, divergence, agreement = (sums[rows].sum(0) / tokens).tolist()
        if not math.isfinite(loss) or not math.isfinite(reference_loss):
            raise RunError(f"the loss on domain {name!r} is {loss}: a model holds NaN or infinite values.")
        compared: dict[str, float] = {}
        if reference is not None:
            compared = {
                "reference_perplexity": math.exp(min(reference_loss, 700)),
                "kl_divergence": divergence,
                "top1_agreement": agreement,
            }
        domains[name] = DomainResult(len(rows), tokens, math.exp(min(loss, 700)), **compared)
    return Evaluation(domains)


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
        figures[:, 2] = (reference.exp() * (reference - mine)).sum(1).double().cpu()
        figures[:, 3] = (reference.argmax(1) == mine.argmax(1)).double().cpu()
    return batch.samples[:, None].expand(mask.shape)[mask], figures
