# SPDX-License-Identifier: Apache-2.0
"""A tensor of a layer where it lies on disk, for what reads only some rows or entries of it.

Of the largest statistics (Gram matrices of many experts take gigabytes a layer) no method reads all. A mapped tensor
is the file's pages: the system reads those that are touched, and takes them back when memory is short.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..storage.tensor_files import map_tensor
from .files import LayerFile


def mapped(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A layer's tensor, not to be written to: of statistics in a folder the file's pages, of others as they have it.

    Raises:
        RequestError: If its file is missing, truncated or damaged.
    """
    if isinstance(tensors, LayerFile) and name in tensors.names:
        return map_tensor(tensors.path, name)
    return tensors[name]
