# SPDX-License-Identifier: Apache-2.0
"""A checkpoint larger than memory, pruned end to end: seconds and peak memory of each phase, and how near the floor.

    python examples/benchmarks/large.py [--scale 0.08] [--folder DIR --keep] [--compare-read-ahead] [--device cuda]
    python examples/benchmarks/large.py --device cuda --scale 0.25 --budget 110        # two minutes on a GPU

Random weights in the shape of Qwen1.5-MoE-A2.7B, 28.6 GB in 24 layers of 60 experts; with all that is written beside
it, 60 GB of disk. It is calibrated one layer at a time, planned (Mosaic, 30 of 60 experts), and written. Each phase
runs in a process of its own, and the system's cache is emptied of the source before it is read. A line is printed as
each phase ends: its seconds, and those of its process, which imports torch and transformers first. On a GPU the phases
are ``make``, ``calibrate`` and ``speed``; ``plan`` and ``write`` have no part in it (``--phases`` asks for them).

Memory is anonymous memory above what imports take. The limits are one decoder layer, the hidden states of the
calibration and 1 GiB for the calibration; the largest tensor and 200 MiB for the writing; the checkpoint's size for
all. The floor of the calibration is the longest of reading the bytes at the disk's speed, copying them to the card and
multiplying the matrices at the processor's speed; that of the writing is what ``cp`` takes for the retained bytes. Its
bar is 0.7.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    MIB,
    Phases,
    copy_with_cp,
    drop_cache,
    fresh,
    make_samples,
    read_through,
    report,
    seconds,
    serve,
    tflops,
    watching,
    weight_files,
)
from synthetic import checkpoint_shards, moe_config, shards_bytes, write_checkpoint
from transformers import Qwen2MoeConfig

from optimum_moe_prune import CalibrationStats, MoEPruner, MoEPrunerConfig, PruningPlan
from optimum_moe_prune.calibration.streamed import collect_streamed
from optimum_moe_prune.checkpoints.layout import model_dtype
from optimum_moe_prune.models.devices import CPU, card_name, finish, has_own_memory, one_device, peak_bytes
from optimum_moe_prune.models.skeleton import Skeleton
from optimum_moe_prune.names import device_name
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.progress import printed_lines
from optimum_moe_prune.storage.folders import partial_folder, working_on
from optimum_moe_prune.storage.growing import Store
from optimum_moe_prune.storage.workspace import Workspace

_PHASES = ("make", "calibrate", "plan", "write", "speed")
_ON_CARD = ("make", "calibrate", "speed")
_LAYERS = 24
_MULTIPLIED = (torch.bfloat16, torch.float32)
_KEPT = 8192  # tokens for which statistics per token are kept, at most

# Without this package in the process.
_CHECK = """
import json, sys
from pathlib import Path
from safetensors import safe_open
from transformers import AutoConfig
folder, retained = Path(sys.argv[1]), int(sys.argv[2])
config = AutoConfig.from_pretrained(folder)
where = {}
for path in sorted(folder.glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        where.update(dict.fromkeys(file.keys(), path))
index = folder / "model.safetensors.index.json"
if index.is_file():
    listed = json.loads(index.read_text())["weight_map"]
    assert listed == {name: path.name for name, path in where.items()}, "the index and the files disagree"
for name in (name for name in where if name.startswith("model.layers.0.")):
    with safe_open(where[name], framework="pt") as file:
        assert file.get_tensor(name).isfinite().all(), name
experts = [n for n in where if n.startswith("model.layers.0.mlp.experts.") and n.endswith("down_proj.weight")]
assert len(experts) == config.num_experts == retained, (len(experts), config.num_experts, retained)
print(f"{len(where)} tensors in {len(set(where.values()))} files, {retained} experts in each layer")
"""


def shape(scale: float) -> Qwen2MoeConfig:
    """The model's config with fewer layers; below 2, with narrower ones and a smaller vocabulary."""
    layers = round(_LAYERS * scale)
    part = 1.0 if layers >= 2 else scale * _LAYERS / 2

    def narrowed(size: int) -> int:
        return max(64, 64 * round(size * part / 64))

    return moe_config(
        hidden_size=2048,
        num_hidden_layers=max(2, layers),
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=narrowed(1408),
        shared_expert_intermediate_size=narrowed(5632),
        vocab_size=151936 if part == 1 else narrowed(151936),
        norm_topk_prob=False,
        tie_word_embeddings=False,
    )


def recipe(retained: int) -> MoEPrunerConfig:
    return MoEPrunerConfig(method="mosaic", num_experts=retained)


# ------------------------------------------------------------------------------------------- the phases


def make(folder: str, scale: float) -> dict[str, Any]:
    with watching() as seen:
        written = write_checkpoint(Path(folder), shape(scale))
    return {**seen, "made": written}


def calibrate(
    folder: str, target: str, retained: int, tokens: int, length: int, device: str, read_ahead: bool
) -> dict[str, Any]:
    """What ``score --stream`` does, with the choice of reading ahead."""
    pruner = MoEPruner.from_pretrained(folder, recipe(retained))
    samples = make_samples(tokens, length, pruner.model_config.vocab_size)
    dropping = seconds(lambda: drop_cache(weight_files(Path(folder))))
    starting = seconds(lambda: torch.zeros(1, device=device))  # of a card: what begins with its first tensor
    with watching() as seen, working_on(target), printed_lines(sys.stderr):
        layout = pruner.layout()
        skeleton = _Timed(layout, model_dtype(layout.config, layout.checkpoint), device)
        how: dict[str, Any] = {"max_tokens": _KEPT, "read_ahead": read_ahead}
        workspace = Workspace.beside(target).part("calibration")
        store = Store(workspace.folder)
        stats = collect_streamed(skeleton, samples, recipe(retained).needs, **how, store=store)
        stats.save(target)
        workspace.clear()
    told: dict[str, Any] = {
        "least used": min(int((x.total("routed_tokens") > 0).sum()) for x in stats.layers.values()),
        "seconds until the first layer was there": skeleton.waits[0],
        "seconds until the others were": sum(skeleton.waits[1:]),
        "seconds in layers": sum(skeleton.runs),
        "seconds to empty the cache": dropping,
        "seconds to start the device": starting,
    }
    if has_own_memory(device):
        told |= {"gpu": card_name(device), "gpu MiB": peak_bytes({torch.device(device)}) / MIB}
    return {**seen, **told}


class _Timed(Skeleton):
    """A skeleton that knows how long it waited for each layer, and how long each was at work."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self.waits: list[float] = []
        self.runs: list[float] = []

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        began = time.perf_counter()
        with super().loaded(index):
            there = time.perf_counter()
            self.waits.append(there - began)
            yield
            finish({self.device})
            self.runs.append(time.perf_counter() - there)


def plan(stats: str, target: str, retained: int) -> dict[str, Any]:
    with watching() as seen:
        build_plan(CalibrationStats.load(stats), recipe(retained)).save(target)
    return dict(seen)


def write(folder: str, made: str, target: str) -> dict[str, Any]:
    drop_cache(weight_files(Path(folder)))
    with watching() as seen:
        PruningPlan.load(made).apply_to_checkpoint(folder, target)
    return dict(seen)


def speed(folder: str, tokens: int, rows: int, columns: int, device: str) -> dict[str, Any]:
    """Reading files that are in no cache, multiplying matrices in the shape of the experts', and copying to a card."""
    files, done = weight_files(Path(folder)), 0
    drop_cache(files)

    def read() -> None:
        nonlocal done
        done = read_through(files, most=2 * 10**9)

    with watching() as seen:
        taken = seconds(read)
        speeds = {str(t).removeprefix("torch."): tflops(tokens, rows, columns, t, device) for t in _MULTIPLIED}
        if torch.device(device).type != CPU:
            speeds["GB/s to the card"] = _copying(device)
    return {**seen, "GB/s": done / 1e9 / taken, **speeds}


def _copying(device: str) -> float:
    """GB/s of pinned memory to a card: the best of several times."""
    pinned, there = (
        torch.empty(256 * MIB, dtype=torch.uint8, **w) for w in ({"pin_memory": True}, {"device": device})
    )

    def copy() -> None:
        there.copy_(pinned, non_blocking=True)
        finish({there.device})

    return pinned.nbytes / 1e9 / min(seconds(copy) for _ in range(5))


# ------------------------------------------------------------------------------------------- what it should take


def operations(config: Qwen2MoeConfig, tokens: int, length: int) -> tuple[float, float]:
    """TFLOP of a calibration, with every expert on kept tokens: of the layers, and of Gram matrices, in float32."""
    hidden, experts, kept = config.hidden_size, config.num_experts, min(1, _KEPT / tokens)
    attention = 4 * hidden * hidden + length * hidden  # projections; half of all pairs of positions, twice
    used = kept * experts + (1 - kept) * config.num_experts_per_tok
    widths = used * config.moe_intermediate_size + config.shared_expert_intermediate_size
    layer = 2 * (attention + hidden * experts + 3 * hidden * widths)
    gram = experts * (experts + 1) * hidden  # both triangles are the same
    tokens_and_layers = config.num_hidden_layers * tokens / 1e12
    return tokens_and_layers * layer, tokens_and_layers * gram * kept


def tensor_bytes(config: Qwen2MoeConfig, pattern: str) -> int:
    """Bytes of the tensors whose names hold a pattern."""
    shards = checkpoint_shards(config)
    return sum(2 * math.prod(shape) for shard in shards for name, shape in shard.items() if pattern in name)


def phase_row(name: str, seen: dict[str, Any], limit: float | str) -> dict[str, object]:
    row: dict[str, object] = {"phase": name, "seconds": seen["seconds"]}
    row |= {"GB read": seen["GB read"], "GB written": seen["GB written"]}
    row["GB/s"] = (seen["GB read"] + seen["GB written"]) / seen["seconds"]
    return row | {"max RSS MiB": seen["max RSS MiB"], "peak MiB": seen["peak MiB"], "limit MiB": limit}


def run(a: argparse.Namespace, folder: Path) -> None:
    config = shape(a.scale)
    source, stats, made, pruned, copied = (folder / n for n in ("source", "stats", "plan.json", "pruned", "copied"))
    shards = checkpoint_shards(config)
    whole, layer = shards_bytes(shards), shards_bytes([shards[1]])
    largest = max(2 * math.prod(shape) for shard in shards for shape in shard.values())
    fresh(partial_folder(stats), pruned, copied)
    if "calibrate" in a.phases:
        fresh(stats)
    less = tensor_bytes(config, ".mlp.experts.") * (1 - a.keep_experts / config.num_experts)
    per_token = 2 * config.num_experts * (config.num_experts + 4) + 2 * config.hidden_size
    kept = config.num_hidden_layers * min(a.tokens, _KEPT) * per_token  # while it grows, and as it is saved
    needed = whole + (2 * (whole - less) if "write" in a.phases else 0) + 2 * kept
    there = sum(path.stat().st_size for path in weight_files(source))
    if needed - there > shutil.disk_usage(folder).free:
        raise SystemExit(f"{folder} needs room for {needed / 1e9:.0f} GB; make some, or shrink the model (--scale).")
    print(
        f"{config.num_hidden_layers} layers of {config.num_experts} experts, width {config.moe_intermediate_size}, "
        f"vocabulary {config.vocab_size}: {whole / 1e9:.1f} GB, on {a.device}. The source is dropped from the "
        "system's cache before the calibration and before the writing; GB are those that went from and to disks.",
        flush=True,
    )

    phases = Phases(__file__, a.phases, a.budget)
    making = phases.phase("make", folder=source, scale=a.scale)
    states = 2 * a.tokens * config.hidden_size
    limit = (layer + states + GIB) / MIB
    how = {"folder": source, "retained": a.keep_experts, "tokens": a.tokens, "length": a.length, "device": a.device}
    rows = [] if making is None or not making["made"] else [phase_row("make the checkpoint", making, "")]
    if a.compare_read_ahead:
        without = phases.phase("calibrate", **how, target=stats, read_ahead=False)
        rows += [] if without is None else [phase_row("calibrate, no reading ahead", without, limit)]
        fresh(stats)
    calibrating = phases.phase("calibrate", **how, target=stats, read_ahead=True)
    planning = phases.phase("plan", stats=stats, target=made, retained=a.keep_experts)
    measured = phases.phase(
        "speed", folder=source, tokens=a.tokens, rows=config.hidden_size, columns=config.moe_intermediate_size,
        device=a.device,
    )  # fmt: skip
    writings, copyings, files = [], [], []
    for _ in range(a.repeats if made.is_file() else 0):
        fresh(pruned)
        writing = phases.phase("write", folder=source, made=made, target=pruned)
        if writing is None:
            break
        writings.append(writing)
        files = weight_files(pruned)
        drop_cache(files)
        copied.mkdir()
        copyings.append(seconds(lambda files=files: copy_with_cp(files, copied)))
        print(f"cp of the retained bytes: {copyings[-1]:.1f} s.", flush=True)
        fresh(copied)
    retained_gb = sum(path.stat().st_size for path in files) / 1e9
    if writings:
        subprocess.run([sys.executable, "-c", _CHECK, str(pruned), str(a.keep_experts)], check=True)

    whole_row = [calibrating, planning, None]
    rows += [] if calibrating is None else [phase_row("calibrate", calibrating, limit)]
    rows += [] if planning is None else [phase_row("plan", planning, "")]
    if writings:
        whole_row[2] = writing = sorted(writings, key=lambda seen: seen["seconds"])[len(writings) // 2]
        rows.append(phase_row("write", writing, (largest + 200 * MIB) / MIB))
    if ran := [phase for phase in whole_row if phase is not None]:
        total = {k: sum(p[k] for p in ran) for k in ("seconds", "GB read", "GB written")}
        total |= {k: max(p[k] for p in ran) for k in ("peak MiB", "max RSS MiB")}
        if len(ran) == len(whole_row):
            rows.append(phase_row("calibrate, plan and write", total, whole / MIB))
    settings = {**vars(a), "GB": whole / 1e9, "layers": config.num_hidden_layers, "speed": measured}
    if calibrating is not None:
        known = ("least used", "gpu", "gpu MiB")
        settings |= {k: v for k, v in calibrating.items() if k in known or k.startswith("seconds ")}
    if rows:
        report("pruning a large checkpoint", rows, settings, "peak MiB", bar="limit MiB")
    if measured is None:
        return

    cells = []
    tflop, gram = operations(config, a.tokens, a.length)
    to_read = (whole - tensor_bytes(config, "lm_head")) / 1e9
    parts = {
        "reading": to_read / measured["GB/s"],
        "calculating": tflop / measured["bfloat16"] + gram / measured["float32"],
    }
    if "GB/s to the card" in measured:
        parts["copying"] = to_read / measured["GB/s to the card"]
    print(
        f"\nThis machine: cold reads {measured['GB/s']:.2f} GB/s; matrices {measured['bfloat16']:.3g} TFLOP/s in "
        f"bfloat16, {measured['float32']:.3g} in float32, at ({a.tokens}, {config.hidden_size}) x "
        f"({config.hidden_size}, {config.moe_intermediate_size}) on {a.device}"
        + (f"; {measured['GB/s to the card']:.1f} GB/s to the card." if "copying" in parts else ".")
    )
    if calibrating is not None:
        floor = ", ".join(f"{name} {value:.3g} s" for name, value in parts.items())
        shortest, took = max(parts.values()), calibrating["seconds"]
        written = sum(path.stat().st_size for path in stats.iterdir()) / 1e9
        cells.append(("calibrate", to_read, written, tflop + gram, floor, shortest, took, shortest / took, ""))
    if writings:
        copying = statistics.median(copyings)
        ratio = statistics.median(c / w["seconds"] for c, w in zip(copyings, writings, strict=True))
        settings["speed"] = {**measured, "cp GB/s": retained_gb / copying}
        cells.append(("write", retained_gb, retained_gb, "", "cp", copying, writing["seconds"], ratio, 0.7))
    columns = ("phase", "GB to read", "GB to write", "TFLOP", "floor", "floor s", "seconds", "floor / seconds", "bar")
    rows = [dict(zip(columns, row, strict=True)) for row in cells]
    if rows:
        report("the large checkpoint beside the floor", rows, settings, "floor / seconds", at_least=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="a part of the 24 layers; below 2, of their size")
    parser.add_argument("--folder", type=Path, help="on the disk to use; a temporary one by default")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there, for another run")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--keep-experts", type=int, default=30)
    parser.add_argument("--device", default="auto", type=device_name, help="default auto: the GPU that is there")
    parser.add_argument("--phases", help=f"of {','.join(_PHASES)} (default: all; on a GPU {','.join(_ON_CARD)})")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all phases together")
    parser.add_argument("--repeats", type=int, default=1, help="of the writing and of cp, in turn")
    parser.add_argument("--compare-read-ahead", action="store_true", help="calibrate without reading ahead as well")
    a = parser.parse_args()
    if not 0 < a.scale <= 1:
        parser.error("--scale must be more than 0 and at most 1.")
    if a.keep and a.folder is None:
        parser.error("--keep needs --folder.")
    a.device = one_device(a.device)
    usual = _PHASES if torch.device(a.device).type == CPU else _ON_CARD
    a.phases = list(usual) if a.phases is None else a.phases.split(",")
    if unknown := [name for name in a.phases if name not in _PHASES]:
        parser.error(f"--phases: {unknown[0]!r} is none of {', '.join(_PHASES)}.")
    if a.folder is not None:
        a.folder.mkdir(parents=True, exist_ok=True)
    if a.keep:
        run(a, a.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="moe-large-", dir=a.folder) as folder:
            run(a, Path(folder))


if __name__ == "__main__":
    phases = {f.__name__: f for f in (make, calibrate, plan, write, speed)}
    serve(phases) or main()
