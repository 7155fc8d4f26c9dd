# SPDX-License-Identifier: Apache-2.0
"""Recovered weights put where they belong: into a model in memory, or into the files of a pruned checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.layout import open_layout
from ..errors import RunError
from ..models.memory import Compute, open_skeleton
from ..progress import working
from ..storage.tensor_files import TORCH_DTYPES, all_finite

_PIECE = 64 * 2**20  # bytes written at once


def put_into_model(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a pruned model other values of some parameters, or, if that is interrupted, none.

    Args:
        model: A causal language model in memory.
        weights: By name of the parameter.

    Returns:
        What they were, by name, on the processor.
    """
    parameters = dict(model.named_parameters())
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            for name, value in weights.items():
                before[name] = parameters[name].detach().to("cpu", copy=True)
                parameters[name].copy_(value)
        except BaseException:
            for name, value in before.items():
                parameters[name].copy_(value)
            raise
    return before


def put_into_files(folder: str | os.PathLike, weights: Mapping[str, Tensor]) -> None:
    """Write other values of some parameters over those in a pruned checkpoint's files.

    It is for a folder that nobody else reads yet, as what is written lies in files that are there.

    Args:
        folder: The pruned checkpoint.
        weights: By name of the parameter in the pruned model; fused experts as transformers has them.

    Raises:
        RequestError: If a parameter is made of the files' tensors in a way that cannot be undone.
        RunError: If a value is NaN or infinite, or something cannot be written.
    """
    if not weights:
        return
    skeleton = open_skeleton(open_layout(str(folder)), Compute("auto", "cpu"))
    checkpoint = skeleton.checkpoint
    with working("writing recovered weights", sum(value.nbytes for value in weights.values()), "B", "wrote") as work:
        for parameter, value in weights.items():
            for name, tensor in skeleton.placed({parameter: value}).items():
                held = checkpoint.tensors[name]
                if tuple(tensor.shape) != held.shape:
                    raise RunError(f"{name} has shape {held.shape} in {folder}, and was recovered as {tensor.shape}.")
                entry, path = checkpoint.entry(name), Path(folder) / held.file
                own = tensor.detach().cpu().to(TORCH_DTYPES[held.dtype]).contiguous()
                if not all_finite(own):
                    raise RunError(f"{name} was recovered as NaN or infinite.")
                try:
                    with open(path, "r+b") as file:
                        file.seek(entry.begin)
                        for piece in _bytes_of(own):
                            file.write(piece)
                except OSError as error:
                    raise RunError(f"{path} cannot be written: {error}.") from error
                work.update(tensor.nbytes)


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.reshape(-1).view(torch.uint8)
    for piece in flat.split(_PIECE):
        yield piece.numpy().data
