# SPDX-License-Identifier: Apache-2.0
"""One plan, every form: the sketch by which quantised routers are known, and what is not for a form."""

from __future__ import annotations

import pytest
import torch

from optimum_moe_prune.architectures.fingerprint import same_sketch, sketch_of


def quantised(weight: torch.Tensor, bits: int, group: int = 32) -> torch.Tensor:
    grouped = weight.unflatten(-1, (-1, group))
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((grouped - low) / step).round() * step + low).flatten(-2)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantised_router_is_known_by_its_sketch(bits: int) -> None:
    torch.manual_seed(0)
    layers = {"1": torch.randn(8, 64), "3": torch.randn(128, 256)}
    mine = {layer: sketch_of(weight) for layer, weight in layers.items()}
    assert same_sketch(mine, {layer: sketch_of(quantised(weight, bits)) for layer, weight in layers.items()})
    other = {**mine, "3": sketch_of(torch.randn(128, 256))}
    assert same_sketch(mine, other) is False
    assert (
        same_sketch(mine, {"1": mine["1"], "3": sketch_of(layers["3"].flip(0))}) is False
    )  # experts in another order
    assert same_sketch(mine, {"1": mine["1"]}) is False
    assert same_sketch(mine, {**mine, "3": mine["3"][:4]}) is False
    assert same_sketch({}, mine) is None


def test_a_sketch_never_changes() -> None:
    """Plans hold it: other signs would make strangers of a model and its plan."""
    weight = torch.arange(12 * 70, dtype=torch.float32).reshape(12, 70).sin()
    assert sketch_of(weight)[:4] == SKETCH


SKETCH = [10.7594, -3.60454, -23.0323, -17.8143]
