# SPDX-License-Identifier: Apache-2.0
"""Outputs of single experts, the chosen ones or all, and what follows from them.

On a processor experts run a few at a time, as many as have outputs that stay in its cache: what is made of these then
costs next to nothing, and there is no copy of all rows.

Shapes: E experts, n tokens, K top_k, H hidden size.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from ..models.devices import free_bytes, has_own_memory
from ..models.experts import ExpertsForward

_CACHED_BYTES = 8 * 2**20  # outputs of a call on a processor, which stay in its cache
_LEAST_BYTES = 64 * 2**20  # of a chunk's outputs, where a plain forward has less
_SHARE_OF_FREE = 16  # a chunk's outputs take at most one part in so many of what is free


def chunk_size(rows: int, num_experts: int, hidden_size: int, itemsize: int, device: torch.device) -> int:
    """How many tokens run through all experts at once.

    As many outputs as the plain forward of the batch holds cost it no memory that it had not needed.

    Args:
        rows: Rows ``T K`` that the batch's plain forward runs through experts.
        num_experts: E.
        hidden_size: H.
        itemsize: Bytes of a number.
        device: Where.
    """
    nbytes = max(rows * hidden_size * itemsize, _LEAST_BYTES)
    if device.type == "cpu":
        nbytes = min(nbytes, 2 * _LEAST_BYTES)
    elif has_own_memory(str(device)):
        nbytes = min(nbytes, free_bytes(str(device)) // _SHARE_OF_FREE)
    return max(1, nbytes // (num_experts * hidden_size * itemsize))


def chosen_experts(own: ExpertsForward, x: Tensor, chosen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs of the chosen experts ``(n, K, H)``, and their sizes (:func:`sizes_of`).

    Args:
        own: The experts' forward.
        x: What goes into it ``(n, ...)``.
        chosen: Ids of the experts ``(n, K)``.
        dtype: Of the weights that it is called with.
    """
    top_k = chosen.shape[1]
    if x.device.type != "cpu":
        one = torch.ones(chosen.numel(), 1, dtype=dtype, device=x.device)
        y = own(x.repeat_interleave(top_k, dim=0), chosen.reshape(-1, 1), one).view(*chosen.shape, -1)
        return y, sizes_of(y)
    ids, order = chosen.flatten().sort(stable=True)
    one = torch.ones(len(ids), 1, dtype=dtype)
    sizes = torch.empty(2, len(ids))
    outputs: Tensor | None = None
    most, begin, before = max(1, _CACHED_BYTES // (x.shape[1] * x.element_size())), 0, 0
    for end in [*ids.bincount().cumsum(0).tolist(), -1]:  # where an expert's rows end
        if begin < before and (end < 0 or end - begin > most):
            slots = order[begin:before]
            y = own(x[slots // top_k], ids[begin:before, None], one[begin:before])
            if outputs is None:
                outputs = y.new_empty(len(ids), y.shape[1])
            outputs.index_copy_(0, slots, y)
            sizes[:, slots] = sizes_of(y)
            begin = before
        before = end
    assert outputs is not None
    return outputs.view(*chosen.shape, -1), sizes.view(2, *chosen.shape)


def every_expert(own: ExpertsForward, x: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Outputs of all experts ``(E, n, H)``, in as few calls of the model's own experts as the device likes.

    Args:
        own: The experts' forward.
        x: What goes into it ``(n, ...)``.
        num_experts: E.
        dtype: Of the weights that it is called with.
    """
    count = len(x)
    at_once = num_experts
    if x.device.type == "cpu":
        at_once = max(1, _CACHED_BYTES // (count * x.shape[1] * x.element_size()))
    calls = []
    for experts in torch.arange(num_experts, device=x.device).split(at_once):
        rows = x.expand(len(experts), *x.shape).reshape(-1, x.shape[1])
        ids = experts.repeat_interleave(count)[:, None]
        calls.append(own(rows, ids, torch.ones(ids.shape, dtype=dtype, device=x.device)))
    return (calls[0] if len(calls) == 1 else torch.cat(calls)).view(num_experts, count, -1)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products ``(n, A, B)`` of vectors ``(n, A, H)`` and ``(n, B, H)``.

    Summed in float32 or better whatever the process allows elsewhere: on CUDA float32 products may silently be TF32.
    """
    b = b.transpose(1, 2)
    kind = a.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        if kind != "cuda":
            return a.float() @ b.float()
        if a.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.bmm, "dtype"):
            return torch.bmm(a, b, out_dtype=torch.float32)  # since torch 2.8
        return (a.double() @ b.double()).float()


def lone_errors(
    norm: Tensor, partial: Tensor, routed: Tensor, chosen: Tensor, weight: Tensor, lone: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Squared errors of a layer with one expert alone, and its squared output.

    With :math:`F = \sum_k w_k f_k` it is :math:`\|a f_e - F\|^2 = a^2 \|f_e\|^2 - 2 a \sum_k w_k f_e \cdot f_k +
    \|F\|^2`. Where e is one of the chosen the terms may cancel, so that these are calculated as they stand.

    Args:
        norm: Of each expert's output ``(n, E)``.
        partial: Products of outputs and those of the chosen ``(n, E, K)``.
        routed: Outputs of the chosen ``(n, K, H)``.
        chosen: Their ids ``(n, K)``.
        weight: Their weights ``(n, K)``.
        lone: The weight :math:`a` of an expert alone ``(n, E)``.

    Returns:
        ``(n, E)`` and ``(n, 1)``, float32.
    """
    wide = torch.float32 if norm.device.type == "mps" else torch.float64  # which it lacks
    output = (routed.float() * weight[..., None].float()).sum(1)
    energy = output.square().sum(-1, keepdim=True)
    cross = (partial * weight[:, None].to(wide)).sum(-1)
    a = lone.to(wide)
    error = ((a * norm).square() - 2 * a * cross + energy).clamp_(min=0).float()
    of_chosen = (routed.float() * lone.gather(1, chosen)[..., None] - output[:, None]).square().sum(-1)
    return error.scatter_(1, chosen, of_chosen), energy


def triangle(num_experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of an upper triangle."""
    rows, columns = torch.triu_indices(num_experts, num_experts, device=device)
    return rows, columns


def sizes_of(y: Tensor) -> Tensor:
    """Norm and largest absolute element of outputs ``(..., H)``: ``(2, ...)`` float32."""
    norm = torch.linalg.vector_norm(y, dim=-1, dtype=torch.float32)
    if y.device.type == "cpu":  # there a quarter of the time that the next line takes
        return torch.stack([norm, torch.maximum(y.amax(-1), -y.amin(-1)).float()])
    return torch.stack([norm, torch.linalg.vector_norm(y, ord=math.inf, dim=-1, dtype=torch.float32)])


def weighted_sum(y: Tensor, weight: Tensor) -> Tensor:
    """The experts' output ``(T, H)`` from ``(T, K, H)`` and ``(T, K)``, rounded as transformers rounds."""
    if y.dtype == weight.dtype == torch.float32 and y.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return (weight[:, None] @ y)[:, 0]  # the same in a fifth of the time
    return (y * weight[..., None]).sum(1).to(y.dtype)
