# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint holds experts and routers: by the parameter that transformers makes of each tensor.

Files hold one tensor per expert and projection (``...experts.7.w1.weight``), or fused tensors with the experts in one
dimension (``...experts.gate_up_proj``), under names of their own; quantised ones come with scales and shapes beside
them. transformers' own mapping of names says which parameter each is for (``compat.WeightNames``), so no names are
written down here; the model is built without weights for it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..architectures.fingerprint import facts_of, fingerprints_of
from ..architectures.spec import MoESpec
from ..architectures.structure import Structure, structure_of
from ..architectures.table import architecture_of
from ..compat import ModelConfig, WeightNames, build_on_meta, commit_of_config, text_config
from ..errors import RequestError
from ..storage.tensor_files import TORCH_DTYPES
from ..storage.values import Json
from .checkpoint import Checkpoint
from .heads import Head, find_heads
from .moe_layer import MoELayer
from .source import Source

_NUMBER = re.compile(r"(.*\.)([0-9]{1,6})\.(.+?)")
_PLAIN = ("F64", "F32", "BF16", "F16")


@dataclass
class Layout:
    """All tensors of a checkpoint, sorted.

    Attributes:
        checkpoint: The files.
        spec: The architecture.
        config: The model's config.
        structure: Where the model has its experts.
        layers: The MoE layers.
        heads: Heads for further tokens, with experts of their own, that no layer of the model is.
    """

    checkpoint: Checkpoint
    spec: MoESpec
    config: ModelConfig
    structure: Structure
    layers: dict[int, MoELayer] = field(default_factory=dict)
    heads: list[Head] = field(default_factory=list)

    @property
    def num_experts(self) -> dict[int, int]:
        """Experts of each MoE layer."""
        return {index: layer.num_experts for index, layer in self.layers.items()}

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts."""
        names = [n for layer in self.layers.values() for tensors in layer.experts.values() for n in tensors.values()]
        names += [name for layer in self.layers.values() for name in layer.fused.values()]
        return sum(self.checkpoint.tensors[name].nbytes for name in names)

    @property
    def dense_layers(self) -> list[int]:
        """Decoder layers without experts."""
        return [index for index in range(text_config(self.config).num_hidden_layers) if index not in self.layers]

    def fingerprints(self) -> Json:
        """The fingerprints of the routers that the files hold (``architectures.fingerprint``).

        Raises:
            RunError: If a router holds NaN or infinity.
        """
        top_k = self.spec.routing(self.config).top_k
        with self.checkpoint.reader() as read:
            return fingerprints_of(
                (
                    index,
                    layer.num_experts,
                    top_k,
                    [
                        self.checkpoint.finite(name, read(name)).clone()
                        for name in map(layer.router.__getitem__, self.structure.moe[index].router_tensors)
                    ],
                )
                for index, layer in sorted(self.layers.items())
            )

    def facts(self) -> Json:
        """What statistics and plans remember of the model they were made for (as ``models.blocks.model_facts``)."""
        return facts_of(self.spec, self.config, self.fingerprints(), self.dense_layers)


def model_dtype(config: ModelConfig, checkpoint: Checkpoint, dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype transformers loads a checkpoint in: the one asked for, or the config's, or that of its tensors."""
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    own = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if own is None:
        return checkpoint.floating_dtype()
    return getattr(torch, own) if isinstance(own, str) else own


def open_layout(source: Source | str | os.PathLike) -> Layout:
    """Where the files of a model hold experts and routers; checked. On the Hub all files are those of one commit.

    Raises:
        RequestError: If there is none, its architecture is not known, or its files are damaged.
    """
    source = Source.of(source)
    commit = commit_of_config(source.config)
    return find_layout(Checkpoint.open(replace(source, revision=commit) if commit else source), source.config)


def find_layout(checkpoint: Checkpoint, config: ModelConfig) -> Layout:
    """Sort a checkpoint's tensors and check that every expert and router is there, in the shape the config says.

    Args:
        checkpoint: The files.
        config: The model's config, of a known architecture.

    Raises:
        RequestError: Naming the tensor and its file, or what is missing.
    """
    spec = architecture_of(config)
    model = build_on_meta(config, trust_remote_code=checkpoint.source.trust_remote_code)
    structure = structure_of(model, spec)
    layout = Layout(checkpoint, spec, config, structure)
    names = WeightNames(model)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    inside = re.compile(rf"{re.escape(structure.layers)}\.([0-9]{{1,6}})\.(.+)")
    outside = []
    for name in checkpoint.tensors:
        target, converter, beside = _located(name, names, parameters)
        match = inside.fullmatch(target)
        index = -1 if match is None else int(match[1])
        if match is None or index not in structure.moe:
            outside.append(name)
            continue
        layout.layers.setdefault(index, MoELayer(spec.num_experts(config, index)))
        _sort(layout, index, names, name, match[2], converter, beside)
    layout.layers = {index: layer for index, layer in sorted(layout.layers.items()) if _is_moe(layer)}
    if not layout.layers:
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no experts of a {spec.model_type!r} model "
            f"({structure.layers}.N.{next(iter(structure.moe.values())).experts}...), so there is nothing to prune."
        )
    projections = {name: shape for layer in layout.layers.values() for name, shape in layer.projections.items()}
    for index, layer in layout.layers.items():
        layer.projections = projections
        _check_layer(layout, index, layer, parameters)
    layout.heads = find_heads(outside, layout.layers, text_config(config).num_hidden_layers)
    return layout


def _located(name: str, names: WeightNames, parameters: Mapping[str, Any]) -> tuple[str, Any, bool]:
    """The parameter a tensor is for, what it is converted by, and whether it only lies beside it, as scales do."""
    target, _, converter = names.parameter_of(name)
    if target in parameters:
        return target, converter, False
    start, _, last = name.rpartition(".")
    for beside in (f"{start}.weight", f"{start}.{last.split('_')[0]}", f"{start}.{last.rpartition('_')[0]}"):
        found, _, converter = names.parameter_of(beside)
        if beside != name and found in parameters:
            return found, converter, True
    return target, None, False


def _is_moe(layer: MoELayer) -> bool:
    return bool(layer.experts or layer.fused or layer.router)


def _sort(layout: Layout, index: int, names: WeightNames, name: str, path: str, converter: Any, beside: bool) -> None:
    """Put a tensor of a MoE layer where it belongs; what is of no expert and no router stays as it is."""
    layer, found = layout.layers[index], layout.structure.moe[index]
    experts, tensor = f"{found.experts}.", layout.checkpoint.tensors[name]
    axis = found.tensors.get(path)
    if path.startswith(experts) and found.numbered:  # each expert is a module of its own, and keeps its name
        number = path[len(experts) :].partition(".")[0]
        below = name.rpartition(f"{found.experts.rpartition('.')[2]}.{number}.")[2]
        _put(layout, layer.experts.setdefault(int(number), {}), below, name)
    elif path.startswith(experts):
        match = _NUMBER.fullmatch(name)
        numbered = re.match(r"\d+\.", path[len(experts) :]) or _takes_numbers(converter)
        if numbered and match is not None:
            if converter is not None:
                shape = names.parameter_shape(f"{layout.structure.layers}.{index}.{path}")
                layer.projections.update(names.source_shapes(converter, shape))
            _put(layout, layer.experts.setdefault(int(match[2]), {}), match[3], name)
        else:
            _put(layout, layer.fused, name.rpartition(".")[2] if beside else path[len(experts) :], name)
            layer.axes[name] = (0, 1, axis.extra if axis is not None and not beside else 0)
    elif axis is not None and not beside:
        layer.axes[name] = (axis.axis, axis.each, axis.extra)
        _put(layout, layer.router, path, name)
    elif axis is not None and math.prod(tensor.shape) == 1:
        layer.whole.append(name)
    elif axis is not None:
        layer.axes[name] = (0, 1, 0)
        _put(layout, layer.router, f"{path}.{name.rpartition('.')[2]}", name)
    elif path.startswith(f"{found.router}.") and path.rpartition(".")[2] == getattr(layout.spec.form, "table", None):
        layer.table = name


def _takes_numbers(converter: Any) -> bool:
    return converter is not None and any("*" in pattern for pattern in converter.source_patterns)


def _put(layout: Layout, into: dict[str, str], path: str, name: str) -> None:
    if path in into:
        raise RequestError(
            f"{into[path]} and {name} of {layout.checkpoint.name_or_path} are the same tensor under two names. Remove "
            "one."
        )
    into[path] = name


def _check_layer(layout: Layout, index: int, layer: MoELayer, parameters: Mapping[str, tuple[int, ...]]) -> None:
    checkpoint, count, found = layout.checkpoint, layer.num_experts, layout.structure.moe[index]
    where = f"layer {index} of {checkpoint.name_or_path}"
    if layer.experts and layer.fused:
        raise RequestError(
            f"{where} holds its experts twice, one by one ({next(iter(layer.experts[min(layer.experts)].values()))}) "
            f"and fused ({next(iter(layer.fused.values()))})."
        )
    if not layer.experts and not layer.fused:
        raise RequestError(f"{where} has a router and no experts; the checkpoint is damaged.")
    held = layer.experts[min(layer.experts)].values() if layer.experts else layer.fused.values()
    if layer.experts:
        _check_numbered(layout, where, layer)
    else:
        for name in list(layer.fused.values()):
            tensor = checkpoint.tensors[name]
            if math.prod(tensor.shape) == 1 and count > 1:
                layer.whole.append(name)
                del layer.axes[name]
            elif not tensor.shape or tensor.shape[0] != count + layer.axes[name][2]:
                raise RequestError(
                    f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {count} experts."
                )
    expected = _elements(layout, index, found.expert_tensors, parameters, layer)
    elements = sum(math.prod(checkpoint.tensors[name].shape) for name in held) // (1 if layer.experts else count)
    if _is_plain(held, checkpoint) and elements != expected:
        raise RequestError(
            f"{where}: an expert has {elements} weights, and config.json says {expected}; the checkpoint or its "
            "config is damaged."
        )
    for path in found.router_tensors:
        if path not in layer.router:
            raise RequestError(f"{where}: the router's {path} is missing.")
        name = layer.router[path]
        tensor, shape = checkpoint.tensors[name], parameters[f"{layout.structure.layers}.{index}.{path}"]
        if tensor.shape != shape and TORCH_DTYPES.get(tensor.dtype) is not None:
            raise RequestError(f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {shape}.")
    for name, (axis, each, extra) in layer.axes.items():
        tensor = checkpoint.tensors[name]
        if len(tensor.shape) <= axis or tensor.shape[axis] != count * each + extra:
            raise RequestError(
                f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {count} experts."
            )


def _elements(
    layout: Layout, index: int, paths: Iterable[str], parameters: Mapping[str, tuple[int, ...]], layer: MoELayer
) -> int:
    """The weights of one expert, by the parameters of the model."""
    start, found = f"{layout.structure.layers}.{index}", layout.structure.moe[index]
    if found.numbered:
        return sum(math.prod(parameters[f"{start}.{found.experts}.0.{path}"]) for path in found.numbered)
    shapes = [parameters[f"{start}.{path}"] for path in paths]
    return sum(math.prod(shape[1:]) for shape in shapes)


def _check_numbered(layout: Layout, where: str, layer: MoELayer) -> None:
    """Check experts with tensors of their own: all there, and alike."""
    checkpoint, count = layout.checkpoint, layer.num_experts
    beyond = [number for number in layer.experts if number >= count]
    if beyond:
        name = next(iter(layer.experts[min(beyond)].values()))
        raise RequestError(
            f"{checkpoint.tensors[name].file}: {name} is there, and config.json says {count} experts (0 to "
            f"{count - 1})."
        )
    paths = {path for tensors in layer.experts.values() for path in tensors}
    for number in range(count):
        have = layer.experts.get(number, {})
        for path in sorted(paths - set(have)):
            pattern = next(name for t in layer.experts.values() if path in t for name in [t[path]])
            known = next(n for n, t in layer.experts.items() if path in t)
            name = pattern.replace(f".{known}.{path}", f".{number}.{path}")
            raise RequestError(f"{name} is missing in {checkpoint.name_or_path}; the other experts have it.")
    for projection in layer.projections:
        if not any(path == projection or path.startswith(f"{projection}.") for path in paths):
            some = ", ".join(sorted(next(iter(layer.experts.values()))))
            raise RequestError(f"{where}: no expert has {projection!r}; its experts have {some}.")
    for number, tensors in layer.experts.items():
        for path, name in tensors.items():
            expected = layer.projections.get(path.removesuffix(".weight"), ())
            tensor = checkpoint.tensors[name]
            if expected and tensor.dtype in _PLAIN and tensor.shape != expected:
                raise RequestError(f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {expected}.")
            tensor, first = checkpoint.tensors[name], checkpoint.tensors[layer.experts[0][path]]
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise RequestError(
                    f"{tensor.file}: {name} is {tensor.dtype} {tensor.shape}, and that of expert 0 {first.dtype} "
                    f"{first.shape} (expert {number})."
                )


def _is_plain(names: Iterable[str], checkpoint: Checkpoint) -> bool:
    """Whether all tensors hold one number per weight; packed ones hold fewer, and scales come beside others."""
    return all(checkpoint.tensors[name].dtype in _PLAIN for name in names)


def identity(layout: Layout) -> Json:
    """What makes a checkpoint the same one: its files and routers, or its commit on the Hub."""
    checkpoint = layout.checkpoint
    if not checkpoint.is_local:
        return {"name": checkpoint.name_or_path, "commit": commit_of_config(layout.config)}
    folder = Path(os.path.realpath(checkpoint.name_or_path))
    found = {file: os.stat(folder / file) for file in ("config.json", *checkpoint.files)}
    files = {file: {"bytes": stat.st_size, "changed at": stat.st_mtime_ns} for file, stat in found.items()}
    return {"name": str(folder), "fingerprint": layout.fingerprints()["fingerprint"], **files}
