# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint holds experts and routers: by the parameter that transformers makes of each tensor.

Files hold one tensor per expert and projection (``...experts.7.w1.weight``), or fused tensors with the experts in one
dimension (``...experts.gate_up_proj``), under names of their own; quantised ones come with scales and shapes beside
them. transformers' own mapping of names says which parameter each is for (``compat.WeightNames``), so no names are
written down here; the model is built without weights for it.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..architectures.fingerprint import facts_of, fingerprints_of
from ..architectures.spec import MoESpec
from ..architectures.structure import ExpertAxis, LayerStructure, Structure, structure_of
from ..architectures.substitution import check_whole
from ..architectures.table import architecture_of
from ..compat import ModelConfig, WeightNames, build_on_meta, commit_of_config, quantization_of, text_config
from ..errors import RequestError, RunError, faults_of
from ..storage.contents import content_digests
from ..storage.values import Json, read_json
from .checkpoint import Checkpoint
from .foreign import foreign_format
from .heads import Head, find_heads, names_of_heads, prefix_of
from .layer_checks import LayerChecks, Shapes
from .moe_layer import MoELayer
from .plain import Plain
from .source import Source

_NUMBER = re.compile(r"(.*\.)([0-9]{1,6})\.(.+?)")


@dataclass
class Layout:
    """All tensors of a checkpoint, sorted.

    Attributes:
        checkpoint: The files.
        spec: The architecture.
        config: The model's config.
        structure: Where the model has its experts.
        layers: The MoE layers.
        heads: Heads for further tokens with experts, which count as layers after the model's last.
        head_names: All tensors of heads.
        foreign: Tensors of experts that are of no layer and no head.
    """

    checkpoint: Checkpoint
    spec: MoESpec
    config: ModelConfig
    structure: Structure
    layers: dict[int, MoELayer] = field(default_factory=dict)
    heads: list[Head] = field(default_factory=list)
    head_names: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def structure_of(self, index: int) -> LayerStructure:
        """Where a MoE layer, or a head, has what."""
        return self.structure.moe[next((head.like for head in self.heads if head.index == index), index)]

    @property
    def with_heads(self) -> dict[int, MoELayer]:
        """The MoE layers, and heads that are laid out as such."""
        return {**self.layers, **{head.index: head.layer for head in self.heads if not head.problem}}

    @functools.cached_property
    def plain(self) -> Plain:
        """Its tensors, dequantised where they are quantised."""
        return Plain(self.checkpoint, self.config)

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
    """The dtype transformers loads a checkpoint in: the one asked for, or the config's, or that of its tensors.

    Of quantised ones, whose tensors have several, it is bfloat16.
    """
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype
    own = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    if own is None:
        return torch.bfloat16 if quantization_of(config) else checkpoint.floating_dtype()
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
    check_whole(config, checkpoint.name_or_path)
    try:
        with faults_of(f"config.json of {checkpoint.name_or_path}"):
            return _found_layout(checkpoint, config)
    except RequestError as error:
        if what := _another_format(checkpoint, config):
            way = "Prune the original checkpoint, and convert what comes out."
            if what.startswith("MLX"):
                way = "Prune the original checkpoint; its plan can be applied to a folder like this as well (apply)."
            raise RequestError(f"{checkpoint.name_or_path} holds weights in another format: {what}. {way}") from error
        raise


def _another_format(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """What another tool wrote in a checkpoint that cannot be read here, or None."""
    if Plain(checkpoint, config).formats:
        return None
    found = checkpoint.source.find("config.json")
    return None if found is None else foreign_format(read_json(found), checkpoint.tensors, checkpoint.metadata)


def _found_layout(checkpoint: Checkpoint, config: ModelConfig) -> Layout:
    spec = architecture_of(config)
    model = build_on_meta(config, trust_remote_code=checkpoint.source.trust_remote_code)
    structure = structure_of(model, spec)
    layout = Layout(checkpoint, spec, config, structure)
    names = WeightNames(model)
    parameters = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    inside = re.compile(rf"{re.escape(structure.layers)}\.([0-9]{{1,6}})\.(.+)")
    outside: dict[str, None] = {}
    for name in checkpoint.tensors:
        target, converter, beside = _located(name, layout.plain.owners.get(name, name), names, parameters)
        match = inside.fullmatch(target)
        index = -1 if match is None else int(match[1])
        if match is None or index not in structure.moe:
            if target not in parameters:
                outside[name] = None
            continue
        layer = layout.layers.setdefault(index, MoELayer(spec.num_experts(config, index)))
        _sort(layout, layer, index, names, name, match[2], converter, beside)
    layout.layers = {index: layer for index, layer in sorted(layout.layers.items()) if _is_moe(layer)}
    if not layout.layers:
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no experts of a {spec.model_type!r} model "
            f"({structure.layers}.N.{next(iter(structure.moe.values())).experts}...), so there is nothing to prune."
        )
    checks = LayerChecks(checkpoint, structure, layout.plain, parameters)
    projections = {name: shape for layer in layout.layers.values() for name, shape in layer.projections.items()}
    for index, layer in layout.layers.items():
        layer.projections = projections
        checks.check(layer, index, index)
    _find_heads(layout, outside, names, checks)
    return layout


def _find_heads(layout: Layout, outside: Mapping[str, None], names: WeightNames, checks: LayerChecks) -> None:
    """Sort the tensors of heads, each as if it were the layer that it is like."""
    every = layout.checkpoint.tensors
    num_layers = text_config(layout.config).num_hidden_layers
    layout.heads, layout.foreign = find_heads(every, outside, layout.layers, num_layers)
    layout.head_names = names_of_heads(layout.heads, outside, every.keys() - outside.keys())
    for head in layout.heads:
        start, prefix = f"{layout.structure.layers}.{head.like}.", prefix_of(layout.layers[head.like], head.like)
        try:
            for name in (name for name in outside if name.startswith(head.prefix)):
                owner = layout.plain.owners.get(name, name)
                inside, beside = (prefix + part.removeprefix(head.prefix) for part in (name, owner))
                located = _located(inside, beside, names, checks.parameters)
                if located[0].startswith(start):
                    _sort(layout, head.layer, head.like, names, name, located[0].removeprefix(start), *located[1:])
            head.layer.num_experts = _counted(layout, head)
            checks.check(head.layer, head.index, head.like)
        except RequestError as error:
            head.problem = str(error)


def _counted(layout: Layout, head: Head) -> int:
    """The experts of a head: files say it, since a config need not."""
    if head.layer.experts:
        return max(head.layer.experts) + 1 - head.layer.fixed
    found = layout.structure.moe[head.like]
    name, axis = head.layer.router.get(found.logits_from), found.tensors[found.logits_from]
    shape = () if name is None else layout.checkpoint.tensors[name].shape
    return 0 if len(shape) <= axis.axis else axis.count(shape)


def _located(name: str, owner: str, names: WeightNames, parameters: Shapes) -> tuple[str, Any, bool]:
    """The parameter a tensor is for, what it is converted by, and whether it only lies beside it, as scales do.

    Args:
        name: The tensor.
        owner: The weight that it is known to be of; else itself, and where to look is tried.
        names: Of parameters.
        parameters: Those that there are.
    """
    target, _, converter = names.parameter_of(name)
    if target in parameters:
        return target, converter, False
    start, _, last = name.rpartition(".")
    for beside in (owner, f"{start}.weight", f"{start}.{last.rpartition('_')[0]}"):
        found, _, converter = names.parameter_of(beside)
        if beside != name and found in parameters:
            return found, converter, True
    return target, None, False


def _is_moe(layer: MoELayer) -> bool:
    return bool(layer.experts or layer.fused or layer.router)


def _sort(
    layout: Layout, layer: MoELayer, like: int, names: WeightNames, name: str, path: str, converter: Any, beside: bool
) -> None:
    """Put a tensor of a MoE layer where it belongs; what is of no expert and no router stays as it is.

    Args:
        layout: The checkpoint.
        layer: The layer.
        like: Its index; of a head, that of the layer it is like.
        names: Which tensor is for which parameter.
        name: The tensor.
        path: The parameter that it is for, below the decoder layer.
        converter: What makes that of it.
        beside: Whether it only lies beside the one that it is made of.
    """
    found = layout.structure.moe[like]
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
                shape = names.parameter_shape(f"{layout.structure.layers}.{like}.{path}")
                layer.projections.update(names.source_shapes(converter, shape))
                layer.fixed = max(layer.fixed, 0 if axis is None else axis.extra)
            _put(layout, layer.experts.setdefault(int(match[2]), {}), match[3], name)
        elif axis is not None or beside or not names.has(f"{layout.structure.layers}.{like}.{path}"):
            label = path[len(experts) :]
            if converter is not None and len(converter.source_patterns) > 1:  # one of several that it is made of
                label = ".".join(name.split(".")[-2:])
            _put(layout, layer.fused, name.rpartition(".")[2] if beside else label, name)
            layer.axes[name] = ExpertAxis(0, 1, axis.extra if axis is not None and not beside else 0)
    elif axis is not None and not beside:
        layer.axes[name] = axis
        _put(layout, layer.router, path, name)
    elif axis is not None and math.prod(tensor.shape) == 1:
        layer.whole.append(name)
    elif axis is not None:
        layer.axes[name] = ExpertAxis(0)
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


def identity(layout: Layout) -> Json:
    """What makes a checkpoint the same one: its files with what they hold, and routers; or its commit on the Hub.

    How much of a large file is looked at says ``storage.contents``: something of every expert.

    Raises:
        RunError: If a file cannot be read.
    """
    checkpoint = layout.checkpoint
    if not checkpoint.is_local and (commit := commit_of_config(layout.config)) is not None:
        return {"name": checkpoint.name_or_path, "commit": commit}
    name = os.path.realpath(checkpoint.name_or_path) if checkpoint.is_local else checkpoint.name_or_path
    own_code = [file for file in checkpoint.source.files() if file.endswith(".py")]
    paths = {file: checkpoint.path(file) for file in ("config.json", *checkpoint.files, *own_code)}
    try:
        digests = content_digests(paths.values())
        found = {file: (os.stat(path), digests[path]) for file, path in paths.items()}
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error.strerror}.") from error
    files = {
        file: {"bytes": stat.st_size, "changed at": stat.st_mtime_ns, "content": digest}
        for file, (stat, digest) in found.items()
    }
    return {"name": name, "fingerprint": layout.fingerprints()["fingerprint"], **files}
