# SPDX-License-Identifier: Apache-2.0
"""How much memory a calibration takes beside the model, in memory and one layer at a time.

    python examples/benchmarks/memory.py [--experts 128 --layers 6]

Every row is a process of its own; what is counted is anonymous memory above what imports (and, in memory, the model)
take. The bars: in memory, 25% of the model or 1 GiB, whichever is more; one layer at a time, one decoder layer, the
hidden states of the calibration and 1 GiB. What grows with the tokens of a dense calibration is its statistics, and of
those no more than a fixed buffer is in memory, the rest in files.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import GIB, MIB, in_child, make_samples, report, serve, watching
from synthetic import checkpoint_shards, moe_config, shards_bytes, write_checkpoint
from transformers import AutoModelForCausalLM

from optimum_moe_prune import CalibrationStats, Compute, MoEPruner, Need, calibrate
from optimum_moe_prune.storage.growing import IN_MEMORY_BYTES

CLASSES = {
    "routing": [Need.ROUTING],
    "routed": [Need.ROUTING, Need.ROUTED_NORMS],
    "dense": [Need.ROUTING, Need.ROUTED_NORMS, Need.SINGLE_ERROR, Need.GRAM, Need.INPUTS],
}
LENGTH = 512


def in_memory(folder: str, needs: list[str], tokens: int, batch_size: int) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with watching() as seen:
        stats = calibrate(model, make_samples(tokens, LENGTH), map(Need, needs), batch_size=batch_size)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {**seen, "model MiB": size / MIB, "statistics MiB": _size(stats)}


def streamed(folder: str, needs: list[str], tokens: int, batch_size: int) -> dict[str, Any]:
    layout = MoEPruner.from_pretrained(folder).layout()
    samples = make_samples(tokens, LENGTH)
    with watching() as seen:
        stats = calibrate(layout, samples, map(Need, needs), batch_size=batch_size, compute=Compute(stream=True))
    return {**seen, "statistics MiB": _size(stats)}


def _size(stats: CalibrationStats) -> float:
    return sum(t.numel() * t.element_size() for x in stats.layers.values() for t in x.tensors.values()) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8192, help="an eighth of them in the row for few tokens")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to use; a temporary one by default")
    a = parser.parse_args()
    config = moe_config(
        vocab_size=1024,
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.hidden // 64,
        num_key_value_heads=a.hidden // 64,
        num_experts=a.experts,
        num_experts_per_tok=a.top_k,
        moe_intermediate_size=a.width,
        shared_expert_intermediate_size=a.width,
    )
    layer = shards_bytes([checkpoint_shards(config)[1]])
    few = max(LENGTH, a.tokens // 8)
    rows: list[dict[str, object]] = []

    def row(what: str, seen: dict[str, Any], limit: float) -> None:
        cells = {name: seen[name] for name in ("statistics MiB", "max RSS MiB", "peak MiB")}
        rows.append({"calibration": what, **cells, "limit MiB": limit})

    with tempfile.TemporaryDirectory(prefix="moe-memory-", dir=a.folder) as folder:
        write_checkpoint(Path(folder), config)
        how = {"folder": folder, "batch_size": a.batch_size}
        before: dict[str, Any] = {}
        for name, tokens in (("routing", a.tokens), ("routed", a.tokens), ("dense", few), ("dense", a.tokens)):
            seen = in_child(__file__, "in_memory", **how, needs=CLASSES[name], tokens=tokens)
            row(f"in memory, {name}, {tokens:,} tokens", seen, max(seen["model MiB"] / 4, GIB / MIB))
            growth, before = {key: value - before.get(key, 0) for key, value in seen.items()}, seen
        row(f"in memory, dense, by {a.tokens - few:,} more tokens", growth, IN_MEMORY_BYTES / MIB)
        seen |= in_child(__file__, "streamed", **how, needs=CLASSES["dense"], tokens=a.tokens)
        row(f"one layer at a time, dense, {a.tokens:,} tokens", seen, (layer + 2 * a.tokens * a.hidden + GIB) / MIB)
    sizes = {"model MiB": seen["model MiB"], "layer MiB": layer / MIB}
    report("memory of a calibration", rows, {**vars(a), **sizes}, "peak MiB", bar="limit MiB")


if __name__ == "__main__":
    serve({"in_memory": in_memory, "streamed": streamed}) or main()
