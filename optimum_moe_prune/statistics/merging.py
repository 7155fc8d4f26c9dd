# SPDX-License-Identifier: Apache-2.0
"""What statistics must have in common to be merged, and which of their rows make those of all their samples."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..architectures.routers import RoutingRule
from ..errors import RequestError
from ..storage.values import Json
from .files import MergedTensors, tensor_shapes
from .needs import PER_TOKEN, SINCE_FORMAT_3, SUMS_OF_KEPT, WITHOUT_TEXT, Need, tensor_names
from .samples import Sample, asked_tokens, sums_of_kept


class Part(Protocol):
    """Statistics, as far as merging looks at them."""

    @property
    def model(self) -> Json: ...
    @property
    def samples(self) -> tuple[Sample, ...]: ...
    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def token_sample(self) -> Tensor: ...
    @property
    def token_position(self) -> Tensor: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def num_experts(self) -> dict[int, int]: ...
    @property
    def routing(self) -> RoutingRule: ...


def check_mergeable(parts: Sequence[Part]) -> None:
    """Raise unless statistics are of one model and its settings, each of other samples.

    Raises:
        RequestError: Naming what differs.
    """
    one, hashes = parts[0], set[str]()
    for part in parts:
        _check_same("model", one.model.get("fingerprint"), part.model.get("fingerprint"))
        _check_same("seed", one.seed, part.seed)
        _check_same("max_tokens", asked_tokens(one.max_tokens), asked_tokens(part.max_tokens))
        _check_same("needs", sorted(map(str, one.needs)), sorted(map(str, part.needs)))
        _check_same("the experts of each layer", one.num_experts, part.num_experts)
        _check_same("how its routers choose", one.routing, part.routing)
        shared = hashes.intersection(sample.hash for sample in part.samples)
        if shared:
            raise RequestError(f"these statistics cannot be merged: {len(shared)} samples are in both.")
        hashes.update(sample.hash for sample in part.samples)


def rows_by_name(
    names: Iterable[str], needs: Iterable[Need], by_sample: Tensor, kept: Tensor
) -> dict[str, Tensor | None]:
    """The rows that merged tensors are made of, as :class:`MergedTensors` takes them.

    Args:
        names: Of the tensors.
        needs: What was gathered.
        by_sample: The rows of tensors with a row for each sample.
        kept: Of those with one for each kept token.
    """
    per_token, of_experts = tensor_names(needs, PER_TOKEN), tensor_names(WITHOUT_TEXT)
    return {name: None if name in of_experts else kept if name in per_token else by_sample for name in names}


def merged_tensors(
    parts: Sequence[Mapping[str, Tensor]],
    rows: Mapping[str, Tensor | None],
    token_sample: Tensor,
    samples: Collection[Sample],
) -> MergedTensors:
    """A layer's tensors of all parts, each put together when it is asked for.

    Args:
        parts: The layer's tensors in each.
        rows: As for :class:`MergedTensors`.
        token_sample: The sample of each kept token of all.
        samples: Of all.

    Raises:
        RequestError: If they are of different precisions.
    """
    shapes = [tensor_shapes(part) for part in parts]
    for name in rows:
        for other in shapes:
            _check_same(name, shapes[0][name][1], other[name][1], "; calibrate both in the same precision")
    lengths = torch.tensor([sample.num_tokens for sample in samples])
    again = functools.partial(sums_of_kept, token_sample=token_sample, lengths=lengths)
    has_sums = SINCE_FORMAT_3 & rows.keys()  # before, they were sums over all tokens
    sums = {name: (of_tokens, again) for name, of_tokens in SUMS_OF_KEPT.items() if has_sums and name in rows}
    return MergedTensors(parts, rows, sums)


def kept_rows(parts: Iterable[Part], token_sample: Tensor, token_position: Tensor, order: list[int]) -> Tensor:
    """Where the kept tokens of merged statistics are, counted through those of the parts, which all kept them."""
    rank = torch.empty(len(order), dtype=torch.int64)
    rank[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    rows: dict[tuple[int, int], int] = {}
    first = 0
    for part in parts:
        for token in zip(rank[first + part.token_sample].tolist(), part.token_position.tolist(), strict=True):
            rows[token] = len(rows)
        first += len(part.samples)
    kept = zip(token_sample.tolist(), token_position.tolist(), strict=True)
    try:
        return torch.tensor([rows[token] for token in kept], dtype=torch.int64)
    except KeyError as error:
        raise RequestError(
            "these statistics cannot be merged: the kept tokens of one are not those of its samples. Calibrate again."
        ) from error


def _check_same(what: str, mine: Any, theirs: Any, advice: str = "") -> None:
    if mine != theirs:
        raise RequestError(
            f"these statistics cannot be merged: {what} is {mine} in one and {theirs} in the other{advice}."
        )
