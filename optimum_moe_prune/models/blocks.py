# SPDX-License-Identifier: Apache-2.0
"""MoE blocks inside a model: the only code that touches router and experts modules."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architectures.fingerprint import facts_of, fingerprints_of
from ..architectures.routers import RoutingRule
from ..architectures.spec import MoESpec
from ..architectures.structure import ExpertAxis, LayerStructure, owner, part, structure_of
from ..architectures.table import architecture_for, architecture_of
from ..architectures.tables import remapped
from ..compat import ModelConfig, build_on_meta, name_of_config, text_config
from ..errors import RequestError, RunError, faults_of
from ..storage.values import Json
from .experts import ExpertsForward, Observing, ObservingScaledInput, OnLogits, StandIn
from .numbered import ObservingModules, keep_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model.

    Attributes:
        spec: The architecture.
        layer: Index of its decoder layer.
        decoder_layer: That layer.
        structure: Where it has what.
        rule: The rule of the model's routers, as its row and its config say.
        is_head: Whether the layer is a head for further tokens, and no layer of the model itself.
    """

    spec: MoESpec
    layer: int
    decoder_layer: nn.Module
    structure: LayerStructure
    rule: RoutingRule
    is_head: bool = False

    @property
    def routing(self) -> RoutingRule:
        """The rule of this router, with what its own tensors add; they have to be there."""
        router, start = self.router, self._below(self.structure.router)
        own = {f"{start}.{name}": tensor for name, tensor in (*router.named_parameters(), *router.named_buffers())}
        return self.rule.of_router({**own, **self.router_tensors})

    @property
    def module(self) -> nn.Module:
        """The block; the decoder layer itself where that has experts and router."""
        return part(self.decoder_layer, self.structure.block)

    @property
    def experts(self) -> nn.Module:
        return part(self.decoder_layer, self.structure.experts)

    @property
    def router(self) -> nn.Module:
        return part(self.decoder_layer, self.structure.router)

    @property
    def num_experts(self) -> int:
        if self.structure.numbered:
            return len(self.experts)  # type: ignore[arg-type]  # a list
        path = self.structure.expert_tensors[0]
        return self.structure.tensors[path].count(part(self.decoder_layer, path).shape)

    @property
    def expert_tensors(self) -> dict[str, Tensor]:
        """The experts' tensors by name, expert first; where each has its own, stacked."""
        if self.structure.numbered:
            experts: Any = self.experts
            return {path: torch.stack([part(e, path) for e in experts]) for path in self.structure.numbered}
        return {path.rpartition(".")[2]: part(self.decoder_layer, path) for path in self.structure.expert_tensors}

    @property
    def router_tensors(self) -> dict[str, Tensor]:
        """The router's tensors that hold experts, by path below the block; the one that makes the logits first."""
        return {self._below(path): part(self.decoder_layer, path) for path in self.structure.router_tensors}

    @property
    def table(self) -> str | None:
        """The path of the table that says by a token's id where it goes, in a layer that has one."""
        return table_of(self.spec, self.decoder_layer, self.structure)

    def retain(self, retained: Sequence[int]) -> None:
        """Keep these experts only: their tensors, their rows of the router, and every count the modules remember."""
        count = self.num_experts
        if (table := self.table) is not None:
            ids = remapped(
                part(self.decoder_layer, table), part(self.decoder_layer, self.structure.logits_from), retained
            )
            replace_tensor(*owner(self.decoder_layer, table), ids)
        if self.structure.numbered:
            keep_modules(self.experts, retained)  # type: ignore[arg-type]  # a list
        for path, axis in self.structure.tensors.items():
            replace_tensor(
                *owner(self.decoder_layer, path), _cut(part(self.decoder_layer, path), axis, retained, count)
            )
        for path, more in self.structure.counts.items():
            module, name = owner(self.decoder_layer, path)
            setattr(module, name, len(retained) + more)

    @contextlib.contextmanager
    def observed(self, on_logits: OnLogits, forward: StandIn) -> Iterator[None]:
        """Watch the router and stand in for the experts inside a ``with``.

        Args:
            on_logits: Called with the router's logits ``(T, E)``, as its own matrix product gives them.
            forward: Called in place of the experts with their own forward, the hidden states ``(T, H)``, and the ids
                and weights ``(T, K)`` the router really chose; what it returns is the experts' output.
        """
        weight = part(self.decoder_layer, self.structure.logits_from)
        if self.calls_modules:
            with ObservingModules(self.module, self.experts, weight, self.routing, on_logits, forward):  # type: ignore[arg-type]
                yield
            return
        kind = ObservingScaledInput if getattr(self.rule, "on_input", False) else Observing
        with kind(self.experts, self.router, weight, on_logits, forward, self.spec.at_least):
            yield

    @contextlib.contextmanager
    def restricted(self, retained: Sequence[int], instead: StandIn | None = None) -> Iterator[None]:
        """Calculate as if only these experts were left, inside a ``with``; no expert is copied.

        The router has the rows it would have in the pruned model; the ids it chooses are put back into the numbering
        of the experts that are there.

        Args:
            retained: Ids of the experts, in rising order.
            instead: Called in place of the experts, as by :meth:`observed`, with the ids that they have in this block.
        """
        layer, structure, count = self.decoder_layer, self.structure, self.num_experts
        lists: Any = self.experts if structure.numbered else ()
        modules = list(lists)
        before: list[tuple[nn.Module, str, Any]] = []

        def swap(path: str, value: Any) -> None:
            module, name = owner(layer, path)
            before.append((module, name, getattr(module, name)))
            replace_tensor(module, name, value)

        if (table := self.table) is not None:
            swap(table, remapped(part(layer, table), part(layer, structure.logits_from), retained))
        for path in structure.router_tensors:
            swap(path, _cut(part(layer, path), structure.tensors[path], retained, count))
        for path, more in structure.counts.items():
            if self.calls_modules or path.startswith(f"{structure.router}."):
                swap(path, len(retained) + more)
        if self.calls_modules:
            keep_modules(lists, retained)
        extra = structure.tensors[structure.logits_from].extra
        ids = torch.tensor([*retained, *range(count, count + extra)], device=part(layer, structure.logits_from).device)

        def forward(experts: ExpertsForward, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            run = experts if instead is None else functools.partial(instead, experts)
            return run(experts.renumbered(hidden, ids), ids[index], weights)

        plain = self.calls_modules and instead is None
        try:
            with contextlib.nullcontext() if plain else self.observed(lambda logits: None, forward):
                yield
        finally:
            if self.calls_modules:
                keep_modules(lists, ())
                lists.extend(modules)
            for module, name, value in reversed(before):
                setattr(module, name, value)

    @property
    def calls_modules(self) -> bool:
        """Whether the block calls its experts one by one, and not a module of them all."""
        return bool(self.structure.numbered) and type(self.experts).forward is nn.ModuleList.forward

    def _below(self, path: str) -> str:
        return path.removeprefix(f"{self.structure.block}.") if self.structure.block else path


def moe_blocks(model: Any) -> list[MoEBlock]:
    """The MoE blocks of a model, in layer order; dense layers are left out.

    Args:
        model: A causal language model of a known architecture, or one that sees or hears as well.

    Raises:
        RequestError: If the architecture is not known, or no layer has experts.
    """
    config: ModelConfig = model.config
    spec = architecture_for(model, config)
    rule = spec.routing(config)
    own = set(getattr(text_config(config), "per_layer_attributes", None) or ()) & {spec.key_of_top_k(config)}
    if own:
        raise RequestError(f"the layers of this model differ in {', '.join(sorted(own))}; that is not supported.")
    structure = structure_of(model, spec)
    layers = part(model, structure.layers)
    blocks = []
    for index, found in structure.moe.items():
        layer = layers[index]
        try:
            tensors = {path: part(layer, path).shape for path in found.tensors}
        except AttributeError as error:
            raise RequestError(
                f"layer {index}: {error}. Only unquantised models with fused experts (transformers 5) can be pruned."
            ) from error
        counts = {
            path: axis.count(tensors[path]) for path, axis in found.tensors.items() if len(tensors[path]) > axis.axis
        }
        if found.numbered:
            counts[found.experts] = len(part(layer, found.experts))
        if len(set(counts.values())) != 1:
            raise RunError(f"layer {index}: its tensors disagree about the number of experts: {counts}.")
        of_layer = rule if table_of(spec, layer, found) is None else spec.by_table(rule)
        blocks.append(MoEBlock(spec, index, layer, found, of_layer))
    return blocks


def table_of(spec: MoESpec, layer: nn.Module, structure: LayerStructure) -> str | None:
    """The path below a decoder layer of the table that sends tokens to experts by their ids, or None."""
    name = getattr(spec.form, "table", "")
    return f"{structure.router}.{name}" if name and hasattr(part(layer, structure.router), name) else None


def decoder_of(model: Any) -> Any:
    """The part of a model that runs the decoder layers, and takes token ids."""
    return part(model, structure_of(model, architecture_of(model.config)).decoder)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers."""
    return part(model, structure_of(model, architecture_of(model.config)).layers)


def dense_layers(model: Any) -> list[int]:
    """Decoder layers without experts."""
    structure = structure_of(model, architecture_of(model.config))
    return [index for index in range(len(part(model, structure.layers))) if index not in structure.moe]


def fingerprint(blocks: Sequence[MoEBlock]) -> Json:
    """The fingerprints of a model (``architectures.fingerprint``)."""
    return fingerprints_of((b.layer, b.num_experts, b.rule.top_k, b.router_tensors.values()) for b in blocks)


def _cut(tensor: Tensor, axis: ExpertAxis, retained: Sequence[int], count: int) -> Tensor:
    """What is left of a tensor of ``count`` experts; always a tensor of its own."""
    rows = axis.rows(retained, count)
    return tensor.detach().index_select(axis.axis, torch.tensor(rows, device=tensor.device))


def replace_tensor(module: nn.Module, name: str, value: Any) -> None:
    """Put something new in place of a parameter, a buffer or a number."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(module, name, value)


def moe_layers(model_config: ModelConfig, trust_remote_code: bool = False) -> tuple[dict[int, int], RoutingRule]:
    """Experts in each MoE layer and the rule of their routers, from a config alone (a model without weights)."""
    with faults_of(f"config.json of {name_of_config(model_config) or 'the model'}"):
        blocks = moe_blocks(build_on_meta(model_config, trust_remote_code=trust_remote_code))
    return {block.layer: block.num_experts for block in blocks}, blocks[0].rule


def model_facts(model: PreTrainedModel) -> Json:
    """What statistics and plans remember of the model they were made for."""
    blocks = moe_blocks(model)
    return facts_of(blocks[0].spec, model.config, fingerprint(blocks), dense_layers(model))
