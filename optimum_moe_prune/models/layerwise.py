# SPDX-License-Identifier: Apache-2.0
"""A model run one decoder layer at a time, through its own forward: any layer on any hidden states.

Masks and positions come from the model's own forward, run for every batch with only that layer real. The model may be
in memory (``LayerByLayer``) or on disk (``skeleton.Skeleton``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch
from .blocks import moe_blocks
from .checks import evaluating, input_device

_HEAD = -1  # in place of a layer's index: only what comes after the layers is run


class LayerByLayer:
    """Runs single decoder layers of a causal language model.

    Args:
        model: The model.
        device: Where its inputs go; by default where its embeddings are.

    Attributes:
        streams: Whether a layer has to be read before it can run, so that it should serve all batches at once.
        blocks: The MoE blocks.
        num_layers: Decoder layers.
        dtype: The precision of its hidden states.
    """

    streams = False

    def __init__(self, model: Any, device: torch.device | None = None) -> None:
        self.model = model
        self.blocks = moe_blocks(model)
        self.device = input_device(model) if device is None else device
        self.dtype: torch.dtype = model.dtype
        self._layers: Sequence[nn.Module] = attrgetter(self.blocks[0].spec.layers)(model)
        self.num_layers = len(self._layers)
        self._active: int | None = None
        self._input = self._output = torch.empty(0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have the layers stand in for themselves inside a ``with``; nothing else of the model's may run there."""
        before = [layer.__dict__.get("forward") for layer in self._layers]  # hooks of accelerate live there as well
        try:
            with torch.no_grad(), evaluating(self.model):
                for index, layer in enumerate(self._layers):
                    layer.forward = self._standing_in(index, layer.forward)
                yield
        finally:
            for layer, forward in zip(self._layers, before, strict=True):
                if forward is not None:
                    layer.forward = forward
                elif "forward" in layer.__dict__:
                    del layer.forward

    def prepare(self) -> None:
        """Load what stands beside the layers, but the embeddings and the head."""

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[Callable[[int], None]]:
        """A function that begins to read a layer that will be loaded soon, inside a ``with``."""
        yield lambda index: None

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """A decoder layer with its parameters, inside a ``with``."""
        yield

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """What comes after the layers, with its parameters, inside a ``with``."""
        yield

    def embedded(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """What goes into the first layer, of each batch ``(B, L, H)``."""
        self._active = None
        for batch in batches:
            self._decoder(batch, input_ids=batch.input_ids.to(self.device))
            yield self._output

    def forward(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """What comes out of a loaded layer ``(B, L, H)``."""
        self._active, self._input = index, hidden.to(self.device)
        self._decoder(batch, inputs_embeds=self._input)
        output, self._input, self._output = self._output, torch.empty(0), torch.empty(0)
        return output

    def logits(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The model's logits ``(B, L, V)`` for what came out of the last layer, inside :meth:`head`."""
        self._active, self._input = _HEAD, hidden.to(self.device)
        options = {"output_router_logits": False} if hasattr(self.model.config, "output_router_logits") else {}
        mask = batch.attention_mask.to(self.device)
        output = self.model(inputs_embeds=self._input, attention_mask=mask, use_cache=False, **options)
        self._input = torch.empty(0)
        return output.logits

    def _decoder(self, batch: Batch, **inputs: Tensor) -> None:
        self.model.base_model(attention_mask=batch.attention_mask.to(self.device), use_cache=False, **inputs)

    def _standing_in(self, index: int, real: Any) -> Any:
        """A layer's forward that does something for the layer at work only, and hands on what it got."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._active == index:
                output = real(self._input, *args, **kwargs)
                self._output = output if isinstance(output, Tensor) else output[0]
            elif self._active is None and index == 0:
                self._output = hidden_states
            elif self._active == _HEAD and index == self.num_layers - 1:
                return self._input
            return hidden_states

        return forward
