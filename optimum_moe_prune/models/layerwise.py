# SPDX-License-Identifier: Apache-2.0
"""A model run one decoder layer at a time, through its own forward: any layer on any hidden states.

Masks and positions come from the model's own forward, run for every batch with only that layer real. The model may be
in memory (``LayerByLayer``) or on disk (``skeleton.Skeleton``).

What goes from layer to layer is one tensor, the *state*: the hidden states as they are, or, where layers also hand on
which positions they looked at, bytes of both.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import text_config
from ..errors import RequestError
from ..storage.values import Json
from .batches import Batch
from .blocks import decoder_layers, decoder_of, model_facts, moe_blocks
from .checks import evaluating, input_device
from .precision import dtype_of_weights
from .transfers import sent
from .widened import widened

_HEAD = -1  # in place of a layer's index: only what comes after the layers is run
_HANDED_ON = "prev_topk_indices"  # what layers with sparse attention take of the one before


_NEEDS_NO_LAYERS = (
    "layer at a time, which measuring and gathering gradients do; choose by a method that needs neither."
)


class _LayerRan(Exception):
    """The layer at work has run: what comes after it in the model's forward is not needed."""


class LayerByLayer:
    """Runs single decoder layers of a causal language model.

    Args:
        model: The model.
        device: Where its inputs go; by default where its embeddings are.
        dtype: The precision to calculate in, where it is wider than the model's (``widened``).

    Attributes:
        streams: Whether a layer has to be read before it can run, so that it should serve all batches at once.
        blocks: The MoE blocks.
        num_layers: Decoder layers.
        dtype: The precision of its hidden states.
        checkpoint_dtype: The precision of its weights, before they are widened.
    """

    streams = False

    def __init__(self, model: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.blocks = moe_blocks(model)
        self.device = input_device(model) if device is None else device
        self.dtype: torch.dtype = model.dtype if dtype is None else dtype
        self.checkpoint_dtype = dtype_of_weights(model)
        self._layers: Sequence[nn.Module] = list(decoder_layers(model))
        self._run_decoder = decoder_of(model)
        self.num_layers = len(self._layers)
        # Code that is not of transformers may return tuples; it is known when a layer has run.
        self._in_tuples = not type(self._layers[0]).__module__.startswith("transformers.models.")
        self._hands_on = _HANDED_ON in inspect.signature(type(self._layers[0]).forward).parameters
        self._handed_on: dict[int, bool] = {}  # to which layers the ones before hand on positions
        self._inner: tuple[int, ...] | None = None  # the shape of a position's hidden states
        self._active: int | None = None
        self._batch: tuple[Batch, list[Tensor]] | None = None
        self._input = self._output = torch.empty(0)
        self._filler = 0.0  # what stands for hidden states of layers that are not at work
        self._extra: Tensor | None = None
        self._extra_out: Tensor | None = None
        self._seen: list[Tensor] | None = None
        self._is_layerwise = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Have the layers stand in for themselves inside a ``with``; nothing else of the model's may run there."""
        embeddings = self.model.get_input_embeddings()
        modules = [*self._layers, embeddings]
        with widened(self.model, self.dtype), torch.no_grad(), evaluating(self.model):
            before = [module.__dict__.get("forward") for module in modules]  # hooks of accelerate live there as well
            try:
                for index, layer in enumerate(self._layers):
                    layer.forward = self._standing_in(index, layer.forward)
                embeddings.forward = self._embedding(embeddings.forward)
                yield
            finally:
                for module, forward in zip(modules, before, strict=True):
                    if forward is not None:
                        module.forward = forward
                    elif "forward" in module.__dict__:
                        del module.forward

    def prepare(self) -> None:
        """Load what stands beside the layers, but the embeddings and the head."""

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[Callable[[int], None]]:
        """A function that begins to read a layer that will be loaded soon, inside a ``with``."""
        yield lambda index: None

    @property
    def is_at_hand(self) -> bool:
        """Whether all of it can be looked at before any layer runs."""
        return True

    def facts(self) -> Json:
        """What statistics and plans remember of it."""
        return model_facts(self.model)

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """A decoder layer with its parameters, inside a ``with``."""
        yield

    @contextlib.contextmanager
    def embeddings(self) -> Iterator[None]:
        """The embeddings, inside a ``with``."""
        yield

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """What comes after the layers, with its parameters, inside a ``with``."""
        yield

    def embedded(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """What goes into the first layer: the state of each batch ``(B, L, ...)``."""
        for batch in batches:
            self._active = None
            self._decoder(batch)
            self._inner = tuple(self._output.shape[2:])
            yield self._packed(self._output, None)

    def state_shape(self, batch: Batch) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a batch's state; inside :meth:`running`, after :meth:`prepare`."""
        if self._inner is None:
            self._active, self._input = 0, torch.empty(0)
            self._seen = []
            with contextlib.suppress(_LayerRan):
                self._call(batch)
            self._inner, self._seen = tuple(self._output.shape[2:]), None
        shape = tuple(batch.input_ids.shape)
        if not self._hands_on:
            return (*shape, *self._inner), self.dtype
        hidden = self.dtype.itemsize * int(torch.tensor(self._inner).prod())
        return (*shape, hidden + 4 * self._positions(shape[1])), torch.uint8

    def hidden_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of the hidden states in a batch's state, likewise."""
        self.state_shape(batch)
        assert self._inner is not None
        return (*batch.input_ids.shape, *self._inner)

    def random_state(self, batch: Batch) -> Tensor:
        """A state of normal hidden states; inside :meth:`running`, after :meth:`prepare`."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.hidden_shape(batch), generator=generator)
        return self._packed(hidden.to(self.dtype), None)

    def forward(self, index: int, batch: Batch, state: Tensor) -> Tensor:
        """The state that comes out of a loaded layer."""
        self._run_layer(index, batch, *self._unpacked(self._there(state), index))
        output = self._packed(self._output, self._extra_out)
        self._input, self._output, self._extra = torch.empty(0), torch.empty(0), None
        return output

    def traced(self, index: int, batch: Batch, state: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states that go into a loaded layer, and those that come out, with the gradients between them."""
        hidden, extra = self._unpacked(self._there(state), index)
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            self._run_layer(index, batch, leaf.clone(), extra)  # a layer may write into what it is given
        output = self._output
        self._input, self._output, self._extra = torch.empty(0), torch.empty(0), None
        return leaf, output

    def _run_layer(self, index: int, batch: Batch, hidden: Tensor, extra: Tensor | None) -> None:
        if index > 0 and not self._is_layerwise:
            self._check_layerwise(index, batch)
        self._active = index
        self._input, self._extra, self._extra_out = hidden, extra, None
        self._decoder(batch)

    def hidden_of(self, state: Tensor) -> Tensor:
        """The hidden states ``(B, L, ...)`` of a state."""
        return self._unpacked(state)[0]

    def part_of(self, state: Tensor, length: int) -> Tensor:
        """The state of the first sample's first positions."""
        if not self._hands_on:
            return state[:1, :length]
        hidden, size = self._unpacked(state)[0][:1, :length], 4 * self._positions(length)
        places = state[:1, :length, -4 * self._positions(state.shape[1]) :].contiguous()[..., :size]
        return _joined(hidden, places)

    def moved(self, state: Tensor, change: Tensor) -> Tensor:
        """A state whose hidden states are changed by something of their shape."""
        if not self._hands_on:
            return (state.float() + change).to(state.dtype)
        hidden, _ = self._unpacked(state)
        size = 4 * self._positions(state.shape[1])
        return _joined((hidden.float() + change).to(hidden.dtype), state[..., -size:])

    def logits(self, batch: Batch, state: Tensor) -> Tensor:
        """The model's logits ``(B, L, V)`` for what came out of the last layer, inside :meth:`head`."""
        return self._head(batch, self._unpacked(self._there(state))[0])

    def traced_logits(self, batch: Batch, state: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states that came out of the last layer, and the logits, with the gradients between them."""
        leaf = self._unpacked(self._there(state))[0].detach().requires_grad_()
        with torch.enable_grad():
            return leaf, self._head(batch, leaf.clone())

    def _head(self, batch: Batch, hidden: Tensor) -> Tensor:
        self._active, self._input = _HEAD, hidden
        has_routers = hasattr(text_config(self.model.config), "output_router_logits")
        options = {"output_router_logits": False} if has_routers else {}
        ids, mask = self._given(batch)
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        self._input = torch.empty(0)
        return output.logits

    def last_hidden(self, batch: Batch, state: Tensor) -> Tensor:
        """What the decoder gives ``(B, L, H)`` for what came out of the last layer: after its own last norm."""
        self._active = _HEAD
        self._input, _ = self._unpacked(self._there(state))
        output = self._call(batch)
        self._active, self._input = None, torch.empty(0)
        return output.last_hidden_state

    # -- the model's own forward, with one layer at work

    def _decoder(self, batch: Batch) -> None:
        with contextlib.suppress(_LayerRan):
            self._call(batch)

    def _call(self, batch: Batch) -> Any:
        ids, mask = self._given(batch)
        return self._run_decoder(input_ids=ids, attention_mask=mask, use_cache=False)

    def _given(self, batch: Batch) -> list[Tensor]:
        """What the model is called with of a batch; the one of the last call is still there."""
        if self._batch is None or self._batch[0] is not batch:
            self._batch = (batch, [sent(tensor, self.device) for tensor in (batch.input_ids, batch.attention_mask)])
        return self._batch[1]

    def _embedding(self, real: Any) -> Any:
        """The embeddings' forward, which only counts where the state that goes into the first layer is asked for."""
        weight = self.model.get_input_embeddings().weight

        def forward(input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._active is None:
                return real(input_ids, *args, **kwargs)
            shape = (*input_ids.shape, weight.shape[1])
            return torch.full(shape, self._filler, dtype=self.dtype, device=self.device)

        return forward

    def _standing_in(self, index: int, real: Any) -> Any:
        """A layer's forward that does something for the layer at work only, and hands on what it got."""

        def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(hidden_states, tuple):  # what a layer before stood in with
                hidden_states = hidden_states[0]
            if self._active == index:
                if self._seen is not None:
                    self._output = hidden_states
                    self._seen += _tensors((args, kwargs))
                    raise _LayerRan
                output = real(self._input, *args, **kwargs)
                self._in_tuples = not isinstance(output, Tensor)
                if isinstance(output, Tensor):
                    self._output = output
                else:
                    self._output = output[0]
                    self._extra_out = output[1] if self._hands_on else None
                raise _LayerRan
            if self._active is None:
                self._output = hidden_states
                raise _LayerRan
            output = self._input if self._active == _HEAD and index == self.num_layers - 1 else hidden_states
            extra = self._extra if self._active == index + 1 else None
            if self._hands_on:
                return output, extra
            return (output,) if self._in_tuples else output

        return forward

    def _check_layerwise(self, index: int, batch: Batch) -> None:
        """Raise unless what a layer is given beside its hidden states is independent of the layers before.

        Raises:
            RequestError: If the model mixes them itself, which one layer at a time cannot follow.
        """
        given = []
        for filler in (0.25, -1.5):
            self._active, self._filler, self._seen, self._extra = index, filler, [], None
            self._decoder(batch)
            given.append(self._seen)
        self._seen, self._filler = None, 0.0
        if len(given[0]) != len(given[1]) or not all(map(torch.equal, *given)):
            raise RequestError(
                f"a {type(self.model).__name__} hands what several layers gave on to later ones; it cannot be run one "
                + ("layer at a time. Calibrate it in memory (stream=False)." if self.streams else _NEEDS_NO_LAYERS)
            )
        self._is_layerwise = True

    # -- states

    def _positions(self, length: int) -> int:
        """How many positions layers with sparse attention hand on, at most."""
        return min(int(text_config(self.model.config).index_topk), length)

    def _packed(self, hidden: Tensor, extra: Tensor | None) -> Tensor:
        if not self._hands_on:
            return hidden
        shape = hidden.shape[:2]
        places = torch.full((*shape, self._positions(shape[1])), -1, dtype=torch.int32, device=hidden.device)
        if extra is not None:
            places[..., : extra.shape[-1]] = extra
        return _joined(hidden, places.view(torch.uint8))

    def _there(self, state: Tensor) -> Tensor:
        """A state where it can be calculated with: on the card that it was calculated on, where there are several."""
        return state if state.device.type == self.device.type else state.to(self.device)

    def _unpacked(self, state: Tensor, index: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The hidden states, and the positions that the layer before handed on to one, if it did."""
        if not self._hands_on:
            return state, None
        size = 4 * self._positions(state.shape[1])
        hidden = state[..., :-size].contiguous().view(self.dtype)
        if self._inner is not None:
            hidden = hidden.view(*state.shape[:2], *self._inner)
        places = state[..., -size:].contiguous().view(torch.int32)
        if index is None:
            return hidden, None
        if index not in self._handed_on:  # it is the layer's way, whatever the batch: looked at once
            self._handed_on[index] = not bool((places < 0).all())
        return hidden, places.long() if self._handed_on[index] else None


def _joined(hidden: Tensor, places: Tensor) -> Tensor:
    """A state of hidden states ``(B, L, ...)`` and the bytes of positions that go along ``(B, L, n)``."""
    return torch.cat([hidden.reshape(*hidden.shape[:2], -1).contiguous().view(torch.uint8), places], dim=-1)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (tuple, list, type({}.values()))):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
