# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint in bfloat16 costs beside the same calculated in float32, whatever the processor multiplies fast.

    python examples/benchmarks/precision.py [--simulate avx2] [--experts 64 --top-k 8 --width 256] [--models mixtral]

Three tables. *CPU seconds* of a calibration (for REAP and for Mosaic, in memory and one layer at a time), of a
sensitivity and of an evaluation, with ``--dtype auto`` and with ``float32``: the bar of the ratio is 1.15, on any
processor; with ``--narrow`` also what calibrations with ``--dtype bfloat16`` take. *Memory* of a calibration and of an
evaluation in processes of their own: what ``auto`` takes beyond ``bfloat16``; the bar is one layer of the files (or
32 MiB, where a layer is less than what the allocator leaves lying).
*Plans* of the small trained models: how many of the retained experts differ between calibrations in bfloat16 and in
float32, and between ``auto`` and float32.

``--simulate avx2`` has the libraries beneath torch use nothing beyond AVX2, as on a processor without units for
bfloat16; ``avx512`` nothing beyond AVX-512. Where the processor has units, ``auto`` calculates in bfloat16.
"""

from __future__ import annotations

import os
import sys

SIMULATED = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
if __name__ == "__main__" and "--simulate" in sys.argv[:-1]:  # they look at it when they are imported
    os.environ.update(SIMULATED.get(sys.argv[sys.argv.index("--simulate") + 1], {}))

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from common import MIB, in_child, make_model, make_samples, report, serve, watching  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from optimum_moe_prune import (  # noqa: E402
    CalibrationSet,
    Compute,
    MoEPrunerConfig,
    calibrate,
    compare,
    list_methods,
    measure_sensitivity,
)
from optimum_moe_prune.checkpoints.layout import open_layout  # noqa: E402
from optimum_moe_prune.models.precision import computing_dtype, slowness  # noqa: E402
from optimum_moe_prune.planning.build import build_plan  # noqa: E402

HERE = Path(__file__).resolve().parent
SMALL = HERE.parent / "small_models"
sys.path.insert(0, str(SMALL))
import corpus  # noqa: E402

BAR = 1.15
DTYPES = ("auto", "float32", "bfloat16")


def work_of(name: str, folder: str, samples: CalibrationSet, batch_size: int, dtype: str, stats: Any = None) -> Any:
    """One of the things that are measured."""
    stream = name.endswith("streamed")
    compute = Compute(dtype, stream=stream)
    if name.startswith("calibration"):
        method = name.split()[1].rstrip(",")
        return calibrate(folder, samples, method, batch_size=batch_size, compute=compute)
    if name == "sensitivity":
        recipe = MoEPrunerConfig(method="reap", sensitivity_samples=len(samples))
        counts = None if stats is None else [max(stats.num_experts.values()) // 2]
        return measure_sensitivity(
            folder, samples, [recipe], stats, counts=counts, sparsities=(), batch_size=batch_size, compute=compute
        )
    return compare(folder, samples, batch_size=batch_size, compute=compute)


def memory(name: str, folder: str, tokens: int, batch_size: int, dtype: str) -> dict[str, Any]:
    """What one of them takes, in a process of its own."""
    samples = make_samples(tokens)
    slowness(torch.bfloat16)  # what the libraries load for it is not of the work
    with watching() as seen:
        work_of(name, folder, samples, batch_size, dtype)
    return seen


def cpu_seconds(run: Callable[[str], object], dtype: str) -> float:
    """What a run takes of the processor, which other processes disturb least."""
    began = time.process_time()
    run(dtype)
    return time.process_time() - began


def timed(folder: str, a: argparse.Namespace) -> list[dict[str, object]]:
    samples = make_samples(a.tokens)
    few = samples.take(max(1, len(samples) // 4))
    stats = calibrate(folder, samples, "reap", batch_size=a.batch_size, compute=Compute("float32"))
    rows: list[dict[str, object]] = []
    for name in (
        "calibration reap",
        "calibration mosaic",
        "calibration reap, streamed",
        "calibration mosaic, streamed",
        "sensitivity",
        "evaluation",
    ):
        on = few if name == "sensitivity" else samples

        def run(dtype: str, name: str = name, on: CalibrationSet = on) -> object:
            return work_of(name, folder, on, a.batch_size, dtype, stats)

        pairs = [(cpu_seconds(run, "auto"), cpu_seconds(run, "float32")) for _ in range(a.repeats + 1)][1:]
        mine, wide = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        narrow = cpu_seconds(run, "bfloat16") if a.narrow and "calibration" in name else ""
        rows.append(
            {"what": name, "auto s": mine, "float32 s": wide, "bfloat16 s": narrow, "ratio": ratio, "bar": BAR}
        )
    return rows


def remembered(folder: str, a: argparse.Namespace) -> list[dict[str, object]]:
    layout = open_layout(folder)
    layer = max(layout.layers)
    inside = (t for name, t in layout.checkpoint.tensors.items() if f"layers.{layer}." in name)
    limit = max(sum(tensor.nbytes for tensor in inside) / MIB, 32.0)
    rows: list[dict[str, object]] = []
    for name in ("calibration reap", "calibration reap, streamed", "evaluation"):
        how = {"name": name, "folder": folder, "tokens": a.tokens, "batch_size": a.batch_size}
        auto, narrow = (in_child(__file__, "memory", **how, dtype=d)["peak MiB"] for d in ("auto", "bfloat16"))
        cells = {"auto MiB": auto, "bfloat16 MiB": narrow, "more MiB": auto - narrow}
        rows.append({"what": name, **cells, "layer MiB": limit})
    return rows


def differing(name: str, texts: int) -> list[dict[str, object]]:
    """Retained experts of half of all that differ, by method, for a small model."""
    counts = {"train": texts, "tune": 0, "heldout": 0}
    records = [record for record in corpus.make_corpus(counts)["train"]]
    tokenizer = AutoTokenizer.from_pretrained(SMALL / name)
    samples = CalibrationSet.build(records, tokenizer, max_length=256)
    stats = {d: calibrate(SMALL / name, samples, "all", compute=Compute(d, stream=False)) for d in DTYPES}
    rows: list[dict[str, object]] = []
    for method in (m for m in list_methods() if m not in ("auto", "random")):
        recipe = MoEPrunerConfig(method=method, sparsity=0.5)
        plans = {d: build_plan(found, recipe).retained for d, found in stats.items()}
        total = sum(map(len, plans["float32"].values()))

        def differ(dtype: str, plans: dict[str, Any] = plans) -> int:
            return sum(len(set(kept) - set(plans[dtype][layer])) for layer, kept in plans["float32"].items())

        cells = {"bfloat16": differ("bfloat16"), "auto": differ("auto"), "of": total}
        rows.append({"what": f"{name}, {method}", **cells, "bar": ""})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulate", choices=tuple(SIMULATED), help="a processor without units for bfloat16")
    parser.add_argument("--kind", default="qwen2_moe", choices=("mixtral", "qwen2_moe"))
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=["mixtral"], help="small ones, for the plans")
    parser.add_argument("--texts", type=int, default=10, help="of each domain, for the plans")
    parser.add_argument("--narrow", action="store_true", help="time bfloat16 as well, however long it takes")
    a = parser.parse_args()
    times = slowness(torch.bfloat16)
    settings = {**vars(a), "bfloat16 takes": times, "auto is": str(computing_dtype(torch.bfloat16, "cpu"))}
    with tempfile.TemporaryDirectory(prefix="moe-precision-") as folder:
        make_model(a.kind, a.experts, a.top_k, a.hidden, a.width, a.layers, "bfloat16").save_pretrained(folder)
        report("bfloat16 files beside the same in float32", timed(folder, a), settings, "ratio")
        rows = remembered(folder, a)
        report("memory of bfloat16 files in auto beyond bfloat16", rows, settings, "more MiB", bar="layer MiB")
    rows = [row for name in a.models for row in differing(name, a.texts)]
    if rows:
        report("retained experts that differ from those of float32", rows, settings, "bfloat16")


if __name__ == "__main__":
    serve({"memory": memory}) or main()
