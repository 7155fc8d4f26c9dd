# SPDX-License-Identifier: Apache-2.0
"""Hidden states that wait between two layers, of every batch, in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..models.batches import Batch
from ..models.transfers import Carrier
from ..storage.growing import Store
from ..storage.tensor_files import Shapes, shapes_bytes


class States:
    """The hidden states between two layers, of every batch, and what was chosen in the last MoE layer.

    With a folder there are two files: a layer reads one and writes the other, so that the one it began with is whole
    until the layer is finished.

    Args:
        store: Where they are.
        shapes: Of each batch's (:func:`state_shapes`).
        carrier: What brings them to the device and back.
        name: Of the files.
    """

    def __init__(self, store: Store, shapes: Shapes, carrier: Carrier, name: str = "states") -> None:
        self._store = store
        self._name = name
        self._shapes = shapes
        self._carrier = carrier
        self._last = sum(name.startswith("hidden_") for name in shapes) - 1
        self._files: list[Mapping[str, Tensor]] = []
        self._from = self._to = 0
        self._coming: Iterator[Tensor] = iter(())

    @property
    def nbytes(self) -> int:
        """What one file takes."""
        return shapes_bytes(self._shapes)

    def begin(self, embedded: Iterable[Tensor]) -> None:
        """Make room, and fill in what goes into the first layer."""
        copies = 1 if self._store.folder is None else 2
        self._files = [self._store.tensors(self._file(copy), self._shapes) for copy in range(copies)]
        for number, hidden in enumerate(embedded):
            self._carrier.put(hidden, self._files[0][f"hidden_{number}"])
        self._carrier.finish()

    def open(self) -> None:
        """Take up what an interrupted run left."""
        self._files = [self._store.tensors(self._file(copy), self._shapes, keep=True) for copy in range(2)]

    def whole(self, index: int) -> list[str]:
        """The file with what goes into a layer."""
        return [self._file(index % len(self._files))]

    def turn(self, index: int, first: int = 0) -> None:
        """Go on to a layer, from one of the batches on."""
        self._from, self._to = index % len(self._files), (index + 1) % len(self._files)
        held = self._files[self._from]
        self._coming = self._carrier.each(held[f"hidden_{number}"] for number in range(first, self._last + 1))

    def hidden(self) -> Tensor:
        """The state that goes into the layer, where the layer is; asked for one after another."""
        return next(self._coming)

    def chosen(self, number: int) -> Tensor:
        """The experts chosen in the MoE layer before ``(T, K)``."""
        return self._files[self._from].get(f"chosen_{number}", torch.zeros(0))

    def put(self, number: int, hidden: Tensor | None = None, chosen: Tensor | None = None) -> None:
        """Store what came out of the layer, what it chose, or both; with the last batch all of it is there."""
        if hidden is not None:
            self._carrier.put(hidden, self._files[self._to][f"hidden_{number}"])
        if chosen is not None and f"chosen_{number}" in self._shapes:
            self._carrier.put(chosen, self._files[self._to][f"chosen_{number}"])
        if number == self._last:
            self._carrier.finish()

    def change(self, number: int, change: Callable[[Tensor], Tensor]) -> None:
        """Store something else than what came out of the layer for a batch, made of that."""
        self._carrier.finish()
        held = self._files[self._to][f"hidden_{number}"]
        self._carrier.put(change(held.clone()), held)
        self._carrier.finish()

    def _file(self, copy: int) -> str:
        return f"{self._name}_{copy}.safetensors"


def state_shapes(
    batches: Sequence[Batch], state_shape: Callable[[Batch], tuple[tuple[int, ...], torch.dtype]], top_k: int | None
) -> Shapes:
    """Names, shapes and dtypes of the states of batches, and of the choice of the last MoE layer where it is kept."""
    shapes: Shapes = {}
    for number, batch in enumerate(batches):
        shapes[f"hidden_{number}"] = state_shape(batch)
        if top_k is not None:
            shapes[f"chosen_{number}"] = ((int(batch.attention_mask.sum()), top_k), torch.int64)
    return shapes
