# SPDX-License-Identifier: Apache-2.0
"""Samples as statistics know them: how domains share, and which tokens are kept for any batch size or order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError


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


def keep_tokens(samples: Sequence[Sample], max_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """The tokens that are kept: all of them, or the ``max_tokens`` with the lowest hash.

    Args:
        samples: The samples, in their final order.
        max_tokens: The most tokens to keep.
        seed: Another seed keeps others.

    Returns:
        Sample and position of each kept token, both ``(N,)`` int64, in the order of samples and positions.
    """
    sample = np.concatenate(
        [np.full(s.num_tokens, i, dtype=np.int64) for i, s in enumerate(samples)] or [np.zeros(0, int)]
    )
    position = np.concatenate([np.arange(s.num_tokens, dtype=np.int64) for s in samples] or [np.zeros(0, int)])
    if len(sample) > max_tokens:
        of_sample = np.array([int(s.hash[:16], 16) for s in samples], dtype=np.uint64)
        key = _mix(_mix(of_sample + np.uint64(seed % 2**64))[sample] + position.astype(np.uint64))
        kept = np.sort(np.argsort(key, kind="stable")[:max_tokens])
        sample, position = sample[kept], position[kept]
    return torch.from_numpy(sample.astype(np.int64)), torch.from_numpy(position.astype(np.int64))


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of splitmix64): an even, reproducible hash."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
