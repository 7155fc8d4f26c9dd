# SPDX-License-Identifier: Apache-2.0
"""The tensors of one MoE block in files."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..architectures.structure import ExpertAxis


@dataclass
class MoELayer:
    """The tensors of one MoE block in files, by name in the checkpoint.

    Attributes:
        num_experts: Experts, as the config says.
        experts: By expert, where each has tensors of its own: path below the expert -> name.
        fused: Tensors with all experts: path below the experts -> name.
        router: Tensors with something of each expert: path below the decoder layer -> name.
        table: The table that says by a token's id where it goes, in a layer that has one.
        whole: Tensors beside these that are of no single expert: scales of a whole router or of all experts.
        fixed: Experts after these that stay, and do not count.
        projections: What each expert has of its own, with the shape the config says where that can be told.
        axes: How each tensor that is cut holds experts.
    """

    num_experts: int
    experts: dict[int, dict[str, str]] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    router: dict[str, str] = field(default_factory=dict)
    table: str = ""
    whole: list[str] = field(default_factory=list)
    fixed: int = 0
    projections: dict[str, tuple[int, ...]] = field(default_factory=dict)
    axes: dict[str, ExpertAxis] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All these tensors."""
        numbered = [name for tensors in self.experts.values() for name in tensors.values()]
        table = [self.table] if self.table else []
        return [*numbered, *self.fused.values(), *self.router.values(), *table, *self.whole]
