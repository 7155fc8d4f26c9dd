# SPDX-License-Identifier: Apache-2.0
"""Samples as statistics know them: how domains share, and which tokens are kept for any batch size or order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from ..storage.values import is_integer
from .needs import SUMS_OF_KEPT

MaxTokens = int | Literal["all"]
"""The most tokens for which statistics per token are kept."""

_ALL = 2**63 - 1  # as most tokens: no bound
_LABELS = 0x4C4142454C  # so that labels have nothing to do with which tokens are kept
_A_FEW = 8  # tokens of each sample that are kept before any sample's share


@dataclass(frozen=True)
class Sample:
    """One calibration sample: a hash of its token ids, its domain, its length in tokens."""

    hash: str
    domain: str
    num_tokens: int


def samples_fingerprint(samples: Iterable[Sample]) -> str:
    """A hash of samples and their domains."""
    return hashlib.sha256(" ".join(f"{s.hash} {s.domain!r}" for s in samples).encode()).hexdigest()


def check_domain_weights(samples: Iterable[Sample], domain_weights: Mapping[str, float]) -> None:
    """Raise unless there is a positive, finite number for each domain of the samples, and for no other.

    Raises:
        RequestError: Naming the domains.
    """
    domains = sorted({sample.domain for sample in samples})
    sound = all(isinstance(w, (int, float)) and 0 < w < float("inf") for w in domain_weights.values())
    if set(domain_weights) != set(domains) or not sound:
        raise RequestError(
            f"domain_weights must give a positive number for each domain of the calibration ({', '.join(domains)}), "
            f"and is {dict(domain_weights)}."
        )


def equal_shares(domains: Sequence[str], count: int) -> list[int]:
    """At most ``count`` of some samples, in equal shares of their domains; what a small domain lacks, the others give.

    Args:
        domains: The domain of each sample.
        count: How many to take.

    Returns:
        Positions, dealt in rounds: in each one sample of every domain that has one left, the domains in the order of
        their first samples, the samples of a domain in their own.
    """
    positions: dict[str, list[int]] = {}
    for position, domain in enumerate(domains):
        positions.setdefault(domain, []).append(position)
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*positions.values()))
    return list(itertools.islice((position for position in rounds if position is not None), count))


def most_tokens(max_tokens: MaxTokens) -> int:
    """The number that is meant, as statistics hold it.

    Raises:
        RequestError: If it is none.
    """
    if max_tokens == "all":
        return _ALL
    if not is_integer(max_tokens) or not 1 <= max_tokens <= _ALL:
        raise RequestError(f'max_tokens is {max_tokens!r}; it must be an integer of at least 1 or "all".')
    return max_tokens


def asked_tokens(most: int) -> MaxTokens:
    """What was asked for, of the number that statistics hold."""
    return "all" if most == _ALL else most


def keep_tokens(samples: Sequence[Sample], max_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens that are kept: all of them, or each sample's share, and of each sample at least a few.

    Every token has a place in a line: the tokens of a sample stand as evenly in it as they can, in the order of their
    hashes, and the first few of each sample before all others. The first ``max_tokens`` are kept. A token's place
    follows from the seed, its sample and its position alone, so that what is kept of all samples is kept of any part
    of them, and a smaller ``max_tokens`` keeps a part of what a larger one does.

    Args:
        samples: The samples, in their final order.
        max_tokens: The most tokens to keep.
        seed: Another seed keeps others.

    Returns:
        Sample and position of each kept token, both ``(N,)`` int64, in the order of samples and positions.
    """
    lengths = np.array([s.num_tokens for s in samples], dtype=np.int64)
    sample = np.arange(len(samples)).repeat(lengths)
    first = (lengths.cumsum() - lengths).repeat(lengths)
    position = np.arange(len(sample)) - first
    if len(sample) > max_tokens:
        of_sample = _mix(np.array([int(s.hash[:16], 16) for s in samples], dtype=np.uint64) + np.uint64(seed % 2**64))
        of_token = _mix(of_sample[sample] + position.astype(np.uint64))
        rank = np.empty_like(position)
        rank[np.lexsort((of_token, sample))] = position  # as many positions as ranks, sample by sample
        offset = _mix(of_sample) / 2.0**64
        place = np.where(rank < _A_FEW, rank - _A_FEW, (rank + offset[sample]) / lengths[sample])
        kept = np.sort(np.lexsort((of_token, place))[:max_tokens])
        sample, position = sample[kept], position[kept]
    return torch.from_numpy(sample.astype(np.int64)), torch.from_numpy(position.astype(np.int64))


def label_quantiles(sample: Sample, seed: int, draws: int) -> Tensor:
    """Where in the model's distribution the labels of a sample's positions are drawn: ``(tokens - 1, J)`` float64.

    They follow from the seed, the sample and the position alone. The draws of a position are evenly spread, which
    leaves each of them as likely anywhere.

    Args:
        sample: The sample; after its last token nothing is predicted.
        seed: Another seed draws others.
        draws: J.
    """
    of_sample = np.array([int(sample.hash[:16], 16) ^ _LABELS], dtype=np.uint64) + np.uint64(seed % 2**64)
    positions = np.arange(sample.num_tokens - 1, dtype=np.uint64)
    first = _mix(_mix(of_sample) + positions) / 2.0**64
    return torch.from_numpy((first[:, None] + np.arange(draws) / draws) % 1.0)


def sums_of_kept(values: Tensor, token_sample: Tensor, lengths: Tensor) -> Tensor:
    """Sums over all tokens of each sample, estimated from its kept ones; exact where all are kept.

    A sample without kept tokens has those of the mean kept token.

    Args:
        values: Of each kept token ``(N, ...)``.
        token_sample: Its sample ``(N,)``.
        lengths: Tokens of each sample ``(S,)``.

    Returns:
        ``(S, ...)`` float64.
    """
    values = values.double()
    sums = values.new_zeros(len(lengths), *values.shape[1:]).index_add_(0, token_sample, values)
    kept = torch.bincount(token_sample, minlength=len(lengths))
    scale = (lengths / kept.clamp(min=1).double()).view(-1, *[1] * (values.ndim - 1))
    sums *= scale
    if len(values) and bool((kept == 0).any()):
        mean = values.mean(0, keepdim=True) * lengths.view_as(scale)
        sums = torch.where(kept.view_as(scale) == 0, mean, sums)
    return sums


def fill_sums_of_kept(tensors: Mapping[str, Tensor], token_sample: Tensor, lengths: Tensor) -> None:
    """Calculate those of a layer's tensors that are sums over kept tokens, from what is there of these.

    Args:
        tensors: The layer's.
        token_sample: As for :func:`sums_of_kept`.
        lengths: Likewise.
    """
    for name, of_tokens in SUMS_OF_KEPT.items():
        if name in tensors:
            tensors[name].copy_(sums_of_kept(tensors[of_tokens], token_sample, lengths))


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64): an even, reproducible hash."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
