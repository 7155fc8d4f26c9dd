# SPDX-License-Identifier: Apache-2.0
"""The best paths through 48 layers of 128 experts, and plans of that shape from statistics.

    python examples/benchmarks/paths.py [--samples 128]

The bars are 2 seconds for the 500 best paths of one sample with transitions of any weights, and 60 seconds for a plan.
Then plans from the 5,000 best paths through 60 layers of 256 experts, by Pathfinder and its ablations, whose bar is 20
seconds. Statistics are drawn at random, so what is chosen means nothing.
"""

from __future__ import annotations

import argparse
import resource

import numpy as np
from common import report, seconds
from synthetic import random_stats

from optimum_moe_prune import MoEPrunerConfig, Need
from optimum_moe_prune.methods.paths import k_best_paths
from optimum_moe_prune.planning.build import build_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--paths", type=int, default=500)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--many-layers", type=int, default=60, help="of twice as many experts")
    parser.add_argument("--many-paths", type=int, default=5000)
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    nodes = [rng.normal(size=a.experts) for _ in range(a.layers)]
    edges = [rng.normal(size=(a.experts, a.experts)) for _ in range(a.layers - 1)]
    one = min(seconds(lambda: k_best_paths(nodes, edges, a.paths)) for _ in range(3))
    rows: list[dict[str, object]] = [{"what": f"{a.paths} best paths, one sample", "seconds": one, "bar": 2}]
    for transitions in ("mean", "conditional"):
        needs = {Need.ROUTING, Need.DENSE_NORMS, Need.SINGLE_ERROR}
        needs |= {Need.COACTIVATION} if transitions == "conditional" else set()
        stats = random_stats(a.layers, a.experts, a.top_k, a.samples, needs)
        options = {"transitions": transitions, "num_paths": a.paths}
        config = MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options=options)
        took = seconds(lambda c=config, s=stats: build_plan(s, c))
        rows.append({"what": f"plan, {a.samples} samples, {transitions} transitions", "seconds": took, "bar": 60})
        del stats
    longest: list[dict[str, object]] = []
    many = random_stats(a.many_layers, 2 * a.experts, a.top_k, a.samples, needs - {Need.COACTIVATION})
    for method in ("pathfinder", "transition", "importance"):
        config = MoEPrunerConfig(method=method, sparsity=0.5, method_options={"num_paths": a.many_paths})
        took = seconds(lambda c=config: build_plan(many, c))
        shape = f"{a.many_layers} x {2 * a.experts}"
        longest.append({"what": f"plan by {method}, {shape}, {a.many_paths} paths", "seconds": took, "bar": 20})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    report(f"many paths (peak memory {peak:.1f} GiB)", longest, vars(a), "seconds")
    report(f"paths through {a.layers} layers of {a.experts} experts", rows, vars(a), "seconds")


if __name__ == "__main__":
    main()
