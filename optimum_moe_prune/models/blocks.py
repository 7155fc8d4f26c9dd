# SPDX-License-Identifier: Apache-2.0
"""MoE blocks inside a model: the only code that touches router and experts modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..architectures.fingerprint import facts_of, fingerprint_of
from ..architectures.routers import RoutingRule
from ..architectures.spec import MoESpec
from ..architectures.table import architecture_of
from ..compat import ModelConfig
from ..errors import RequestError, RunError
from ..storage.values import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states ``(T, H)``, chosen ids ``(T, K)``, weights ``(T, K)`` -> weighted sum ``(T, H)``."""


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model.

    Attributes:
        spec: The architecture.
        layer: Index of its decoder layer.
        module: The block.
        rule: The rule of the model's routers, as its row and its config say.
    """

    spec: MoESpec
    layer: int
    module: nn.Module
    rule: RoutingRule

    @property
    def routing(self) -> RoutingRule:
        """The rule of this router, with what its own tensors add; they have to be there."""
        return self.rule.of_router(self.router_tensors)

    @property
    def experts(self) -> nn.Module:
        return attrgetter(self.spec.experts)(self.module)

    @property
    def router(self) -> nn.Module:
        return attrgetter(self.spec.router)(self.module)

    @property
    def num_experts(self) -> int:
        return len(self.expert_tensors[self.spec.expert_tensors[0]])

    @property
    def expert_tensors(self) -> dict[str, Tensor]:
        """The experts' tensors by name, expert first."""
        return {name: getattr(self.experts, name) for name in self.spec.expert_tensors}

    @property
    def router_tensors(self) -> dict[str, Tensor]:
        """The router's tensors with a row per expert, by path below the block."""
        return {path: attrgetter(path)(self.module) for path in self.spec.router_tensors}

    def retain(self, retained: Sequence[int]) -> None:
        """Keep these experts only: their tensors, their rows of the router, and every count the modules remember."""
        for name, tensor in self.expert_tensors.items():
            _replace(self.experts, name, _rows(tensor, retained))
        for path, tensor in self.router_tensors.items():
            owner, name = _owner(self.module, path)
            _replace(owner, name, _rows(tensor, retained))
        for path in self.spec.block_counts:
            owner, name = _owner(self.module, path)
            setattr(owner, name, len(retained))

    @contextlib.contextmanager
    def observed(
        self,
        on_logits: Callable[[Tensor], None],
        forward: Callable[[ExpertsForward, Tensor, Tensor, Tensor], Tensor],
    ) -> Iterator[None]:
        """Watch the router and stand in for the experts inside a ``with``.

        Args:
            on_logits: Called with the router's logits ``(T, E)``.
            forward: Called in place of the experts with their own forward, the hidden states ``(T, H)``, and the ids
                and weights ``(T, K)`` the router really chose; what it returns is the experts' output.
        """
        experts = self.experts
        # Hooks of accelerate live in the instance as well: stand before them, and leave them as they were.
        before = experts.__dict__.get("forward")
        original = experts.forward

        def observing(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return forward(original, hidden_states, top_k_index, top_k_weights)

        handle = self.router.register_forward_hook(lambda _module, _inputs, output: on_logits(output[0]))
        experts.forward = observing
        try:
            yield
        finally:
            handle.remove()
            if before is None:
                del experts.forward
            else:
                experts.forward = before

    @contextlib.contextmanager
    def restricted(self, retained: Sequence[int]) -> Iterator[None]:
        """Calculate as if only these experts were left, inside a ``with``; no expert is copied.

        The router has the rows it would have in the pruned model; the ids it chooses are put back into the numbering
        of the experts that are there.
        """
        of_router = f"{self.spec.router}."
        before: list[tuple[nn.Module, str, Any]] = []
        for path, tensor in self.router_tensors.items():
            owner, name = _owner(self.module, path)
            before.append((owner, name, getattr(owner, name)))
            _replace(owner, name, _rows(tensor, retained))
        for path in self.spec.block_counts:
            if path.startswith(of_router):
                owner, name = _owner(self.module, path)
                before.append((owner, name, getattr(owner, name)))
                setattr(owner, name, len(retained))
        ids = torch.tensor(retained, device=next(iter(self.router_tensors.values())).device)

        def forward(experts: ExpertsForward, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return experts(hidden_states, ids[index], weights)

        try:
            with self.observed(lambda logits: None, forward):
                yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The MoE blocks of a model, in layer order; dense layers are left out.

    Args:
        model: A causal language model of a known architecture.

    Raises:
        RequestError: If the architecture is not known, or no layer has experts.
    """
    config: ModelConfig = model.config
    spec = architecture_of(config)
    rule = spec.routing(config)
    own = set(getattr(config, "per_layer_attributes", None) or ()) & {spec.top_k_key, spec.renormalise}
    if own:
        raise RequestError(
            f"the layers of this model differ in {', '.join(sorted(map(str, own)))}; that is not supported."
        )
    try:
        layers = attrgetter(spec.layers)(model)
    except AttributeError as error:
        raise RequestError(
            f"a {type(model).__name__} has no {spec.layers!r}; load the model with AutoModelForCausalLM."
        ) from error
    blocks = []
    for index, layer in enumerate(layers):
        module = attrgetter(spec.block)(layer)
        if type(module).__name__ == spec.block_class:
            blocks.append(MoEBlock(spec, index, module, rule))
    if not blocks:
        raise RequestError(
            f"none of the {len(layers)} layers of this {spec.model_type!r} model has experts, so there is nothing to "
            "prune."
        )
    for block in blocks:
        try:
            tensors = {**block.expert_tensors, **block.router_tensors}
        except AttributeError as error:
            raise RequestError(
                f"layer {block.layer}: {error}. Only unquantised models with fused experts (transformers 5) can be "
                "pruned."
            ) from error
        counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
        if len(set(counts.values())) != 1:
            raise RunError(f"layer {block.layer}: its tensors disagree about the number of experts: {counts}.")
    return blocks


def dense_layers(model: Any) -> list[int]:
    """Decoder layers without experts."""
    sparse = {block.layer for block in moe_blocks(model)}
    return [i for i in range(len(attrgetter(architecture_of(model.config).layers)(model))) if i not in sparse]


def fingerprint(blocks: Sequence[MoEBlock]) -> str:
    """sha256 of the router weights in layer order as float32, with expert counts and top_k."""
    return fingerprint_of((b.layer, b.num_experts, b.rule.top_k, b.router_tensors.values()) for b in blocks)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return (attrgetter(parent)(module) if parent else module), name


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    return tensor.detach().index_select(0, torch.tensor(rows, device=tensor.device))


def _replace(owner: nn.Module, name: str, value: Tensor) -> None:
    """Put a new tensor in place of a parameter or buffer."""
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        setattr(owner, name, value)


def moe_layers(model_config: ModelConfig) -> tuple[dict[int, int], RoutingRule]:
    """Experts in each MoE layer and the rule of their routers, from a config alone (a model without weights)."""
    with torch.device("meta"):
        blocks = moe_blocks(AutoModelForCausalLM.from_config(model_config))
    return {block.layer: block.num_experts for block in blocks}, blocks[0].rule


def model_facts(model: PreTrainedModel) -> Json:
    """What statistics and plans remember of the model they were made for."""
    blocks = moe_blocks(model)
    return facts_of(blocks[0].spec, model.config, fingerprint(blocks), dense_layers(model))
