# SPDX-License-Identifier: Apache-2.0
"""What a model lost, by domain: its loss, and the divergence from a reference model."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor, nn

from ..calibration.samples import CalibrationInput, CalibrationSet, sample_length
from ..calibration.shares import check_same_samples, numbers_of
from ..calibration.texts import needs_tokenizer
from ..checkpoints.source import Source
from ..compat import text_config
from ..errors import RequestError, RunError, check_type
from ..models.batches import Batch
from ..models.checks import evaluating, input_device, vocabulary
from ..models.memory import Compute
from ..models.transfers import rows_of, sent
from ..models.widened import widened
from ..models.wrappers import plain_model
from ..names import AUTO
from ..planning.sensitivity import ALL
from ..processes import Processes, launched, shared
from ..progress import working
from ..storage.values import Json, Values
from .divergence import batch_size_for, kl_per_token
from .tables import aligned

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESAMPLES = 2000
"""Of the samples of a domain, for an interval."""
FEWEST = 8
"""Samples of a domain for which there are intervals: of fewer, resamples say little about other texts."""

_LARGEST = 300.0  # nats; perplexities of more are beyond a comparison, and their squares beyond double precision

Interval = tuple[float, float]


@dataclass(frozen=True)
class DomainResult:
    """One domain, all figures per predicted token.

    Attributes:
        samples: Texts.
        tokens: Predicted tokens: every token of a text but its first.
        loss: Mean negative log-likelihood in nats.
        reference_loss: Of the reference model, if there is one.
        kl_divergence: Mean ``KL(reference || model)`` in nats.
        top1_agreement: Share of tokens for which both models find the same next token most likely.
        lost_interval: Of ``lost``, 95%: percentiles over resamples of the samples, the same for both models
            (a paired bootstrap); None where there are fewer than eight samples. It is about the choice of texts alone.
        perplexity_difference_interval: Of ``perplexity - reference_perplexity``, from the same resamples; None where
            one of them is above ``exp(300)``.
    """

    samples: int
    tokens: int
    loss: float
    reference_loss: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    lost_interval: Interval | None = None
    perplexity_difference_interval: Interval | None = None

    @property
    def perplexity(self) -> float:
        """``exp`` of the loss; infinite where that is no number of double precision (above 709 nats)."""
        return _exp(self.loss)

    @property
    def reference_perplexity(self) -> float | None:
        """Of the reference model."""
        return None if self.reference_loss is None else _exp(self.reference_loss)

    @property
    def lost(self) -> float | None:
        """The loss above that of the reference, in nats."""
        return None if self.reference_loss is None else self.loss - self.reference_loss

    def to_dict(self) -> Json:
        """As plain JSON values: what was not asked for is left out, an infinite perplexity is None."""
        values = {name: getattr(self, name) for name in (*self.__dataclass_fields__, *_DERIVED)}
        return {
            name: None if isinstance(value, float) and math.isinf(value) else value
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, values: Values) -> DomainResult:
        """From plain values; earlier ones have perplexities in place of losses.

        Raises:
            ValueError: If a value is no finite number.
            KeyError: If one is missing.
        """
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("loss", "reference_loss"):
            if name not in known and (perplexity := values.get(name.replace("loss", "perplexity"))) is not None:
                known[name] = math.log(perplexity)
        for name, value in known.items():
            numbers = value if name.endswith("_interval") else [value]
            if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
                raise ValueError(f"{name} is {value!r}")
            if name.endswith("_interval"):
                low, high = numbers
                known[name] = (float(low), float(high))
        return cls(**known)


_DERIVED = ("perplexity", "reference_perplexity", "lost")


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Evaluation:
    """Results by domain; the domain ``"all"`` weights every token the same."""

    domains: dict[str, DomainResult] = field(default_factory=dict)

    def to_dict(self) -> Json:
        """As plain JSON values, figures that were not asked for left out."""
        return {name: result.to_dict() for name, result in self.domains.items()}

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
            row = [name, str(r.samples), str(r.tokens), short(r.perplexity)]
            if r.reference_perplexity is not None:
                row += [
                    short(r.reference_perplexity),
                    nats(r.lost),
                    "" if r.lost_interval is None else " to ".join(map(nats, r.lost_interval)),
                    nats(r.kl_divergence),
                    f"{r.top1_agreement:.1%}",
                ]
            rows.append(row)
        return rows


def nats(value: float | None) -> str:
    """Nats per token as text; nothing where there are none."""
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def short(perplexity: float) -> str:
    """A perplexity as text."""
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.3g}"


@shared
def evaluate(
    model: PreTrainedModel,
    data: CalibrationInput,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    processes: Processes | None = None,
    dtype: str = AUTO,
) -> Evaluation:
    """Perplexity of a model by domain, and its divergence from a reference model.

    Args:
        model: A causal language model.
        data: Texts, files, records or token tensors; each text is one sample, cut to ``max_length`` tokens. A
            ``CalibrationSet`` where they are read in a way of their own (``text_column``, ``template_args``,
            ``skip_bad``).
        tokenizer: For texts; by default the one in the folder or repository that the model is from.
        reference: The model to compare with, of the same vocabulary; usually the unpruned one.
        batch_size: Samples in a forward pass, at most; fewer where the vocabulary is large.
        max_length: Tokens of a sample at most; less if the model was made for less (``max_position_embeddings``).
        seed: Of the resamples.
        processes: Those that share the batches, as in ``Compute``; all have the whole result.
        dtype: The precision to calculate in: ``"auto"`` is that of each model's weights, or float32 where the
            processor multiplies that far faster; ``"bfloat16"`` and ``"float16"`` leave it at the weights' own.

    Raises:
        RequestError: If the data cannot be read, a token id is outside a vocabulary, or the vocabularies differ.
        RunError: If a model's loss is NaN or infinite.
    """
    processes = launched() if processes is None else processes
    if batch_size < 1:
        raise RequestError(f"batch_size is {batch_size}; it must be at least 1.")
    for given in (model, reference):
        check_type(given, (nn.Module, type(None)), "a loaded model (compare takes folders and Hub ids)")
    model, reference = plain_model(model), plain_model(reference)
    if tokenizer is None and model.name_or_path and needs_tokenizer(data):
        tokenizer = Source(model.name_or_path).tokenizer
    samples = CalibrationSet.build(data, tokenizer, max_length=sample_length(max_length, model.config))
    models = [model] if reference is None else [model, reference]
    sizes = [text_config(m.config).vocab_size for m in models]
    samples.check_vocabulary(min(map(vocabulary, models)))
    if len(set(sizes)) > 1:
        raise RequestError(
            f"the model has {sizes[0]} output tokens and the reference {sizes[1]}; they cannot be compared."
        )
    check_same_samples(processes, samples)
    compute = Compute(dtype, processes=processes)
    sums = _sums(models, samples, batch_size_for(sizes[0], samples, batch_size), compute)
    return evaluation_of(samples, sums, compared=reference is not None, seed=seed)


def _sums(models: list[PreTrainedModel], samples: CalibrationSet, batch_size: int, compute: Compute) -> Tensor:
    """What :func:`evaluation_of` takes, of the batches of all processes."""
    processes = compute.together
    sums = torch.zeros(len(samples), 4, dtype=torch.float64)  # loss, reference's loss, divergence, agreement
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for m in models:
            stack.enter_context(widened(m, compute.precision_of(m)))
            stack.enter_context(evaluating(m))
        batches = list(samples.batches(batch_size))
        own = [batches[number] for number in processes.share(len(batches))]
        sizes = [batch.input_ids.numel() for batch in own]
        work = stack.enter_context(working("evaluating", len(own), "batch", "evaluated", costs=sizes))
        for batch in work.over(own):
            sample, figures = _batch_figures(models, batch)
            sums.index_add_(0, sample, figures)
            processes.look()
    rows = numbers_of(own)
    for numbers, figures in processes.meet((rows, sums[rows])):  # the whole of a sample is in one batch
        sums[numbers] = figures
    return sums


def evaluation_of(samples: CalibrationSet, sums: Tensor, compared: bool, seed: int = 0) -> Evaluation:
    """Results by domain, from what was summed over the predicted tokens of each sample.

    Args:
        samples: The samples.
        sums: Loss, the reference's loss, divergence and agreement ``(S, 4)`` float64.
        compared: Whether there is a reference.
        seed: Of the resamples.

    Raises:
        RunError: If a loss is NaN or infinite.
    """
    domains = {}
    names = sorted({s.domain for s in samples.samples})
    for name in [*names, *([ALL] if len(names) > 1 else [])]:
        rows = [i for i, s in enumerate(samples.samples) if name in (s.domain, ALL)]
        predicted = torch.tensor([samples.samples[i].num_tokens - 1 for i in rows], dtype=torch.float64)
        tokens = int(predicted.sum())
        loss, reference_loss, divergence, agreement = (sums[rows].sum(0) / tokens).tolist()
        if not math.isfinite(loss) or not math.isfinite(reference_loss):
            raise RunError(f"the loss on domain {name!r} is {loss}: a model holds NaN or infinite values.")
        if compared:
            intervals = _intervals(sums[rows, :2].numpy(), predicted.numpy(), seed)
            domains[name] = DomainResult(len(rows), tokens, loss, reference_loss, divergence, agreement, *intervals)
        else:
            domains[name] = DomainResult(len(rows), tokens, loss)
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

    def statistics(mine: np.ndarray, theirs: np.ndarray, tokens: np.ndarray, axis: int) -> np.ndarray:
        total = tokens.sum(axis)
        before, after = (np.minimum(losses.sum(axis) / total, _LARGEST) for losses in (theirs, mine))
        return np.stack([(mine - theirs).sum(axis) / total, np.exp(after) - np.exp(before)])

    low, high = bootstrap(
        (losses[:, 0], losses[:, 1], tokens),
        statistics,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**20 // len(tokens)),  # 10,000 samples take 0.9 s and 33 MB on one core
        method="percentile",
        random_state=np.random.default_rng(seed),  # named rng from SciPy 1.15 on, which takes both
    ).confidence_interval
    lost, difference = zip(low.tolist(), high.tolist(), strict=True)
    return lost, None if losses.sum(0).max() / tokens.sum() > _LARGEST else difference


def _batch_figures(models: list[PreTrainedModel], batch: Batch) -> tuple[Tensor, Tensor]:
    """The sample of each predicted token ``(T,)`` and its figures ``(T, 4)``, from the models' own forwards."""
    mask = batch.attention_mask[:, 1:].bool()
    targets = batch.input_ids[:, 1:][mask][:, None]
    log_p = []
    for model in models:
        device = input_device(model)
        ids, attention = (sent(tensor, device) for tensor in (batch.input_ids, batch.attention_mask))
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        log_p.append(torch.log_softmax(rows_of(logits[:, :-1], mask).float(), dim=-1))
    device = log_p[0].device  # the figures come from there together
    columns = [-values.gather(1, sent(targets, values.device))[:, 0].double().to(device) for values in log_p]
    if len(log_p) == 2:
        mine, reference = log_p[0], log_p[1].to(device)
        columns += [kl_per_token(reference, mine), (reference.argmax(1) == mine.argmax(1)).double()]
    figures = torch.zeros(len(targets), 4, dtype=torch.float64)
    figures[:, : len(columns)] = torch.stack(columns, dim=1).cpu()
    return batch.samples[:, None].expand(mask.shape)[mask], figures
