# SPDX-License-Identifier: Apache-2.0
"""A model on the meta device, of which one decoder layer at a time is read from the checkpoint's files and run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.layout import Layout, model_dtype
from ..checkpoints.plain import Plain
from ..compat import WeightNames, build_on_meta, initialise, keep_from_initialising, text_config
from ..errors import RequestError
from ..storage.tensor_files import TORCH_DTYPES
from ..storage.tensor_files import read_tensor as read_in_memory
from ..storage.values import Json
from .ahead import LayersAhead
from .ahead import ReadAhead as _ReadAhead
from .batches import Batch
from .layerwise import LayerByLayer
from .placing import in_files
from .transfers import copies_aside, for_each, lane_of, read_onto


def _go_on() -> None:
    """For what nobody stops."""


@dataclass
class _Source:
    """Where a parameter comes from.

    Attributes:
        converter: What makes it of its tensors, or None where it is one tensor under another name.
        first: The first of the parameters that the converter makes of them.
        tensors: Names of plain tensors, by the converter's pattern.
    """

    converter: Any
    first: str = ""
    tensors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.tensors.values() for name in names]

    @property
    def by_expert(self) -> bool:
        """Whether each expert's part can be made of that expert's tensors alone, without a second copy of all."""
        return self.converter is not None and WeightNames.stacks_experts(self.converter)


class Skeleton(LayerByLayer):
    """A model on the meta device, of which single decoder layers can be loaded and run.

    Args:
        layout: The checkpoint.
        dtype: The precision of its parameters.
        device: Where layers are loaded.
        computing: The precision to calculate in, where it is wider (``widened``).

    Attributes:
        held: The precision of its parameters.
        num_layers: Decoder layers.
        blocks: The MoE blocks.

    Raises:
        RequestError: If a tensor is missing, or has another shape than the config says.
    """

    streams = True

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        computing: torch.dtype | None = None,
    ) -> None:
        self.layout = layout
        self.checkpoint = layout.checkpoint
        self._plain = layout.plain
        model = build_on_meta(layout.config, dtype, layout.checkpoint.source.trust_remote_code)
        super().__init__(model, torch.device(device))
        self.held, self.dtype = dtype, computing or dtype
        self.checkpoint_dtype = model_dtype(layout.config, layout.checkpoint)
        self._ahead: LayersAhead | None = None
        self._layer_path = layout.structure.layers
        self._weights = Weights(self.model, layout.plain, WeightNames(self.model), self.device)
        self._parameters, self._sources = self._weights.parameters, self._weights.sources
        self._check()

    def embedded(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """As of any model; the embeddings are dropped afterwards."""
        with self.embeddings():
            yield from super().embedded(batches)

    def placed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the checkpoint that make values of parameters (:meth:`Weights.placed`)."""
        return {
            name: part for key, value in weights.items() for name, part in self._weights.placed(key, value).items()
        }

    def dtype_in_files(self, parameter: str) -> torch.dtype:
        """The precision in which the checkpoint holds a parameter."""
        return TORCH_DTYPES[self.checkpoint.tensors[self._sources[parameter].names[0]].dtype]

    @property
    def is_at_hand(self) -> bool:
        """As of any model; of one on the Hub all files would be fetched first."""
        return self.checkpoint.is_local

    def facts(self) -> Json:
        """As of any model."""
        return self.layout.facts()

    # -- loading

    def sources(self, index: int) -> list[str]:
        """The tensors in the checkpoint that a layer is made of; none beyond the last layer."""
        plain = [name for parameter in self._names_of(index) for name in self._sources[parameter].names]
        return [part for name in plain for part in self._plain.tensors[name].names]

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[Callable[[int], None]]:
        """On a card the next layer is made there as well, where there is room for two; else its bytes are read."""
        with contextlib.ExitStack() as stack:
            to_cache = stack.enter_context(_ReadAhead(self.checkpoint))
            lane = lane_of(self.device)
            if lane is not None:
                self._ahead = stack.enter_context(LayersAhead(lane, self._made_ahead))

            def begin(index: int) -> None:
                names = self._names_of(index)
                if not names:
                    return
                if self._ahead is None or not self._ahead.begin(index, names, self._weights.nbytes(names)):
                    to_cache.read(self.sources(index))

            try:
                yield begin
            finally:
                self._ahead = None

    def _made_ahead(self, names: Sequence[str], check: Callable[[], None]) -> dict[str, Tensor]:
        return dict(self._weights.made(names, check))

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """A decoder layer with its parameters, inside a ``with``."""
        layer = self._layers[index]
        try:
            values = None if self._ahead is None else self._ahead.take(index)
            if values is None:
                self._weights.load(self._names_of(index))
            else:
                self._weights.put(values)
                del values
            self._weights.init_buffers(layer)
            yield
        finally:
            layer.to("meta")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Parameters by their names in the model, which stays without them."""
        return self._weights.made(names)

    @contextlib.contextmanager
    def embeddings(self) -> Iterator[None]:
        """The embeddings, inside a ``with``."""
        embeddings = self.model.get_input_embeddings()
        try:
            self._weights.load(self._names_in(embeddings))
            yield
        finally:
            embeddings.to("meta")

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """What comes after the layers, with its parameters, inside a ``with``; tied ones are the embeddings'."""
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        try:
            names = self._names_in(head)
            if not names and not text_config(self.model.config).tie_word_embeddings:
                raise RequestError(
                    f"{self.checkpoint.name_or_path} lacks the weights of the model's head, and its config does not "
                    "say that they are the embeddings' (tie_word_embeddings); the checkpoint is damaged."
                )
            self._weights.load(names or self._names_in(embeddings))
            if not names:
                head.weight = embeddings.weight
            yield
        finally:
            head.to("meta")
            embeddings.to("meta")

    def _names_in(self, module: nn.Module) -> list[str]:
        """The parameters of a module that the checkpoint has."""
        return [name for name in self._sources if attrgetter(name.rpartition(".")[0])(self.model) is module]

    def _names_of(self, index: int) -> list[str]:
        return [name for name in self._sources if name.startswith(f"{self._layer_path}.{index}.")]

    def _check(self) -> None:
        for index in sorted({block.layer for block in self.blocks} ^ set(self.layout.layers)):
            raise RequestError(
                f"config.json says that layer {index} of {self.checkpoint.name_or_path} "
                + ("has no experts, and the files hold some." if index in self.layout.layers else "has experts, and")
                + ("" if index in self.layout.layers else " the files hold none; the checkpoint is damaged.")
            )
        used = (self._plain.tensors[name] for source in self._sources.values() for name in source.names)
        for tensor in used:
            if tensor.fault:
                raise RequestError(tensor.fault)
        backbone = f"{self.model.base_model_prefix}."
        missing = sorted(n for n in self._parameters if n.startswith(backbone) and n not in self._sources)
        if missing and self._plain.method and not self._plain.formats:
            raise RequestError(self._plain.not_read)
        if missing:
            raise RequestError(
                f"{self.checkpoint.name_or_path} lacks {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                + "; the checkpoint is damaged, or its config is of another model."
            )
        for name in self._sources:
            self._weights.check(name)

    def prepare(self) -> None:
        """Load what stands beside the layers, but the embeddings and the head."""
        backbone, layers = f"{self.model.base_model_prefix}.", f"{self._layer_path}."
        embeddings = self._names_in(self.model.get_input_embeddings())
        beside = (name for name in self._sources if name.startswith(backbone) and not name.startswith(layers))
        self._weights.load([name for name in beside if name not in embeddings])
        inside = {module for layer in self._layers for module in layer.modules()}
        for module in self.model.base_model.modules():
            if module not in inside:
                self._weights.init_buffers(module, deep=False)


class Weights:
    """The parameters of a model on the meta device, read from a checkpoint's files when they are asked for.

    Args:
        model: The model.
        plain: The checkpoint's tensors, dequantised where they are quantised.
        names: Which tensor is for which parameter.
        device: Where parameters go.
        tensors: The tensors to look at; by default all.
        whole: The model that it is part of, which knows how to make what no checkpoint holds; by default itself.
        rounded: The dtype that a parameter's numbers are rounded to first, where that is another than its own.

    Attributes:
        parameters: The parameters and buffers as they are expected, by name.
        sources: Where those that the checkpoint has come from.
    """

    def __init__(
        self,
        model: Any,
        plain: Plain,
        names: WeightNames,
        device: torch.device,
        tensors: Iterable[str] | None = None,
        whole: Any = None,
        rounded: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.model = model
        self._rounded = rounded or {}
        self._whole = model if whole is None else whole
        self.checkpoint = plain.checkpoint
        self._plain = plain
        self.device = device
        self.parameters: dict[str, Tensor] = model.state_dict()
        self._names = names
        self.sources = self._find_sources(plain.tensors if tensors is None else tensors)

    def _find_sources(self, tensors: Iterable[str]) -> dict[str, _Source]:
        """For each parameter the tensors it is made of, by transformers' own mapping of names."""
        sources: dict[str, _Source] = {}
        for name in self._names.sorted(tensors):
            target, pattern, converter = self._names.parameter_of(name)
            for parameter in self._names.made_with(target, converter):
                if parameter in self.parameters:  # else of no use to the model; transformers passes over it as well
                    source = sources.setdefault(parameter, _Source(converter, target))
                    source.tensors.setdefault(pattern or name, []).append(name)
        return sources

    def check(self, name: str) -> None:
        """Raise unless a parameter is there once and has the shape that it should have, where that can be told.

        Raises:
            RequestError: Naming the tensor.
        """
        source, expected = self.sources[name], tuple(self.parameters[name].shape)
        if source.converter is None:
            tensor = self._plain.tensors[source.names[0]]
            if len(source.names) > 1:
                raise RequestError(f"{name} is in the checkpoint twice: {' and '.join(source.names)}.")
            if tensor.shape != expected:
                raise RequestError(
                    f"{self.checkpoint.tensors[tensor.names[0]].file}: {tensor.names[0]} has shape {tensor.shape}"
                    f"{' as plain numbers' if tensor.format else ''}, and config.json says {expected}."
                )

    def init_buffers(self, root: nn.Module, deep: bool = True) -> None:
        """Make the buffers that no checkpoint holds, as transformers makes them."""
        for module in root.modules() if deep else [root]:
            names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in names:
                empty = torch.empty_like(getattr(module, name), device=self.device)
                # Code that is not of transformers may make them when it is built alone: then they stay as they are.
                setattr(module, name, empty.fill_(torch.nan) if empty.is_floating_point() else empty)
            if names:
                initialise(self._whole, module)
            for name in names:
                if bool(torch.isnan(getattr(module, name)).any()):
                    raise RequestError(
                        f"{name} of a {type(module).__name__} is in no checkpoint and is made only where the whole "
                        "model is loaded; it cannot be run one layer at a time (stream=False)."
                    )

    def nbytes(self, parameters: Iterable[str]) -> int:
        """Bytes of parameters."""
        return sum(self.parameters[name].nbytes for name in parameters)

    def placed(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """The tensors of the checkpoint that make a value of a parameter (``placing.in_files``)."""
        return in_files(name, value, self.sources[name], self._names, self._plain)

    def load(self, parameters: Iterable[str]) -> None:
        """Read parameters, by their names in the model, into it."""
        for name, value in self.made(parameters):
            self.put({name: value})

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give the model parameters that were made for it, by name."""
        for name, value in values.items():
            path, _, last = name.rpartition(".")
            module = attrgetter(path)(self.model)
            if last in module._parameters:
                value = nn.Parameter(value, requires_grad=False)
            keep_from_initialising(value)
            setattr(module, last, value)

    def made(self, parameters: Iterable[str], check: Callable[[], None] = _go_on) -> Iterator[tuple[str, Tensor]]:
        """Parameters where they go, by name, made of what is read; on a card all that is calculated for it is as well.

        Args:
            parameters: Their names.
            check: On a card called before each piece of a tensor is read; what it raises ends the reading.
        """
        on_card = copies_aside(self.device)
        read_tensor = functools.partial(read_onto, self.device, check) if on_card else read_in_memory
        with self.checkpoint.reader(read_tensor) as read:
            for name in parameters:
                rounded = self._rounded.get(name)

                def finite(tensor_name: str, dtype: torch.dtype, rounded: torch.dtype | None = rounded) -> Tensor:
                    return self._plain.read(read, tensor_name, rounded or dtype).to(dtype)

                value = self._made(name, self.sources[name], finite, self.device if on_card else torch.device("cpu"))
                expected = self.parameters[name]
                if value.shape != expected.shape:
                    raise RequestError(
                        f"{self.sources[name].names[0]} gives {name} the shape {tuple(value.shape)}, and config.json "
                        f"says {tuple(expected.shape)}."
                    )
                yield name, value.to(self.device)

    def _made(
        self, name: str, source: _Source, read: Callable[[str, torch.dtype], Tensor], device: torch.device
    ) -> Tensor:
        dtype = self.parameters[name].dtype
        if source.converter is None:
            return read(source.names[0], dtype)
        if not source.by_expert:
            tensors = {p: [read(n, dtype) for n in names] for p, names in source.tensors.items()}
            return self._names.converted(name, source.converter, tensors, source.first)
        whole = torch.empty(self.parameters[name].shape, dtype=dtype, device=device)

        def make(expert: int) -> None:
            tensors = {pattern: [read(names[expert], dtype)] for pattern, names in source.tensors.items()}
            whole[expert : expert + 1] = self._names.converted(name, source.converter, tensors)

        for_each(make, range(len(whole)), device)
        return whole
