# SPDX-License-Identifier: Apache-2.0
"""Writing a pruned checkpoint beside copying the same bytes with ``cp``, and the memory it takes.

    python examples/benchmarks/surgery.py [--gigabytes 2] [--folder DIR]

Half of the experts of every layer are retained, drawn at random, from files with a tensor for each expert and from
files with all experts in one. ``cp`` copies files that hold the retained bytes and nothing else. Both sides end when
what they wrote is on disk. *Cold*: what is read was dropped from the system's cache; *warm*: it is there. Pairs in
turn, medians; the bar is 0.7 of the throughput of ``cp``. The most anonymous memory above what imports take, in a
process of its own, may be the largest tensor and 200 MiB.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import (
    MIB,
    copy_with_cp,
    drop_cache,
    fresh,
    in_child,
    ratio_in_pairs,
    read_through,
    report,
    serve,
    watching,
    weight_files,
)
from synthetic import checkpoint_shards, moe_config, shards_bytes, write_checkpoint
from transformers import Qwen2MoeConfig

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan


def shape(gigabytes: float, hidden: int) -> Qwen2MoeConfig:
    """As many layers of 64 experts as there is room for; at least one."""
    sizes = {
        "vocab_size": 16384,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": hidden,
        "shared_expert_intermediate_size": hidden,
    }
    layer = shards_bytes([checkpoint_shards(moe_config(**sizes, num_hidden_layers=1))[1]])
    return moe_config(**sizes, num_hidden_layers=max(1, round(gigabytes * 1e9 / layer)))


def write(source: str, made: str, target: str) -> dict[str, Any]:
    with watching() as seen:
        PruningPlan.load(made).apply_to_checkpoint(source, target)
    return dict(seen)


def measure(a: argparse.Namespace, folder: Path, layout: str) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The rows of one layout: throughput cold and warm, and memory."""
    config = shape(a.gigabytes, a.hidden)
    source, made, pruned = folder / "source", folder / "plan.json", folder / "pruned"
    retained, copied = folder / "retained", folder / "copied"
    write_checkpoint(source, config, fused=layout == "fused")
    pruner = MoEPruner.from_pretrained(source, MoEPrunerConfig(method="random", sparsity=0.5))
    pruner.prune_checkpoint(retained)
    assert pruner.pruning_plan is not None
    plan = pruner.pruning_plan
    plan.save(made)
    retained_files, source_files = weight_files(retained), weight_files(source)
    size = sum(path.stat().st_size for path in retained_files) / 1e9
    rows: list[dict[str, object]] = []
    for cache, treat in (("cold", drop_cache), ("warm", read_through)):

        def before(treat: Any = treat) -> None:
            fresh(pruned, copied)
            copied.mkdir()
            treat([*source_files, *retained_files])

        copying, writing, ratio = ratio_in_pairs(
            lambda: copy_with_cp(retained_files, copied),
            lambda: plan.apply_to_checkpoint(source, pruned),
            a.repeats,
            before,
        )
        speeds = {"surgery GB/s": size / writing, "cp GB/s": size / copying}
        rows.append({"experts on disk": layout, "cache": cache, "retained GB": size, **speeds, "of cp": ratio})
        rows[-1]["bar"] = 0.7
    fresh(pruned)
    seen = in_child(__file__, "write", source=source, made=made, target=pruned)
    largest = max(tensor.nbytes for tensor in pruner.layout().checkpoint.tensors.values())
    memory = {"experts on disk": layout, "max RSS MiB": seen["max RSS MiB"], "peak MiB": seen["peak MiB"]}
    return rows, {**memory, "limit MiB": largest / MIB + 200}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size, and width of an expert")
    parser.add_argument("--folder", type=Path, help="on the disk to use; a temporary one by default")
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    rows, memory = [], []
    for layout in ("one by one", "fused"):
        with tempfile.TemporaryDirectory(prefix="moe-surgery-", dir=a.folder) as folder:
            timed, took = measure(a, Path(folder), layout)
        rows += timed
        memory.append(took)
    report("checkpoint surgery beside cp of the retained bytes", rows, vars(a), "of cp", at_least=True)
    report("memory of checkpoint surgery", memory, vars(a), "peak MiB", bar="limit MiB")


if __name__ == "__main__":
    serve({"write": write}) or main()
