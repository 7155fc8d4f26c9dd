# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint holds experts and routers: found by name, checked against the config; no model is built.

Files hold one tensor per expert and projection (``...experts.7.w1.weight``), or fused tensors with the experts in the
first dimension (``...experts.gate_up_proj``), whatever the modules look like.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..architectures.fingerprint import facts_of, fingerprint_of
from ..architectures.spec import MoESpec
from ..architectures.table import architecture_of
from ..compat import ModelConfig, commit_of_config, text_config
from ..errors import RequestError
from ..storage.tensor_files import TORCH_DTYPES
from ..storage.values import Json
from .checkpoint import Checkpoint
from .source import Source


@dataclass
class MoELayer:
    """The tensors of one MoE block in files, by name in the checkpoint.

    Attributes:
        num_experts: Experts, as the config says.
        experts: By expert, where each has tensors of its own: path below the expert -> name.
        fused: Tensors with the experts in the first dimension: path below the experts -> name.
        router: Tensors with a row per expert: path below the block -> name.
    """

    num_experts: int
    experts: dict[int, dict[str, str]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    router: dict[str, str] = field(default_factory=dict)


@dataclass
class Layout:
    """All tensors of a checkpoint, sorted.

    Attributes:
        checkpoint: The files.
        spec: The architecture.
        config: The model's config.
        layers: The MoE layers.
        outside: Experts' tensors that belong to none of the model's layers (heads for predicting further tokens).
    """

    checkpoint: Checkpoint
    spec: MoESpec
    config: ModelConfig
    layers: dict[int, MoELayer] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)

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

    def fingerprint(self) -> str:
        """The fingerprint of the model that transformers loads from these files in their own precision.

        Raises:
            RunError: If a router holds NaN or infinity.
        """
        dtype = model_dtype(self.config, self.checkpoint)
        top_k = self.spec.routing(self.config).top_k
        names = [layer.router[path] for _, layer in sorted(self.layers.items()) for path in self.spec.router_tensors]
        tensors = {}
        with self.checkpoint.reader() as read:
            for name in names:
                tensor = self.checkpoint.finite(name, read(name))
                tensors[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).clone()
        return fingerprint_of(
            (index, layer.num_experts, top_k, [tensors[layer.router[path]] for path in self.spec.router_tensors])
            for index, layer in sorted(self.layers.items())
        )

    def facts(self) -> Json:
        """What statistics and plans remember of the model they were made for (as ``models.blocks.model_facts``)."""
        return facts_of(self.spec, self.config, self.fingerprint(), self.dense_layers)


def model_dtype(config: ModelConfig, checkpoint: Checkpoint, dtype: str | torch.dtype = "auto") -> torch.dtype:
    """The dtype transformers loads a checkpoint in: the one asked for, or the config's, or that of its tensors."""
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    own = getattr(config, "dtype", None)
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
    layout = Layout(checkpoint, spec, config)
    layer_list = spec.layers.rpartition(".")[2]
    prefix = re.escape(spec.layers.removesuffix(layer_list))
    blocks = "|".join(map(re.escape, spec.file_blocks))
    inside = re.compile(rf"(?:{prefix})?{re.escape(layer_list)}\.([0-9]{{1,6}})\.(?:{blocks})\.(.+)")
    anywhere = re.compile(rf"(?:^|\.){re.escape(spec.experts)}\.")
    router_paths = {spec.router, *(path.rpartition(".")[0] for path in spec.router_tensors)} - {""}
    for name in checkpoint.tensors:
        match = inside.fullmatch(name)
        if match is None or int(match[1]) >= text_config(config).num_hidden_layers:
            if anywhere.search(name):
                layout.outside.append(name)
            continue
        index, path = int(match[1]), match[2]
        if path.startswith(f"{spec.experts}."):
            layer = layout.layers.setdefault(index, MoELayer(spec.num_experts(config, index)))
            number, _, rest = path.removeprefix(f"{spec.experts}.").partition(".")
            if re.fullmatch("[0-9]{1,6}", number):
                _put(layout, layer.experts.setdefault(int(number), {}), rest, name)
            else:
                _put(layout, layer.fused, path.removeprefix(f"{spec.experts}."), name)
        elif path in spec.router_tensors or any(path.startswith(f"{router}.") for router in router_paths):
            layer = layout.layers.setdefault(index, MoELayer(spec.num_experts(config, index)))
            _put(layout, layer.router, path, name)
    if not layout.layers:
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no experts of a {spec.model_type!r} model "
            f"(layers.N.{spec.file_blocks[0]}.{spec.experts}...), so there is nothing to prune."
        )
    for index, layer in sorted(layout.layers.items()):
        _check_layer(layout, index, layer)
    layout.layers = dict(sorted(layout.layers.items()))
    return layout


def _put(layout: Layout, into: dict[str, str], path: str, name: str) -> None:
    if path in into:
        raise RequestError(
            f"{into[path]} and {name} of {layout.checkpoint.name_or_path} are the same tensor under two names. Remove "
            "one."
        )
    into[path] = name


def _check_layer(layout: Layout, index: int, layer: MoELayer) -> None:
    checkpoint, spec, count = layout.checkpoint, layout.spec, layer.num_experts
    where = f"layer {index} of {checkpoint.name_or_path}"
    if layer.experts and layer.fused:
        raise RequestError(
            f"{where} holds its experts twice, one by one ({next(iter(layer.experts[min(layer.experts)].values()))}) "
            f"and fused ({next(iter(layer.fused.values()))})."
        )
    if not layer.experts and not layer.fused:
        raise RequestError(f"{where} has a router and no experts; the checkpoint is damaged.")
    if layer.experts:
        _check_numbered(layout, where, layer)
    else:
        missing = set(spec.expert_tensors) - set(layer.fused)
        if missing:
            raise RequestError(f"{where}: {spec.experts}.{min(missing)} is missing.")
        elements = 0
        for path, name in layer.fused.items():
            tensor = checkpoint.tensors[name]
            if not tensor.shape or tensor.shape[0] != count:
                raise RequestError(
                    f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {count} experts."
                )
            elements += math.prod(tensor.shape[1:]) if path in spec.expert_tensors else 0
        expected = sum(math.prod(shape) for shape in _projections(layout).values())
        if expected and elements != expected and _is_plain(layer.fused.values(), checkpoint):
            raise RequestError(
                f"{where}: an expert has {elements} weights, and config.json says {expected}; the checkpoint or its "
                "config is damaged."
            )
    for path in spec.router_tensors:
        if path not in layer.router:
            raise RequestError(f"{where}: the router's {path} is missing.")
    for path, name in layer.router.items():
        tensor = checkpoint.tensors[name]
        rows = tensor.shape[0] if tensor.shape else 0
        if rows == count and tensor.shape[1:] in ((), (text_config(layout.config).hidden_size,)):
            continue
        if path not in spec.router_tensors and math.prod(tensor.shape) == 1:
            continue  # one number for the whole router
        raise RequestError(
            f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {count} experts and hidden size "
            f"{text_config(layout.config).hidden_size}."
        )


def _check_numbered(layout: Layout, where: str, layer: MoELayer) -> None:
    """Check experts with tensors of their own: all there, alike, and of the shape the config says."""
    checkpoint, count = layout.checkpoint, layer.num_experts
    beyond = [number for number in layer.experts if number >= count]
    if beyond:
        name = next(iter(layer.experts[min(beyond)].values()))
        raise RequestError(
            f"{checkpoint.tensors[name].file}: {name} is there, and config.json says {count} experts (0 to "
            f"{count - 1})."
        )
    paths = {path for tensors in layer.experts.values() for path in tensors}
    some = next(iter(layer.experts.values()))
    for number in range(count):
        have = layer.experts.get(number, {})
        for path in sorted(paths - set(have)):
            pattern = next(name for t in layer.experts.values() if path in t for name in [t[path]])
            known = next(n for n, t in layer.experts.items() if path in t)
            name = pattern.replace(f".{known}.{path}", f".{number}.{path}")
            raise RequestError(f"{name} is missing in {checkpoint.name_or_path}; the other experts have it.")
    shapes = _projections(layout)
    for projection in shapes:
        if not any(path.startswith(f"{projection}.") for path in paths):
            raise RequestError(f"{where}: no expert has {projection!r}; its experts have {', '.join(sorted(some))}.")
    for number, tensors in layer.experts.items():
        for path, name in tensors.items():
            tensor, first = checkpoint.tensors[name], checkpoint.tensors[layer.experts[0][path]]
            expected = shapes.get(path.removesuffix(".weight"))
            if expected and TORCH_DTYPES.get(tensor.dtype) is not None and tensor.shape != expected:
                raise RequestError(f"{tensor.file}: {name} has shape {tensor.shape}, and config.json says {expected}.")
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise RequestError(
                    f"{tensor.file}: {name} is {tensor.dtype} {tensor.shape}, and that of expert 0 {first.dtype} "
                    f"{first.shape} (expert {number})."
                )


def _projections(layout: Layout) -> Mapping[str, tuple[int, int]]:
    config = text_config(layout.config)
    return {
        name: (getattr(config, rows), getattr(config, columns)) for name, rows, columns in layout.spec.file_experts
    }


def _is_plain(names: Any, checkpoint: Checkpoint) -> bool:
    """Whether all tensors hold one number per weight; packed ones hold fewer."""
    return all(TORCH_DTYPES.get(checkpoint.tensors[name].dtype) is not None for name in names)


def identity(layout: Layout) -> Json:
    """What makes a checkpoint the same one: its files and routers, or its commit on the Hub."""
    checkpoint = layout.checkpoint
    if not checkpoint.is_local:
        return {"name": checkpoint.name_or_path, "commit": commit_of_config(layout.config)}
    folder = Path(os.path.realpath(checkpoint.name_or_path))
    found = {file: os.stat(folder / file) for file in ("config.json", *checkpoint.files)}
    files = {file: {"bytes": stat.st_size, "changed at": stat.st_mtime_ns} for file, stat in found.items()}
    return {"name": str(folder), "fingerprint": layout.fingerprint(), **files}
