# SPDX-License-Identifier: Apache-2.0
"""Enumeration from saved statistics beside re-running the layer for each set, and plans of large models.

    python examples/benchmarks/selection.py [--layers 4] [--only plans]

For every layer, the loss of all sets of 4 of 8 experts: once by running the MoE block with the other experts' logits
at minus infinity, set after set, as the reference implementation of the method does; once by the replay. Both must
choose the same sets. The bars are 100 x from saved statistics and 10 x with the calibration counted in.

Then plans that keep half of the experts, by every method, from saved statistics in the shape of Mixtral (32 layers of
8 experts, of which 2 are used; bar 2 seconds) and of 48 layers of 128 experts, of which 8 are used (bar 60 seconds).
The statistics are drawn at random and read from disk as saved ones are. Of the 48 layers a few are measured, and the
time is multiplied: they are planned one by one. Only Pathfinder looks at all layers at once; see ``paths.py``.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time

import torch
from common import make_model, make_samples, report, seconds
from synthetic import random_stats
from torch.nn import functional

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need, calibrate
from optimum_moe_prune.methods import get_method, list_methods
from optimum_moe_prune.methods.replay import first_minimum, reconstruction_loss
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.progress import progress


@torch.no_grad()
def rerun(block: MoEBlock, inputs: torch.Tensor, samples: CalibrationSet, size: int) -> tuple[int, ...]:
    """The best set of one layer, by running its block for each of them.

    Args:
        block: The layer's MoE block.
        inputs: Its inputs ``(T, H)``, sample by sample.
        samples: The samples the tokens belong to.
        size: Experts to retain.
    """
    (weight,) = block.router_tensors.values()
    sample = torch.arange(len(samples)).repeat_interleave(torch.tensor([s.num_tokens for s in samples.samples]))
    linear, pruned = functional.linear, list[int]()

    def masking(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = linear(x, w, bias)
        if w is weight:
            out[:, pruned] = float("-inf")
        return out

    functional.linear = masking
    try:
        whole = block.module(inputs[None])[0]
        sets = list(itertools.combinations(range(block.num_experts), size))
        losses = []
        for retained in progress(sets, f"layer {block.layer}", unit="set"):
            pruned[:] = [e for e in range(block.num_experts) if e not in retained]
            errors = (block.module(inputs[None])[0] - whole).double().square().sum(1)
            losses.append(reconstruction_loss(errors, sample, torch.ones(len(samples))))
    finally:
        functional.linear = linear
    return sets[first_minimum(torch.stack(losses))]


def compare(a: argparse.Namespace) -> None:
    """Enumeration beside re-running the layers."""
    model = make_model("mixtral", a.experts, 2, a.hidden, a.width, a.layers, "float32")
    samples = make_samples(a.tokens)
    needs = {Need.ROUTING, Need.GRAM}
    calibrate(model, samples, needs)  # warm-up
    began = time.perf_counter()
    stats: CalibrationStats = calibrate(model, samples, needs)
    calibration = time.perf_counter() - began
    config = MoEPrunerConfig(method="enumeration", num_experts=a.retain)
    plan = build_plan(stats, config)
    planning = min(seconds(lambda: build_plan(stats, config)) for _ in range(3))

    inputs = calibrate(model, samples, {Need.INPUTS})
    began = time.perf_counter()
    reference = {
        block.layer: rerun(block, inputs.layers[block.layer].tensors["inputs"], samples, a.retain)
        for block in moe_blocks(model)
    }
    rerunning = time.perf_counter() - began
    same = plan.retained == reference
    rows: list[dict[str, object]] = [
        {
            "enumeration": "re-running each layer",
            "seconds": rerunning,
            "times faster": 1.0,
            "bar": "",
            "same sets": "",
        },
        {
            "enumeration": "from saved statistics",
            "seconds": planning,
            "times faster": rerunning / planning,
            "bar": 100,
            "same sets": same,
        },
        {
            "enumeration": "with the calibration",
            "seconds": planning + calibration,
            "times faster": rerunning / (planning + calibration),
            "bar": 10,
            "same sets": same,
        },
    ]
    title = "enumeration beside re-running the layer for each set"
    report(title, rows, vars(a), "times faster", at_least=True)


def plan_rows(
    layers: int, experts: int, top_k: int, measured: int, bar: float, a: argparse.Namespace
) -> list[dict[str, object]]:
    """Seconds of a plan by each method that chooses sets, and by the slowest of those that score."""
    shape = f"{layers} x {experts}" + (f" (from {measured})" if measured < layers else "")
    needs = set(Need) if measured == layers else set(Need) - {Need.COACTIVATION}
    with tempfile.TemporaryDirectory() as folder:
        random_stats(measured, experts, top_k, 128, needs, a.kept, a.model_hidden).save(folder)
        stats = CalibrationStats.load(folder)
        taken: dict[str, float] = {}
        for name in list_methods():
            if measured == layers or "global" != get_method(name).allocations[0]:
                config = MoEPrunerConfig(method=name, sparsity=0.5)
                taken[name] = seconds(lambda c=config: build_plan(stats, c)) * layers / measured
    sets = [name for name in taken if get_method(name).retained is not None]
    scores = [name for name in taken if name not in sets]
    slowest = max(scores, key=lambda name: taken[name])
    named = {**{name: taken[name] for name in sets}, f"slowest of {len(scores)} others ({slowest})": taken[slowest]}
    return [{"plan": name, "layers x experts": shape, "seconds": took, "bar": bar} for name, took in named.items()]


def plans(a: argparse.Namespace) -> None:
    """Plans from saved statistics."""
    rows = plan_rows(a.mixtral_layers, 8, 2, a.mixtral_layers, 2, a)
    rows += plan_rows(48, a.many_experts, 8, a.measured_layers, 60, a)
    report(f"plans from saved statistics of {a.kept} tokens", rows, vars(a), "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--retain", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kept", type=int, default=2048, help="tokens in the statistics that plans are made from")
    parser.add_argument("--model-hidden", type=int, default=2048, help="hidden size in those statistics")
    parser.add_argument("--mixtral-layers", type=int, default=32)
    parser.add_argument("--many-experts", type=int, default=128)
    parser.add_argument("--measured-layers", type=int, default=3, help="of 48")
    parser.add_argument("--only", choices=("sets", "plans"), help="one of the two tables")
    a = parser.parse_args()
    if a.only != "plans":
        compare(a)
    if a.only != "sets":
        plans(a)


if __name__ == "__main__":
    main()
