# SPDX-License-Identifier: Apache-2.0
"""By what a text is known again that was calibrated on, years later and cut elsewhere, without the text itself.

A sample leaves a hash of all its tokens and hashes of some of its passages: of every run of ``length`` tokens those
whose hash falls on one of ``one_in`` values, so that which ones depends on the passage alone. A text that was cut at
another length, or joined with others and cut into packed samples, is known by the passages that are in both. Passages
that stand in many samples (a licence, a system prompt) say nothing about one of them and are left out.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..storage.values import Json, is_integer
from .samples import _mix

KEY = "passages"
"""Under which what is remembered stands, wherever text was read: in statistics, sensitivities, plans."""

_LENGTH = 24  # tokens of a passage: so many in a row stand in two texts only where both have them from a third
_EACH = 64  # passages remembered of a sample, on average
_MOST = 8192  # and of all samples: 32 kB
_SHARE = 0.6  # of a sample's passages: so many are those of a sample that was read
_HASH_BYTES = 5  # of a sample's hash
_HEXADECIMAL = re.compile(r"(?:[0-9a-f]{2}){5,}")


@dataclass(frozen=True)
class Passages:
    """What is remembered of the samples that were read.

    Attributes:
        samples: The first bytes of the hash of each sample's tokens.
        longest: Tokens of the longest one: longer texts were cut to it.
        length: Tokens of a passage.
        one_in: Of how many passages one is remembered; a power of two.
        hashes: Of passages, sorted, ``(N,)`` uint32.
    """

    samples: frozenset[bytes]
    longest: int
    length: int
    one_in: int
    hashes: np.ndarray

    @classmethod
    def of(cls, hashes: Sequence[str], token_ids: Sequence[Tensor] = ()) -> Passages:
        """Those of some samples.

        Args:
            hashes: Of each sample's token ids (``Sample.hash``).
            token_ids: Of each sample ``(tokens,)`` int64, where they are known.
        """
        samples = frozenset(bytes.fromhex(digest)[:_HASH_BYTES] for digest in hashes if _HEXADECIMAL.fullmatch(digest))
        lengths = [len(ids) for ids in token_ids]
        length = max(3, min(_LENGTH, int(np.median(lengths)) // 4)) if lengths else _LENGTH
        found = _uncommon([_passages(ids, length) for ids in token_ids])
        every = np.unique(np.concatenate([np.zeros(0, np.uint64), *found]))
        one_in = 1
        while len(every) > min(_MOST, _EACH * len(lengths)):
            one_in *= 2
            every = every[_selected(every, one_in)]
        return cls(samples, max(lengths, default=0), length, one_in, np.unique(_short(every)))

    def known(self, token_ids: Sequence[Tensor]) -> list[bool]:
        """Which samples are among those that were read, or whose passages are for the most part.

        Args:
            token_ids: Of each sample ``(tokens,)`` int64.
        """
        passages = [p[_selected(p, self.one_in)] for p in (_passages(ids, self.length) for ids in token_ids)]
        return [
            self._is_known(ids) or (len(own) > 0 and int(np.isin(_short(own), self.hashes).sum()) >= _SHARE * len(own))
            for ids, own in zip(token_ids, _uncommon(passages), strict=True)
        ]

    def _is_known(self, ids: Tensor) -> bool:
        """Whether these tokens, or so many as a longer text was cut to, are those of a sample."""
        lengths = {len(ids), min(len(ids), self.longest or len(ids))}
        return any(hash_of(ids[:length])[:_HASH_BYTES] in self.samples for length in lengths)

    # -- plain values

    def to_dict(self) -> Json:
        """As plain JSON values."""
        return {
            "samples": _text(b"".join(sorted(self.samples))),
            "longest": self.longest,
            "length": self.length,
            "one_in": self.one_in,
            "hashes": _text(self.hashes.astype("<u4").tobytes()),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Passages:
        """From plain values.

        Raises:
            ValueError: If they are damaged.
        """
        try:
            longest, length, one_in = numbers = [values[name] for name in ("longest", "length", "one_in")]
            if not all(is_integer(n) and 0 <= n < 2**31 for n in numbers) or length < 1 or one_in < 1:
                raise ValueError(f"{numbers}")
            samples, hashes = (base64.b64decode(values[name], validate=True) for name in ("samples", "hashes"))
            starts = range(0, len(samples), _HASH_BYTES)
            known = frozenset(samples[start : start + _HASH_BYTES] for start in starts)
            return cls(known, longest, length, one_in, np.frombuffer(hashes, "<u4"))
        except (TypeError, KeyError, IndexError, AttributeError, binascii.Error) as error:
            raise ValueError(f"{error!r}") from error


def hash_of(ids: Tensor) -> bytes:
    """The hash of a sample's token ids ``(tokens,)`` int64, of which ``Sample.hash`` is the hexadecimal form."""
    return hashlib.sha256(ids.numpy().tobytes()).digest()


def remembered(provenance: Any) -> Iterator[Any]:
    """What is remembered of texts anywhere in nested plain values: calibrations, merged parts, earlier plans ..."""
    inside: list[Any] = []
    if isinstance(provenance, dict):
        if KEY in provenance:
            yield provenance[KEY]
        inside = [value for key, value in provenance.items() if key != KEY]
    elif isinstance(provenance, list):
        inside = provenance
    for value in inside:
        if isinstance(value, (dict, list)):
            yield from remembered(value)


def without_passages(provenance: Any) -> Any:
    """Nested plain values for people, without what is remembered of texts."""
    if isinstance(provenance, dict):
        return {key: without_passages(value) for key, value in provenance.items() if key != KEY}
    return [without_passages(value) for value in provenance] if isinstance(provenance, list) else provenance


def _passages(ids: Tensor, length: int) -> np.ndarray:
    """Hashes of the passages of a sample, each once, ``(N,)`` uint64."""
    tokens = _mix(ids.numpy().astype(np.uint64))
    count = len(tokens) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(length):
            total = total * np.uint64(0x9E3779B97F4A7C15) + tokens[offset : offset + count]
    return np.unique(_mix(total))


def _uncommon(samples: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The passages of each sample that do not stand in many of them."""
    if len(samples) < 3:
        return list(samples)
    every, counts = np.unique(np.concatenate(samples), return_counts=True)
    common = every[counts > max(2, len(samples) // 20)]
    return [own[~np.isin(own, common)] for own in samples] if len(common) else list(samples)


def _selected(hashes: np.ndarray, one_in: int) -> np.ndarray:
    return (hashes >> np.uint64(32)) % np.uint64(one_in) == 0


def _short(hashes: np.ndarray) -> np.ndarray:
    return (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _text(values: bytes) -> str:
    return base64.b64encode(values).decode()
