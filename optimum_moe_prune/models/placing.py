# SPDX-License-Identifier: Apache-2.0
"""From a value of a parameter to the tensors of files that it is loaded from: transformers' mapping, the other way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoints.plain import Plain
from ..compat import WeightNames
from ..errors import RequestError


class MadeOf(Protocol):
    """What a parameter is made of (``skeleton.Weights.sources``)."""

    converter: Any
    first: str

    @property
    def tensors(self) -> Mapping[str, list[str]]: ...

    @property
    def names(self) -> list[str]: ...

    @property
    def by_expert(self) -> bool: ...


def in_files(name: str, value: Tensor, source: MadeOf, names: WeightNames, plain: Plain) -> dict[str, Tensor]:
    """The tensors of a checkpoint that make a value of a parameter, as the files hold them.

    Args:
        name: Of the parameter.
        value: What it is to be.
        source: What it is made of.
        names: The model's own mapping.
        plain: The checkpoint's tensors.

    Raises:
        RequestError: If transformers makes the parameter in a way that cannot be undone here.
    """
    if source.converter is None:
        return {source.names[0]: value}
    if len(source.tensors) == 1:
        ((pattern, held),) = source.tensors.items()
        if source.by_expert:
            return dict(zip(held, value, strict=True))
        shape = plain.tensors[held[0]].shape
        if len(held) == 1 and value.ndim == len(shape) == 3:  # by where its rows go: some turn what does not fit
            rows = torch.arange(shape[1]).remainder(251).to(torch.uint8).view(1, -1, 1).expand(shape)
            made = names.converted(name, source.converter, {pattern: [rows]}, source.first)
            for turned in (value, value.mT):
                if torch.equal(made, rows if turned is value else rows.mT):
                    return {held[0]: turned}
    raise RequestError(
        f"{name} is made of {', '.join(source.names[:2])}{' ...' if len(source.names) > 2 else ''} in a way that "
        "cannot be written back; load the model and recover it in memory."
    )
