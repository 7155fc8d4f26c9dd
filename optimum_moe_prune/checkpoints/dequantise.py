# SPDX-License-Identifier: Apache-2.0
"""The numbers that quantised weights stand for: one function per number format, of one matrix.

transformers has code of its own for some of these, private, for whole models, and each with a flaw here: that for fp8
takes no matrix whose sides are no multiples of the blocks (DeepSeek-V3 has such), that for compressed-tensors needs
that package, and for NVFP4 as ModelOpt writes it there is none. All is calculated in float32 and rounded once, when
the caller makes another dtype of it. A scale may come as a number, as one per row, or as a grid of one per block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Block = tuple[int, int]
"""Rows and columns that share a scale."""

_E2M1 = [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
_PAIRS = torch.tensor([[_E2M1[byte % 16], _E2M1[byte // 16]] for byte in range(256)])
_POWERS = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [math.nan])


def scaled(weight: Tensor, scale: Tensor, blocks: Iterable[Block] = ()) -> Tensor:
    """Eight bits per weight, of floating point or whole numbers: ``fp8`` (DeepSeek, Qwen, MiniMax), ``mxfp8``, int8.

    Args:
        weight: ``(R, C)``.
        scale: A number, ``(R,)``, ``(R, 1)``, or one per block; powers of two may be given by their exponent.
        blocks: As for :func:`block_of`.
    """
    return weight.float().mul_(spread(factors(scale), tuple(weight.shape), blocks))


def four_bits(packed: Tensor, scale: Tensor, whole: Tensor | None = None) -> Tensor:
    """Floats of four bits (e2m1), two in a byte, the lower half first: NVFP4, and the experts of DeepSeek-V4.

    Args:
        packed: Bytes ``(R, C / 2)``, or ``(R / 2, C)`` where pairs lie in columns.
        scale: One per group of the packed dimension: ``(R, C / group)``, or ``(R / group, C)``.
        whole: Of NVFP4, the factor of all scales.
    """
    if packed.shape[-1] == scale.shape[-1]:
        return four_bits(packed.mT, scale.mT, whole).mT
    grid = factors(scale) if whole is None else factors(scale) * whole.float()
    return _pairs(packed).unflatten(-1, (grid.shape[-1], -1)).mul_(grid.unsqueeze(-1)).flatten(-2)


def in_blocks(blocks: Tensor, scale: Tensor) -> Tensor:
    """MXFP4 as gpt-oss has it; transformers' parameters are the transpose of what is in files.

    Args:
        blocks: Bytes of floats of four bits ``(R, C / 32, 16)``.
        scale: Exponents of powers of two, plus 127 ``(R, C / 32)``.

    Returns:
        ``(C, R)``.
    """
    return _pairs(blocks).mul_(factors(scale).unsqueeze(-1)).flatten(-2).mT


def whole_numbers(packed: Tensor, scale: Tensor, bits: int, columns: int, blocks: Iterable[Block] = ()) -> Tensor:
    """Whole numbers packed into int32, the first one in the lowest bits: ``pack-quantized`` of compressed-tensors.

    They are symmetric: zero is the middle of what the bits can hold.

    Args:
        packed: ``(R, C * bits / 32)``, rounded up.
        scale: One per row, or per row and group.
        bits: Of a number, 4 or 8.
        columns: C.
        blocks: As for :func:`block_of`.
    """
    places = torch.arange(0, 32, bits, dtype=torch.int32, device=packed.device)
    values = ((packed.unsqueeze(-1) >> places) & (2**bits - 1)).flatten(-2)[..., :columns]
    return scaled(values - 2 ** (bits - 1), scale, blocks)


def factors(scale: Tensor) -> Tensor:
    """Scales as float32; bytes are exponents of powers of two, plus 127 (e8m0)."""
    if scale.dtype == torch.uint8 or str(scale.dtype) == "torch.float8_e8m0fnu":  # torch 2.6 does not have it
        return _POWERS.to(scale.device)[scale.view(torch.uint8).long()]
    return scale.float()


def spread(scale: Tensor, shape: tuple[int, ...], blocks: Iterable[Block] = ()) -> Tensor:
    """A scale that can be multiplied with a matrix of a shape.

    Raises:
        ValueError: If it does not fit.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    block = block_of(shape, tuple(scale.shape), blocks)
    if block is None:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} does not fit weights of shape {shape}")
    scale = scale.unsqueeze(-1) if scale.dim() == 1 else scale
    for dim, length in enumerate(block):
        if scale.shape[dim] > 1 and length > 1:
            scale = scale.repeat_interleave(length, dim).narrow(dim, 0, shape[dim])
    return scale


def block_of(shape: tuple[int, ...], scale: tuple[int, ...], blocks: Iterable[Block] = ()) -> Block | None:
    """The rows and columns that share one of the scales of a matrix, or None if they do not fit it.

    Args:
        shape: Of the matrix.
        scale: Shape of its scales.
        blocks: Sizes that the checkpoint's config names; the last ones of a matrix may be cut. Else all are equal.
    """
    grid = (*scale, 1)[:2]
    if len(scale) > 2 or not scale or 0 in grid:
        return None
    for block in blocks:
        if all(math.ceil(length / size) == count for length, size, count in zip(shape, block, grid, strict=True)):
            return block
    if any(length % count for length, count in zip(shape, grid, strict=True)):
        return None
    return shape[0] // grid[0], shape[1] // grid[1]


def _pairs(packed: Tensor) -> Tensor:
    """Bytes ``(..., n)`` as the floats of four bits in them ``(..., 2 n)``."""
    places = packed.contiguous().view(torch.uint8).flatten().int()
    return _PAIRS.to(packed.device).index_select(0, places).reshape(*packed.shape[:-1], -1)
