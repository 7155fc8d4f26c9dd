# SPDX-License-Identifier: Apache-2.0
"""The tensors of a layer where they lie: in a file of their own, or in several that are read as one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..storage.tensor_files import TORCH_DTYPES, MappedTensors, Shapes, read_header, read_tensors
from .needs import IN_FORMAT_1, Need, names_of_format


def layer_file(index: int) -> str:
    """The name of the file with a layer's statistics."""
    return f"layer_{index:05d}.safetensors"


def names_of_format_1(needs: Iterable[Need], path: Path) -> tuple[str, ...]:
    """The names of the tensors in a layer's file of format 1.

    Raises:
        RequestError: If the file is missing or damaged.
    """
    there, _ = read_header(path)
    may_lack = set(IN_FORMAT_1.values())
    return tuple(name for name in names_of_format(1, needs) if name in there or name not in may_lack)


class LayerFile(Mapping[str, Tensor]):
    """The tensors of one layer's file, each read when it is asked for and not kept.

    Attributes:
        path: The file.
        names: Of its tensors.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return read_tensors(self.path, [name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shapes(self) -> Shapes:
        """Shape and dtype of each tensor, without reading them.

        Raises:
            RequestError: If the file is missing or damaged.
        """
        entries, _ = read_header(self.path)
        return {name: (entries[name].shape, TORCH_DTYPES[entries[name].dtype]) for name in self.names}


class MergedTensors(Mapping[str, Tensor]):
    """Rows of the tensors of several statistics, put together when they are asked for and not kept.

    Args:
        parts: The tensors of each.
        rows: For each name the rows to take, ``(rows,)`` int64, counted through the parts; None where every part
            holds the same, and one is taken.
        sums: For names of which nothing is taken, as it follows from another tensor: that one's name, and how.
    """

    def __init__(
        self,
        parts: Sequence[Mapping[str, Tensor]],
        rows: Mapping[str, Tensor | None],
        sums: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {},
    ) -> None:
        self.parts = parts
        self._rows = rows
        self._sums = sums

    def __getitem__(self, name: str) -> Tensor:
        if name in self._sums:
            source, made = self._sums[name]
            values = made(self[source])
            return values.expand(-1, *tensor_shapes(self.parts[0])[name][0][1:]).contiguous()
        rows, merged, first = self._rows[name], None, 0
        if rows is None:
            return self.parts[0][name]
        for part in self.parts:
            tensor = part[name]
            if merged is None:
                merged = tensor.new_empty(len(rows), *tensor.shape[1:])
            mine = (rows >= first) & (rows < first + len(tensor))
            merged[mine] = tensor[rows[mine] - first]
            first += len(tensor)
        assert merged is not None
        return merged

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def shapes(self) -> Shapes:
        """Shape and dtype of each tensor, without reading them."""
        first = tensor_shapes(self.parts[0])
        return {
            name: first[name] if rows is None else ((len(rows), *first[name][0][1:]), first[name][1])
            for name, rows in self._rows.items()
        }

    def files(self) -> set[Path]:
        """The files that are read."""
        merged = [part.files() for part in self.parts if isinstance(part, MergedTensors)]
        return {part.path for part in self.parts if isinstance(part, LayerFile)}.union(*merged)


def tensor_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Shape and dtype of each of a layer's tensors; those in files are not read."""
    if isinstance(tensors, (LayerFile, MergedTensors)):
        return tensors.shapes()
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def save_layer(tensors: Mapping[str, Tensor], names: Iterable[str], path: Path) -> None:
    """Write a layer's statistics: the file they live in under another name, or a copy, tensor by tensor."""
    if isinstance(tensors, MappedTensors) and tensors.path.name == path.name and tensors.path.is_file():
        with contextlib.suppress(OSError):  # another disk, or a system without links
            os.link(tensors.path, path)
            return
    shapes = tensor_shapes(tensors)
    written = MappedTensors.create(path, {name: shapes[name] for name in names})
    for name, tensor in written.items():
        tensor.copy_(tensors[name])
