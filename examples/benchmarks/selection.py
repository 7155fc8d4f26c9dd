# SPDX-License-Identifier: Apache-2.0
"""Enumeration from saved statistics beside re-running the layer for each set.

    python examples/benchmarks/selection.py [--layers 4]

For every layer, the loss of all sets of 4 of 8 experts: once by running the MoE block with the other experts' logits
at minus infinity, set after set, as the reference implementation of the method does; once by the replay. Both must
choose the same sets. The bars are 100 x from saved statistics and 10 x with the calibration counted in.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from common import make_model, make_samples, report, seconds
from torch.nn import functional

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need
from optimum_moe_prune.architectures.block import MoEBlock, moe_blocks
from optimum_moe_prune.collect import collect
from optimum_moe_prune.plan import build_plan
from optimum_moe_prune.progress import progress
from optimum_moe_prune.replay import first_minimum, reconstruction_loss


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--retain", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    a = parser.parse_args()
    model = make_model("mixtral", a.experts, 2, a.hidden, a.width, a.layers, "float32")
    samples = make_samples(a.tokens)
    needs = {Need.ROUTING, Need.GRAM}
    collect(model, samples, needs)  # warm-up
    began = time.perf_counter()
    stats: CalibrationStats = collect(model, samples, needs)
    calibration = time.perf_counter() - began
    config = MoEPrunerConfig(method="enumeration", num_experts=a.retain)
    plan = build_plan(stats, config)
    planning = min(seconds(lambda: build_plan(stats, config)) for _ in range(3))

    inputs = collect(model, samples, {Need.INPUTS})
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
    report("enumeration beside re-running the layer for each set", rows, vars(a))


if __name__ == "__main__":
    main()
