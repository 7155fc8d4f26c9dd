# SPDX-License-Identifier: Apache-2.0
"""The numbers that MLX's quantised weights stand for, of one matrix: needed of routers alone, to know them again.

Bits are packed into whole words, the first number in the lowest bits, without gaps. How many bits and what groups
follows from the shapes, as mlx-lm tells it where ``config.json`` does not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...checkpoints.dequantise import four_bits, scaled


def dequantised(
    weight: Tensor, scales: Tensor, biases: Tensor | None, columns: int, whole: Tensor | None = None
) -> Tensor:
    """A quantised matrix in float32.

    Args:
        weight: Words ``(R, C * bits / 32)``.
        scales: One per row and group ``(R, C / group)``; floats where the mode is affine, else bytes.
        biases: What affine groups are shifted by.
        columns: C.
        whole: Of nvfp4, the largest number of the whole matrix, where scales are relative to it.

    Raises:
        ValueError: If it is in no way that MLX quantises.
    """
    packed = weight.contiguous().view(torch.uint8)
    bits, rest = divmod(packed.shape[-1] * 8, columns)
    group, over = divmod(columns, scales.shape[-1])
    if rest or over or not 1 < bits <= 8:
        raise ValueError(f"{tuple(weight.shape)} words and {tuple(scales.shape)} scales are no {columns} columns")
    if scales.is_floating_point():
        if biases is None:
            raise ValueError("scales without biases")
        numbers = torch.from_numpy(_unpacked(packed.numpy(), bits, columns))
        return (numbers.unflatten(-1, (-1, group)) * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)
    if (bits, group) == (4, 32):
        return four_bits(packed, scales)
    if (bits, group) == (8, 32):
        return scaled(packed.view(torch.float8_e4m3fn), scales)
    if (bits, group) == (4, 16):
        factor = None if whole is None else whole.float().reshape(()) / (6 * 448)  # the largest of e2m1 and e4m3
        return four_bits(packed, scales.view(torch.float8_e4m3fn), factor)
    raise ValueError(f"{bits} bits in groups of {group}")


def _unpacked(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Whole numbers from a stream of bits ``(R, C * bits / 8)``, as float32."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(len(packed), columns, bits)
    return stream.astype(np.float32) @ (2.0 ** np.arange(bits, dtype=np.float32))
