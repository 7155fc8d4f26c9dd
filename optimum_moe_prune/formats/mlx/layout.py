# SPDX-License-Identifier: Apache-2.0
"""Where an MLX folder holds experts and routers.

mlx-lm stacks the experts of a projection in one tensor, below a module called ``switch_mlp``, ``switch_glu`` or
``experts``; the first dimension counts them, of the weight and of what lies beside it. All else keeps the name it has
in the original's files, so transformers' own mapping of names says what it is; of a router that mlx-lm renames, the
one tensor of the block that can be it is taken, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...architectures.spec import MoESpec
from ...architectures.structure import ExpertAxis, LayerStructure, structure_of
from ...architectures.table import architecture_of
from ...checkpoints.checkpoint import Checkpoint
from ...checkpoints.layout import Layout
from ...checkpoints.moe_layer import MoELayer
from ...compat import ModelConfig, WeightNames, build_on_meta, unquantised
from ...errors import RequestError, faults_of
from .names import BESIDE, LAYER, STACKS, stack_of
from .numbers import dequantised

ReadNamed = Callable[[str], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Names:
    """The tensors of one layer in files, by path below it."""

    names: Mapping[str, str]
    shapes: Mapping[str, Shape]
    stacked: tuple[str, ...]

    @property
    def block(self) -> str:
        """The path of the module with experts and router, with a dot; empty where that is the layer itself."""
        parts = self.stacked[0].split(".")
        return "".join(f"{part}." for part in parts[: stack_of(parts)])

    @property
    def others(self) -> list[str]:
        """Paths of what is of no expert, without what lies beside quantised weights."""
        return [path for path in self.names if path not in self.stacked and not self._is_beside(path)]

    def beside(self, path: str) -> list[str]:
        """What lies beside a weight, with something of each of its rows."""
        start = path.removesuffix(".weight")
        beside = [] if path == start else [f"{start}.{kind}" for kind in BESIDE]
        return [other for other in beside if self.shapes.get(other)]  # a scale of the whole matrix has no rows

    def _is_beside(self, path: str) -> bool:
        module, _, kind = path.rpartition(".")
        return kind in BESIDE and f"{module}.weight" in self.names


@dataclass
class MLXLayout(Layout):
    """The tensors of an MLX folder, sorted.

    Attributes:
        absent: Tensors of routers that transformers has and mlx-lm does not, below the decoder layer.
        columns: Of each layer's router, quantised or not.
    """

    absent: tuple[str, ...] = ()
    columns: dict[int, int] = field(default_factory=dict)

    def is_quantised(self, index: int) -> bool:
        """Whether the router of a layer is."""
        name = self.layers[index].router[self.structure.moe[index].logits_from]
        return f"{name.removesuffix('.weight')}.scales" in self.checkpoint.tensors

    def router(self, index: int, read: ReadNamed) -> Tensor:
        """A layer's router ``(E, H)``, dequantised where it is quantised.

        Raises:
            RequestError: If it is quantised in no way that MLX does.
            RunError: If it holds NaN or infinity.
        """
        name = self.layers[index].router[self.structure.moe[index].logits_from]
        if not self.is_quantised(index):
            return self.checkpoint.finite(name, read(name)).float()
        start = name.removesuffix(".weight")
        beside = {kind: f"{start}.{kind}" for kind in BESIDE if f"{start}.{kind}" in self.checkpoint.tensors}
        parts = {kind: self.checkpoint.finite(other, read(other)) for kind, other in beside.items()}
        try:
            return dequantised(
                read(name), parts["scales"], parts.get("biases"), self.columns[index], parts.get("global_scale")
            )
        except ValueError as error:
            raise RequestError(
                f"{self.checkpoint.tensors[name].file}: {name} is quantised in a way that is not known ({error})."
            ) from error


def find_mlx_layout(checkpoint: Checkpoint, config: ModelConfig) -> MLXLayout:
    """Sort an MLX folder's tensors, and check that every expert and router is there.

    Args:
        checkpoint: The files.
        config: The model's config, of a known architecture.

    Raises:
        RequestError: Naming a tensor and its file, or what is missing.
    """
    with faults_of(f"config.json of {checkpoint.name_or_path}"):
        spec = architecture_of(config)
        model = build_on_meta(unquantised(config), trust_remote_code=checkpoint.source.trust_remote_code)
        structure = structure_of(model, spec)
    layout = MLXLayout(checkpoint, spec, config, structure)
    finder = _Finder(layout, WeightNames(model), {name: tuple(t.shape) for name, t in model.state_dict().items()})
    layers = _layers_with_stacks(checkpoint)
    for index in sorted(set(structure.moe) - set(layers)):
        raise RequestError(
            f"the files of {checkpoint.name_or_path} hold no stacked experts of layer {index} "
            f"({', '.join(STACKS)}); the folder is damaged, or not one that mlx-lm writes."
        )
    for index, names in sorted(layers.items()):
        if index not in structure.moe:
            layout.foreign += [names.names[path] for path in names.stacked]
            continue
        layout.layers[index], absent = finder.layer(index, names)
        layout.absent = tuple(dict.fromkeys((*layout.absent, *absent)))
    return layout


def _layers_with_stacks(checkpoint: Checkpoint) -> dict[int, _Names]:
    """The decoder layers that have stacked experts."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for name in checkpoint.tensors:
        if match := LAYER.fullmatch(name):
            found.setdefault(match[1] or "", {}).setdefault(int(match[2]), {})[match[3]] = name
    stacks: dict[str, dict[int, _Names]] = {}
    for stem, layers in found.items():
        for index, names in layers.items():
            shapes = {path: checkpoint.tensors[name].shape for path, name in names.items()}
            if stacked := _stacked(shapes):
                stacks.setdefault(stem, {})[index] = _Names(names, shapes, stacked)
    if len(stacks) > 1:
        raise RequestError(
            f"{checkpoint.name_or_path} has stacked experts below {' and below '.join(sorted(stacks))}; one stack of "
            "decoder layers is what can be pruned."
        )
    return next(iter(stacks.values()), {})


def _stacked(shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The tensors of the modules of a layer that stack experts: one of their weights has three dimensions."""
    modules: dict[str, list[str]] = {}
    for path in shapes:
        if stack_of(path.split(".")) is not None:
            modules.setdefault(path.rsplit(".", 2)[0], []).append(path)
    stacks = [paths for paths in modules.values() if any(len(shapes[path]) == 3 for path in paths)]
    return tuple(path for paths in stacks for path in paths)


@dataclass(frozen=True)
class _Finder:
    """Sorts the tensors of a layer."""

    layout: MLXLayout
    names: WeightNames
    parameters: Mapping[str, Shape]

    @property
    def spec(self) -> MoESpec:
        return self.layout.spec

    def layer(self, index: int, files: _Names) -> tuple[MoELayer, list[str]]:
        """The tensors of a MoE layer, and which of its router mlx-lm does not have."""
        layer = MoELayer(self.spec.num_experts(self.layout.config, index))
        tensors = self.layout.structure.moe[index].tensors
        for path in files.stacked:
            if self._target(index, path) not in (None, *tensors):
                continue  # of all experts together: a norm of what they give
            if files.shapes[path][:1] != (layer.num_experts,):
                raise self._fault(files, path, f"and config.json says {layer.num_experts} experts in layer {index}")
            layer.fused[path] = files.names[path]
            layer.axes[files.names[path]] = ExpertAxis(0)
        found = self.layout.structure.moe[index]
        start = f"{self.layout.structure.layers}.{index}."
        self.layout.columns[index] = self.parameters[f"{start}{found.logits_from}"][-1]
        known = {path: target for path in files.others if (target := self._target(index, path)) is not None}
        router = {target: path for path, target in known.items() if target in found.router_tensors}
        absent = self._renamed(index, files, [path for path in files.others if path not in known], router)
        self._check_tables(files, found)
        for target, path in router.items():
            layer.router[target] = files.names[path]
            for name, axis in self._axes(index, files, path, found.tensors[target]).items():
                layer.axes[name] = axis
        return layer, absent

    def _target(self, index: int, path: str) -> str | None:
        """The parameter of transformers' layer that a tensor is for; None where it is none."""
        start = f"{self.layout.structure.layers}.{index}."
        target = self.names.parameter_of(f"{start}{path}")[0]
        return target.removeprefix(start) if target in self.parameters and target.startswith(start) else None

    def _renamed(self, index: int, files: _Names, unknown: list[str], router: dict[str, str]) -> list[str]:
        """Put in the tensors of a router that mlx-lm calls otherwise; those that it does not have.

        Raises:
            RequestError: If it cannot be told which they are.
        """
        found = self.layout.structure.moe[index]
        count = self.spec.num_experts(self.layout.config, index)
        left = [path for path in unknown if path.startswith(files.block)]
        absent = []
        for target in found.router_tensors:
            if target in router:
                continue
            length, makes_logits = found.tensors[target].length(count), target == found.logits_from
            fit = [
                path
                for path in left
                if (len(files.shapes[path]) == 2 and path.endswith(".weight")) == makes_logits
                and files.shapes[path][0 if makes_logits else -1] == length
            ]
            same = [path for path in fit if path.rpartition(".")[2] == target.rpartition(".")[2]]
            fit = same if len(same) == 1 else fit
            if len(fit) > 1 or (makes_logits and not fit):
                raise RequestError(
                    f"layer {index} of {self.layout.checkpoint.name_or_path} has {len(fit) or 'no'} tensors that can "
                    f"be {target}{': ' if fit else ''}{', '.join(fit)}; an MLX folder of a {self.spec.model_type!r} "
                    "model like this is not known. Prune the original checkpoint, and convert what comes out."
                )
            if fit:
                router[target] = fit[0]
                left.remove(fit[0])
            else:
                absent.append(target)
        for path in left:
            if files.shapes[path] == (count,):
                raise self._fault(files, path, "which may be of its experts, and nothing says so")
        return absent

    def _axes(self, index: int, files: _Names, path: str, axis: ExpertAxis) -> dict[str, ExpertAxis]:
        """How a tensor of a router, and what lies beside it, hold experts."""
        length = axis.length(self.spec.num_experts(self.layout.config, index))
        shape = files.shapes[path]
        places = [place for place, size in enumerate(shape) if size == length]
        beside = files.beside(path)
        if not places or (beside and shape[0] != length):
            raise self._fault(files, path, f"and the router of layer {index} has {length} rows")
        place = axis.axis if axis.axis in places and not beside else places[0]
        axes = {files.names[path]: ExpertAxis(place, axis.each, axis.extra)}
        for other in beside:
            if files.shapes[other][0] != length:
                raise self._fault(files, other, f"and the router of layer {index} has {length} rows")
            axes[files.names[other]] = ExpertAxis(0, axis.each, axis.extra)
        return axes

    def _check_tables(self, files: _Names, found: LayerStructure) -> None:
        """Refuse tables that send tokens to experts by their ids: no mlx-lm model has one that could be tried."""
        table = getattr(self.spec.form, "table", None)
        for path in files.others:
            if table and path.rpartition(".")[2] == table:
                raise self._fault(files, path, "which names experts by number")

    def _fault(self, files: _Names, path: str, why: str) -> RequestError:
        name = files.names[path]
        file = self.layout.checkpoint.tensors[name].file
        return RequestError(f"{file}: {name} has shape {files.shapes[path]}, {why}; this MLX folder cannot be pruned.")
