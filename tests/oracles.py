# SPDX-License-Identifier: Apache-2.0
"""What tests compare with: the masked router, a straight loop over tokens and experts, equality to the bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPrunerConfig,
    PruningPlan,
    Sensitivity,
)
from optimum_moe_prune.architectures.routers import SoftmaxTopK
from optimum_moe_prune.calibration.calibrate import calibrate, no_calibration
from optimum_moe_prune.checkpoints.layout import Layout, open_layout
from optimum_moe_prune.commands import main
from optimum_moe_prune.evaluation.measure_sensitivity import measure_sensitivity
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.models.memory import Compute
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.storage.workspace import Workspace


def softmax_rule(top_k: int) -> SoftmaxTopK:
    """A router as Mixtral's."""
    return SoftmaxTopK(top_k, renormalise=True, cast_weights=False)


def expert_output(block: MoEBlock, expert: int, x: Tensor) -> Tensor:
    """One expert on one token, from its matrices."""
    gate_up, down = block.expert_tensors.values()
    gate, up = functional.linear(x, gate_up[expert]).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate) * up, down[expert])


def block_inputs(model: PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    """What the MoE block of each layer sees of one sample, ``(T, H)``."""
    inputs: dict[int, Tensor] = {}
    handles = [
        b.module.register_forward_pre_hook(lambda _m, i, layer=b.layer: inputs.__setitem__(layer, i[0][0]))
        for b in moe_blocks(model)
    ]
    model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return inputs


def straight_loop(model: PreTrainedModel, samples: CalibrationSet) -> dict[int, dict[str, Tensor]]:
    """Every statistic of every layer, one token and one expert at a time, without batches or padding."""
    result: dict[int, dict[str, Tensor]] = {}
    blocks = moe_blocks(model)
    for number, ids in enumerate(samples.token_ids):
        inputs = block_inputs(model, ids)
        routed_before: list[list[int]] = [[] for _ in ids]
        experts_before = 0
        for block in blocks:
            experts = block.num_experts
            tables = result.setdefault(block.layer, {})
            shape = (len(samples), experts_before, experts)
            together = tables.setdefault("coactivation", torch.zeros(shape, dtype=torch.float64))
            routed_here = []
            for token, x in enumerate(inputs[block.layer]):
                logits = block.router(x[None])[0][0]
                p = torch.softmax(logits.double(), 0)
                weights, chosen = (t[0] for t in block.router(x[None])[1:])
                y = torch.stack([expert_output(block, e, x) for e in range(experts)]).double()
                full = sum(w.double() * y[e] for w, e in zip(weights, chosen.tolist(), strict=True))
                row = {
                    name: torch.zeros(experts, dtype=torch.float64)
                    for name in (
                        "routed_tokens",
                        "routed_probability",
                        "probability",
                        "probability_log2",
                        "norm",
                        "squared_norm",
                        "norm_applied",
                        "norm_probability",
                        "norm_renormalised",
                        "single_error",
                        "output_energy",
                        "dense_norm",
                    )
                }
                shape = (len(samples), experts, y.shape[1])
                outputs = tables.setdefault("output_sum", torch.zeros(shape, dtype=torch.float64))
                for before in routed_before[token]:
                    together[number, before] += p
                routed_here.append(chosen.tolist())
                largest = torch.zeros(experts, dtype=torch.float64)
                for e in range(experts):
                    row["probability"][e] = p[e]
                    row["probability_log2"][e] = p[e] * math.log2(p[e])
                    row["dense_norm"][e] = y[e].norm()
                    row["single_error"][e] = (y[e] - full).square().sum()
                    row["output_energy"][e] = full.square().sum()
                for w, e in zip(weights.tolist(), chosen.tolist(), strict=True):
                    norm = y[e].norm()
                    row["routed_tokens"][e] = 1
                    row["routed_probability"][e] = p[e]
                    row["norm"][e] = norm
                    row["squared_norm"][e] = norm**2
                    row["norm_applied"][e] = w * norm
                    row["norm_probability"][e] = p[e] * norm
                    row["norm_renormalised"][e] = p[e] / p[chosen].sum() * norm
                    largest[e] = y[e].abs().max()
                    outputs[number, e] += y[e]
                for name, values in row.items():
                    tables.setdefault(name, torch.zeros(len(samples), experts, dtype=torch.float64))[number] += values
                table = tables.setdefault("max_element", torch.zeros(len(samples), experts, dtype=torch.float64))
                table[number] = torch.maximum(table[number], largest)
                gram = y @ y.T
                triangle = torch.triu_indices(experts, experts)
                for name, value in (
                    ("logits", logits),
                    ("token_single_error", row["single_error"]),
                    ("token_output_energy", row["output_energy"][:1]),
                    ("token_dense_norm", row["dense_norm"]),
                    ("gram", gram[triangle[0], triangle[1]]),
                    ("inputs", x),
                ):
                    tables.setdefault(name, []).append(value.float())  # type: ignore[attr-defined]
            routed_before, experts_before = routed_here, experts
    for tables in result.values():
        for name in ("logits", "token_single_error", "token_output_energy", "token_dense_norm", "gram", "inputs"):
            tables[name] = torch.stack(tables[name])  # type: ignore[arg-type]
    return result


def assert_same(a: CalibrationStats, b: CalibrationStats, rtol: float) -> None:
    assert a.samples == b.samples
    assert torch.equal(a.token_sample, b.token_sample) and torch.equal(a.token_position, b.token_position)
    for index, layer in a.layers.items():
        other = b.layers[index].tensors
        for name in layer.tensors.keys() & other.keys():
            x, y = layer.tensors[name], other[name]
            scale = float(y.abs().mean()) if y.numel() else 0.0
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")


def layout_of(folder: Path) -> Layout:
    return open_layout(folder)


def assert_identical(a: CalibrationStats, b: CalibrationStats) -> None:
    """To the bit, dtypes included."""
    assert a.model == b.model and a.samples == b.samples and a.needs == b.needs
    assert torch.equal(a.token_sample, b.token_sample) and torch.equal(a.token_position, b.token_position)
    assert a.layers.keys() == b.layers.keys()
    for index, layer in a.layers.items():
        assert layer.num_experts == b.layers[index].num_experts and layer.routing == b.layers[index].routing
        assert set(layer.tensors) == set(b.layers[index].tensors)
        for name, tensor in layer.tensors.items():
            other = b.layers[index].tensors[name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), (index, name)


def assert_same_result(command: str, found: Path, expected: Path) -> None:
    """The same statistics, or the same tensors and choice."""
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    if command == "score":
        assert_identical(CalibrationStats.load(found), CalibrationStats.load(expected))
        return
    a, b = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert PruningPlan.load(found).retained == PruningPlan.load(expected).retained
    assert (found / "config.json").read_bytes() == (expected / "config.json").read_bytes()


def plan_for(model: PreTrainedModel, num_experts: int = 4, seed: int = 0, allocation: str = "uniform") -> PruningPlan:
    config = MoEPrunerConfig(method="random", num_experts=num_experts, seed=seed, allocation=allocation)
    return build_plan(no_calibration(model), config)


@contextlib.contextmanager
def masked_routers(model: PreTrainedModel, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The original model, its pruned experts at minus infinity in the routers' logits; the oracle of this file."""
    pruned = {}
    for block in moe_blocks(model):
        (weight,) = block.router_tensors.values()
        pruned[id(weight)] = [e for e in range(block.num_experts) if e not in plan.retained[block.layer]]
    linear = functional.linear

    def masking(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(x, weight, bias)
        if id(weight) in pruned:
            out[:, pruned[id(weight)]] = float("-inf")
        return out

    with monkeypatch.context() as patch:
        patch.setattr(functional, "linear", masking)
        yield


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def calibrated(
    layout: Layout,
    samples: CalibrationSet,
    needs: Any,
    *,
    folder: Path | None = None,
    restart: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    stream: bool | None = None,
    **settings: Any,
) -> CalibrationStats:
    """A checkpoint calibrated, the values of its compute and workspace one by one."""
    compute, workspace = Compute(dtype, device, stream), Workspace(folder, restart)
    return calibrate(layout, samples, needs, compute=compute, workspace=workspace, **settings)


def sensitivity_of(
    model: Any,
    samples: CalibrationSet,
    stats: CalibrationStats,
    recipes: list[MoEPrunerConfig],
    *,
    folder: Path | None = None,
    restart: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    stream: bool | None = None,
    **settings: Any,
) -> Sensitivity:
    """A model or checkpoint measured, the values of its compute and workspace one by one."""
    compute, workspace = Compute(dtype, device, stream), Workspace(folder, restart)
    return measure_sensitivity(model, samples, recipes, stats, compute=compute, workspace=workspace, **settings)
