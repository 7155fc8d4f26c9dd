# SPDX-License-Identifier: Apache-2.0
"""Enumeration from saved statistics beside re-running the layer for each set, and plans of large models.

    python examples/benchmarks/selection.py [--layers 4] [--only plans]

For every layer, the loss of all sets of 4 of 8 experts: once by running the MoE block with the other experts' logits
at minus infinity, set after set, as the reference implementation of the method does; once by the replay. Both must
choose the same sets. The bars are 100 x from saved statistics and 10 x with the calibration counted in.

Then plans that keep half of the experts, by every method, from saved statistics in the shape of Mixtral (32 layers of
8 experts, of which 2 are used; bar 1 second), of 48 layers of 128 experts (bar 10 seconds) and of 60 of 256 (bar 20
seconds), of which 8 are used. The statistics are drawn at random and read from disk as saved ones are. Of many layers
a few are measured, and the time is multiplied: they are planned one by one. Only Pathfinder looks at all layers at
once; see ``paths.py``. What is imported on the way is imported before.

K-Means, as Mosaic finds domains, beside scikit-learn's on all kept inputs: the time (bar 0.75 of it) and the inertia
of all inputs (bar 1.03 of it), means of three seeds.

The most anonymous memory that a plan takes in one of 61 layers of 384 experts (bar 1 GiB) from 8,192 kept tokens,
above what it is before; a layer of such statistics with Gram matrices takes 2.5 GB on disk.

And a report (bar 15 seconds) of a Mosaic plan of 60 layers of 256 experts.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import GIB, MIB, make_model, make_samples, report, seconds, watching
from synthetic import random_stats
from torch.nn import functional

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need, calibrate
from optimum_moe_prune.methods import get_method, list_methods
from optimum_moe_prune.methods.clustering import kmeans, partition
from optimum_moe_prune.methods.replay import first_minimum, reconstruction_loss
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.progress import progress
from optimum_moe_prune.publishing.report import write_report


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


def saved_stats(folder: str | Path, layers: int, experts: int, top_k: int, needs: set[Need], a: argparse.Namespace,
                kept: int | None = None) -> CalibrationStats:  # fmt: skip
    """Random statistics, read from a folder as saved ones are."""
    random_stats(layers, experts, top_k, 128, needs, a.kept if kept is None else kept, a.model_hidden).save(folder)
    return CalibrationStats.load(folder)


def warm_up() -> None:
    """Import what plans import."""
    names = ["scipy.cluster.hierarchy", "scipy.stats", "sklearn.cluster", "sklearn.metrics"]
    for name in [*names, "jinja2", "matplotlib.backends.backend_svg", "matplotlib.figure", "matplotlib.style"]:
        importlib.import_module(name)


def plan_rows(
    layers: int, experts: int, top_k: int, measured: int, bar: float, a: argparse.Namespace
) -> list[dict[str, object]]:
    """Seconds of a plan by each method that chooses sets, and by the slowest of those that score."""
    measured = min(measured, layers)
    shape = f"{layers} x {experts}" + (f" (from {measured})" if measured < layers else "")
    needs = set(Need) if measured == layers else set(Need) - {Need.COACTIVATION}
    with tempfile.TemporaryDirectory() as folder:
        stats = saved_stats(folder, measured, experts, top_k, needs, a)
        taken: dict[str, float] = {}
        for name in sorted(set(list_methods()) - {"auto"}):
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
    warm_up()
    rows = plan_rows(a.mixtral_layers, 8, 2, a.mixtral_layers, 1, a)
    rows += plan_rows(48, a.many_experts, 8, a.measured_layers, 10, a)
    rows += plan_rows(60, 2 * a.many_experts, 8, a.measured_layers, 20, a)
    report(f"plans from saved statistics of {a.kept} tokens", rows, vars(a), "seconds")


def inertia(points: np.ndarray, label: np.ndarray) -> float:
    """The sum of squared distances to the means of clusters."""
    clusters = (points[label == cluster].astype(np.float64) for cluster in np.unique(label))
    return sum(float(np.square(rows - rows.mean(axis=0)).sum()) for rows in clusters)


def clusterings(a: argparse.Namespace) -> None:
    """K-Means of some of the kept inputs beside K-Means of all."""
    warm_up()
    rows: list[dict[str, object]] = []
    for kept, count in itertools.product((a.kept, 4 * a.kept), (3, a.many_experts // 2 - 1)):
        layer = random_stats(1, 8, 2, 128, {Need.INPUTS}, kept, a.model_hidden).layers[0]
        inputs = layer.tensors["inputs"]
        points, weights = inputs.float().numpy(), np.ones(kept)
        ways: list[Callable[[int], np.ndarray]] = [
            lambda seed, x=inputs, k=count, w=weights: partition(x, k, seed, w),
            lambda seed, x=points, k=count, w=weights: kmeans(x, k, seed, weights=w).labels_,
        ]
        (took, left), (whole, best) = ([*timed_inertia(way, points)] for way in ways)
        what = f"{count} domains of {kept} tokens"
        ms = {"ms": 1000 * took, "ms of all": 1000 * whole}
        rows.append({"K-Means": f"{what}, time", **ms, "ratio": took / whole, "bar": 0.75})
        rows.append({"K-Means": f"{what}, inertia", **dict.fromkeys(ms, ""), "ratio": left / best, "bar": 1.03})
    report("K-Means of some kept inputs beside all of them", rows, vars(a), "ratio")


def timed_inertia(way: Callable[[int], np.ndarray], points: np.ndarray) -> tuple[float, float]:
    """Seconds and inertia of a way to cluster points, means of three seeds."""
    taken, inertias = [], []
    for seed in range(3):
        began = time.perf_counter()
        label = way(seed)
        taken.append(time.perf_counter() - began)
        inertias.append(inertia(points, label))
    return float(np.mean(taken)), float(np.mean(inertias))


MEMORY = {"mosaic": {}, "mosaic, 2 generalists": {"num_generalists": 2}, "enumeration": {}, "variability": {}}


def memory(a: argparse.Namespace) -> None:
    """The most memory of plans."""
    warm_up()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        experts = 3 * a.many_experts
        stats = saved_stats(folder, 1, experts, 8, set(Need) - {Need.COACTIVATION}, a, 4 * a.kept)
        for name, options in MEMORY.items():
            config = MoEPrunerConfig(method=name.split(",")[0], sparsity=0.5, method_options=options)
            with watching() as seen:
                build_plan(stats, config)
            rows.append({"plan": name, "peak MiB": seen["peak MiB"], "bar": GIB // MIB})
    report(f"memory of a plan of a layer of {experts} experts, {4 * a.kept} tokens", rows, vars(a), "peak MiB")


def reports(a: argparse.Namespace) -> None:
    """A report of many layers of many experts."""
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        needs = {Need.ROUTING, Need.ROUTED_NORMS, Need.SINGLE_ERROR, Need.INPUTS}
        stats = saved_stats(Path(folder) / "stats", a.report_layers, 2 * a.many_experts, 8, needs, a)
        plan = build_plan(stats, MoEPrunerConfig(method="mosaic", sparsity=0.5))
        took = seconds(lambda: write_report(Path(folder) / "report.html", stats=stats, plans=[plan]))
    what = f"statistics and a Mosaic plan of {a.report_layers} x {2 * a.many_experts}"
    rows: list[dict[str, object]] = [{"report": what, "seconds": took, "bar": 15}]
    report("report", rows, vars(a), "seconds")


TABLES = {"sets": compare, "plans": plans, "clusterings": clusterings, "memory": memory, "report": reports}


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
    parser.add_argument("--measured-layers", type=int, default=3, help="of 48, and of 60")
    parser.add_argument("--report-layers", type=int, default=60)
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    a = parser.parse_args()
    for name, table in TABLES.items():
        if a.only in (None, name):
            table(a)


if __name__ == "__main__":
    main()
